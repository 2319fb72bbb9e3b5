"""Standardize: scikit-learn's and the oracle's numbers, one pass over a stream, merging, saving, bad input."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from parity_tests.oracle import data as oracle
from reimpl.data import Standardize, Whiten
from reimpl.testing.samples import SEEDS, random_tensor, seeded_generator
from reimpl.testing.tolerance import bits_equal, judge, to_oracle

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parents[1]
TRANSFORMS: list[Any] = [Standardize, Whiten]
# dim, shape of the data, the axes that are averaged over
CASES = [
    pytest.param(1, (50, 7), (0,), id="features"),
    pytest.param(1, (6, 3, 5, 4), (0, 2, 3), id="channels"),
    pytest.param(-1, (6, 5, 4, 3), (0, 1, 2), id="channels last"),
    pytest.param((1, 2, 3), (20, 2, 3, 4), (0,), id="pixels"),
    pytest.param((-1, 1), (9, 4, 5, 3), (0, 2), id="two of three"),
    pytest.param(None, (8, 3, 2), (0, 1, 2), id="everything"),
    pytest.param(None, (30,), (0,), id="one number an example"),
]


def sample(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = random_tensor(shape, torch.float64, seeded_generator(seed, "standardize", shape))
    return (x * torch.linspace(0.5, 3, shape[-1], dtype=torch.float64) + 5).to(dtype)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(("dim", "shape", "axes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_oracle(
    dtype: torch.dtype, dim: Any, shape: tuple[int, ...], axes: tuple[int, ...], correction: int, device: torch.device
) -> None:
    for seed in SEEDS:
        x = sample(shape, seed, dtype).to(device)
        transform = Standardize(dim, correction).to(device).fit(x)
        got = transform(x)
        exact, mean, std = oracle.standardize(to_oracle(x), axes, correction)
        # A mean over n numbers and its square root carry the roundings of the sum: n/2 ulp of float64 at the worst,
        # which float32 does not see.
        limit = x.numel() / 2 if dtype == torch.float64 else None
        judge(got, None, exact, (abs(to_oracle(x)) + abs(mean)) / std, limit_ulp=limit).check("Standardize", str(dim))
        assert got.dtype == dtype and got.shape == x.shape
        back = transform.inverse(got)
        judge(back, None, to_oracle(x), abs(to_oracle(x)) + abs(mean), limit_ulp=limit).check("inverse", str(dim))
        assert tuple(transform.mean.shape) == tuple(np.squeeze(mean, axes).shape)
        assert int(transform.count) == np.prod([shape[a] for a in axes])


def test_against_scikit_learn() -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="the reference is scikit-learn's")
    x = sample((200, 6))
    x[:, 2] = 0.1  # a constant that binary fractions cannot hold
    ours, theirs = Standardize().fit(x), preprocessing.StandardScaler().fit(x.numpy())
    # means of 200 numbers in float64
    torch.testing.assert_close(ours.mean, torch.from_numpy(theirs.mean_), rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.std.square(), torch.from_numpy(theirs.var_), rtol=1e-13, atol=1e-30)
    torch.testing.assert_close(ours(x), torch.from_numpy(theirs.transform(x.numpy())), rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.inverse(ours(x)), torch.from_numpy(theirs.inverse_transform(ours(x).numpy())))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_data_may_come_in_any_way(transform: Any) -> None:
    x = sample((101, 4), dtype=torch.float32)
    whole = transform().fit(x)
    loader = DataLoader(TensorDataset(x, torch.arange(101)), batch_size=10)
    ways: dict[str, Any] = {
        "array": x.numpy(),
        "read-only array": np.lib.stride_tricks.sliding_window_view(x.numpy(), 1, axis=0)[..., 0],
        "reversed array": x.numpy()[::-1],
        "pairs from a loader": loader,
        "generator of arrays": (chunk.numpy() for chunk in x.split(7)),
        "with empty batches": [x[:0], x[:50], x[50:50], x[50:]],
        "requiring grad": x.clone().requires_grad_(),
        "inner dimension": x.mT.contiguous().mT,
    }
    for way, data in ways.items():
        other = transform().fit(data)
        assert int(other.count) == 101, way
        assert not other.mean.requires_grad
        # The order of additions differs.
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-13, atol=0, msg=way)
        torch.testing.assert_close(other.scatter, whole.scatter, rtol=1e-12, atol=1e-12, msg=way)


def test_one_pass_over_a_hundred_million_values() -> None:
    """Offset 10⁴ and deviation 1: sums of float32 squares would lose every digit of σ, and of float64 ones eight."""
    batch = 10_000 + random_tensor((10**6,), torch.float32, seeded_generator(0, "stream"))
    exact = to_oracle(batch)
    transform = Standardize(None).fit(batch for _ in range(100))
    assert int(transform.count) == 10**8
    # One batch a hundred times has that batch's moments, summed in float64 over chunks of a million.
    assert float(transform.mean) == pytest.approx(exact.mean(), rel=1e-14)
    assert float(transform.std) == pytest.approx(exact.std(), rel=1e-11)
    squares = exact.astype(np.float32)
    naive = float(np.square(squares).mean(dtype=np.float32) - squares.mean(dtype=np.float32) ** 2)
    assert abs(naive - exact.var()) > 1, "the naive way did not fail: the test shows nothing"


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_merging_is_fitting_on_all(transform: Any, device: torch.device) -> None:
    x = sample((90, 3)).to(device)
    parts = [transform().fit(part) for part in (x[:1].repeat(2, 1), x[:2], x[2:40], x[40:])]
    whole = transform().fit(torch.cat([x[:1], x[:1], x]))
    merged = transform().merge(*parts[:2], parts[2].to(device), parts[3], transform())
    assert merged.mean.device.type == "cpu" and parts[2].mean.device.type == device.type
    for name, value in whole.state_dict().items():
        # roundings of sums in another order; eigenvectors follow the covariance
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-11, atol=1e-12, msg=name)
    doubled = copy.deepcopy(whole)
    for _ in range(20):
        doubled.merge(copy.deepcopy(doubled))
    assert int(doubled.count) == 92 * 2**20
    torch.testing.assert_close(doubled.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(doubled(x.cpu()), whole(x.cpu()), rtol=1e-11, atol=1e-11)
    assert not transform().merge(transform()).fitted


@pytest.mark.slow
def test_two_processes_make_one_fit(tmp_path: Path) -> None:
    x = sample((60, 3))
    torch.save(x, tmp_path / "data.pt")
    code = (
        "import sys, torch; from reimpl.data import Whiten; folder, share = sys.argv[1], int(sys.argv[2])\n"
        "part = torch.load(f'{folder}/data.pt')[share::2]\n"
        "torch.save(Whiten('pca').fit(part).state_dict(), f'{folder}/{share}.pt')"
    )
    for share in "01":
        subprocess.run([sys.executable, "-c", code, str(tmp_path), share], cwd=ROOT, check=True, timeout=120)
    parts = []
    for share in "01":
        part = Whiten("pca")
        part.load_state_dict(torch.load(tmp_path / f"{share}.pt"))
        parts.append(part)
    merged, whole = parts[0].merge(parts[1]), Whiten("pca").fit(x)
    torch.testing.assert_close(merged(x), whole(x), rtol=1e-10, atol=1e-12)  # sums in another order


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_is_saved_with_the_model(transform: Any) -> None:
    x = sample((40, 4), dtype=torch.float32)
    model = nn.Sequential(transform().fit(x), nn.Linear(4, 2))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = nn.Sequential(transform(), nn.Linear(4, 2))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert bits_equal(fresh(x), model(x)) and fresh[0].fitted
    fresh[0].merge(transform().fit(x))
    assert int(fresh[0].count) == 80
    unfitted = nn.Sequential(transform(), nn.Linear(4, 2))
    unfitted.load_state_dict(nn.Sequential(transform(), nn.Linear(4, 2)).state_dict())
    assert not unfitted[0].fitted
    with pytest.raises(RuntimeError, match="size mismatch"):
        transform().fit(x[:, :3]).load_state_dict(model[0].state_dict())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_change_of_dtype_leaves_the_statistics(transform: Any, device: torch.device) -> None:
    x = sample((40, 4), dtype=torch.float32).to(device)
    model = transform().fit(x).to(device)
    expected = model(x)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float32)):
        assert bits_equal(change(model)(x), expected) and model.mean.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        # computed in float32 from inputs that were rounded to dtype first
        got, exact = model(x.to(dtype)), model(x.to(dtype).float())
        assert got.dtype == dtype and bits_equal(got, exact.to(dtype))
    counts = torch.randint(0, 255, (40, 4), dtype=torch.uint8, device=device)
    assert transform().to(device).fit(counts)(counts).dtype == torch.float32


def test_a_large_offset_costs_no_accuracy() -> None:
    x = (1e6 + random_tensor((1000, 2), torch.float64, seeded_generator(0, "offset"))).float()
    transform = Standardize().fit(x)
    exact, _, _ = oracle.standardize(to_oracle(x), (0,))
    torch.testing.assert_close(transform(x).double(), torch.from_numpy(exact), rtol=1e-6, atol=1e-6)  # eps of float32
    once = to_oracle((x - transform.mean.float()) / transform.std.float())
    assert abs(once - exact).max() > 1e-4, "the mean rounded once does no harm: the test shows nothing"


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constant_features_become_zero(value: float, dtype: torch.dtype) -> None:
    x = torch.cat([torch.full((70, 1), value, dtype=dtype), sample((70, 1), dtype=dtype)], 1)
    transform = Standardize().fit(x.split(13))
    y = transform(x)
    assert transform.std[0] == 0 and (y[:, 0] == 0).all() and y[:, 1].std(correction=0) == pytest.approx(1)
    assert bits_equal(transform.inverse(y)[:, 0] + 0.0, x[:, 0] + 0.0)
    # a test value that differs is centred, not divided
    assert transform(x + 1)[0, 0] == (x[0, 0] + 1) - x[0, 0]
    for spread in (1e-300, 1e-41):  # a σ that float32 cannot hold, or only as a subnormal number
        tiny = Standardize().fit(torch.tensor([[0.0], [spread]], dtype=torch.float64))
        assert tiny(torch.tensor([[1.0]])).item() == 1.0


def test_one_example_is_all_constant() -> None:
    x = sample((1, 5))
    assert (Standardize().fit(x)(x) == 0).all()
    with pytest.raises(ValueError, match=r"more than 1 values of each feature, as correction=1, got 1"):
        Standardize(correction=1).fit(x)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_refuses_to_transform_before_fitting(transform: Any) -> None:
    for use in (transform(), transform().inverse):
        with pytest.raises(RuntimeError, match=f"this {transform.__name__} is not fitted yet: call fit"):
            use(torch.ones(2, 3))


def _generator(*batches: Any) -> Callable[[], Any]:
    return lambda: iter(batches)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (lambda: torch.empty(0, 3), ValueError, "at least one example, got none"),
        (_generator(), ValueError, "at least one example, got none"),
        (lambda: DataLoader(TensorDataset(torch.ones(3, 2)), 4, drop_last=True), ValueError, "the loader yielded none"),
        (lambda: torch.ones(3, 0), ValueError, r"at least one number an example, got shape \(3, 0\)"),
        (lambda: torch.tensor(1.0), ValueError, "got a scalar"),
        (lambda: torch.ones(3), IndexError, r"expected to be in range of \[-1, 0\], but got 1\): dim names .* \(3,\)"),
        (_generator(torch.ones(3, 2), torch.ones(3, 4)), ValueError, r"features of shape \(2,\), got \(4,\)"),
        (lambda: torch.ones(3, 2, dtype=torch.complex64), TypeError, "must be real, got torch.complex64"),
        (lambda: "words", TypeError, "iterable of batches, got str"),
        (lambda: [{"x": torch.ones(2, 2)}], TypeError, "begins with one, got dict"),
        (lambda: [[1.0, 2.0]], TypeError, "begins with one, got float"),
        (lambda: 3, TypeError, "got int"),
    ],
)
def test_bad_data(transform: Any, data: Any, error: type[Exception], text: str) -> None:
    fitted = transform().fit(sample((9, 2)))
    before = copy.deepcopy(fitted.state_dict())
    with pytest.raises(error, match=text):
        fitted.fit(data())
    assert all(bits_equal(before[name], value) for name, value in fitted.state_dict().items())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_nan_names_its_column(transform: Any) -> None:
    x = sample((9, 4))
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="column 2 holds NaN; fit needs finite numbers"):
        transform().fit(x)
    x[4, 3] = float("inf")
    with pytest.raises(ValueError, match="column 2 holds NaN, and so do 1 more"):
        transform().fit(x.split(5))
    with pytest.raises(ValueError, match="column 0 holds an infinite number"):
        transform().fit(-x[4:5, 3:] / 2)
    images = sample((5, 2, 3, 3))
    images[0, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match=r"column \(1, 2, 0\) holds NaN"):
        transform((1, 2, 3)).fit(images) if transform is Standardize else transform(dim=(1, 2, 3)).fit(images)


def test_bad_arguments() -> None:
    with pytest.raises(IndexError, match=r"but got 7\): dim names a dimension that data of shape \(9, 2\) have not$"):
        Standardize(dim=7).fit(torch.ones(9, 2))
    with pytest.raises(ValueError, match="dim must not hold 0"):
        Standardize(0)
    with pytest.raises(ValueError, match="dim must name different dimensions, none the first"):
        Standardize(-2).fit(torch.ones(3, 2))
    with pytest.raises(ValueError, match="dim must name different dimensions"):
        Standardize((1, -1)).fit(torch.ones(3, 2))
    with pytest.raises(ValueError, match="correction must be at least 0, got -1"):
        Standardize(correction=-1)
    with pytest.raises(ValueError, match="centring must be one of"):
        Standardize(centring="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected features of shape \(2,\), as in the fit, got \(3,\)"):
        Standardize().fit(sample((4, 2)))(torch.ones(1, 3))
    with pytest.raises(TypeError, match="expected a Standardize to merge, got a Whiten"):
        Standardize().merge(Whiten())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features of shape \(2,\) to merge, got \(3,\)"):
        Standardize().fit(sample((4, 2))).merge(Standardize().fit(sample((4, 3))))
    with pytest.raises(ValueError, match="squares overflow float64"):
        Standardize().fit(torch.tensor([[1e200], [-1e200]], dtype=torch.float64))


def test_compiles_exports_and_differentiates(device: torch.device) -> None:
    x = sample((12, 3)).to(device)
    for transform in (Standardize().to(device).fit(x), Whiten().to(device).fit(x)):
        compiled = torch.compile(transform, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), transform(x), rtol=1e-13, atol=1e-13)
        assert torch.autograd.gradcheck(transform, x[:2].clone().requires_grad_())


def test_the_notes_code_centres_each_example() -> None:
    """Erratum N0.3: averaging over axis 1 leaves every feature's mean and variance what they were, or worse."""
    x = sample((300, 4))
    x[:, 1] += 40
    array = x.numpy()
    note = array - array.mean(axis=1).reshape(len(array), 1)
    ours = Standardize(centring="sample")
    torch.testing.assert_close(ours.fit(x)(x), torch.from_numpy(note), rtol=1e-13, atol=1e-13)
    assert abs(note.mean(axis=0)).max() > 10 and abs(note.std(axis=0) - 1).max() > 0.4
    right = Standardize().fit(x)(x)
    assert right.mean(0).abs().max() < 1e-13 and (right.std(0, correction=0) - 1).abs().max() < 1e-13
    with pytest.raises(RuntimeError, match="keeps no means"):
        ours.inverse(x)


def test_dividing_by_the_variance_does_not_standardise() -> None:
    """Erratum N4.36: σ is the root of the mean square, which the note's text calls the variance."""
    x = 3 * sample((300, 2))
    transform = Standardize().fit(x)
    by_variance = (x - transform.mean) / transform.std.square()
    assert (by_variance.var(0, correction=0) - 1).abs().min() > 0.5
    torch.testing.assert_close(transform(x).var(0, correction=0), torch.ones(2, dtype=torch.float64))


def test_looks() -> None:
    assert repr(Standardize()) == "Standardize(dim=1, correction=0, fitted=False)"
    assert repr(Standardize((1, 2), centring="sample")) == (
        "Standardize(dim=(1, 2), correction=0, fitted=False, centring='sample')"
    )
    assert repr(Whiten("pca", eps=0.1)) == "Whiten('pca', dim=1, correction=0, fitted=False, eps=0.1)"
