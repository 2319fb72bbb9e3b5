"""The vectors of the generated CPU kernels: how halves are rounded, and what is written past the caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parity_tests.test_fused_kernels import _parameters as parameters
from parity_tests.test_fused_kernels import _steps as steps
from reimpl.optim import _fused

numba = pytest.importorskip("numba", reason="numba compiles the fused steps on the CPU")
from reimpl.optim import _numba  # noqa: E402
from reimpl.optim import _numba_lanes as lanes  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_goes_past_the_caches_is_written_all_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that begin anywhere in a line of the cache, one shorter than it takes to reach the next."""
    results = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(_numba, "STREAM", least)
        params = parameters([(1000,), (70_001,), (7,), (0,)], dtype)
        optimizer = steps("ASGD", {"t0": 3.0}, params, 1, fused=True)
        for shift, p in enumerate(params, start=3):
            room = torch.full((p.numel() + 64,), 5.0, dtype=dtype)
            optimizer.state[p]["ax"] = room[shift : shift + p.numel()].copy_(p.detach())
        for expected in (4, 4, 4, 5):  # from t = t₀ + 2 on the mean is read
            optimizer.step()
            assert _fused.streams(optimizer) == expected
        rooms = [optimizer.state[p]["ax"].untyped_storage() for p in params]
        whole = [torch.tensor([], dtype=dtype).set_(room) for room in rooms]
        results.append([*(p.detach() for p in params), *whole])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_as_pytorch_rounds_them(dtype: torch.dtype) -> None:
    """Ties, subnormal numbers, overflow and infinities; a whole line of them and one at a time."""
    width = lanes.LINE // 2
    load, store = (getattr(lanes, f"{name}_{str(dtype)[6:]}") for name in ("load", "store"))

    @numba.njit
    def narrow(source: int, wide: int, back: int, n: int) -> None:
        for i in range(0, n, width):
            store(wide + 2 * i, lanes.load(source + 4 * i, lanes.spread(np.float32(0), width)))
            lanes.store(back + 4 * i, load(wide + 2 * i, lanes.spread(np.float32(0), width)))

    @numba.njit
    def narrow_each(source: int, wide: int, back: int, n: int) -> None:
        for i in range(n):
            store(wide + 2 * i, lanes.load(source + 4 * i, np.float32(0)))
            lanes.store(back + 4 * i, load(wide + 2 * i, np.float32(0)))

    high, low = np.arange(2**16, dtype=np.uint32) << 16, np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 12  # halfway between two float16
    numbers = torch.from_numpy(np.concatenate([(high[:, None] | low).ravel(), ties + 0x38000000]).view(np.float32))
    numbers = numbers[~numbers.isnan()]
    numbers = numbers[: len(numbers) // width * width].contiguous()
    expected = numbers.to(dtype)
    for function in (narrow, narrow_each):
        halves, again = torch.empty_like(numbers, dtype=dtype), torch.empty_like(numbers)
        function(numbers.data_ptr(), halves.data_ptr(), again.data_ptr(), len(numbers))
        if function is narrow and dtype == torch.bfloat16:
            # the first half of the lanes stands for the even places of a line
            halves = halves.view(-1, width // 2, 2).mT.reshape(-1)
        assert torch.equal(halves.view(torch.int16), expected.view(torch.int16))
        assert torch.equal(again.view(torch.int32), expected.float().view(torch.int32))
