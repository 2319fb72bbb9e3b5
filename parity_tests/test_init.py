"""Initialisations against PyTorch, bit by bit for the same generator: values, errors, warnings, dtypes and devices."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reimpl.init
from parity_tests.declarations.init import INITS
from parity_tests.oracle import init as oracle
from reimpl.testing import (
    InitTechnique,
    Verdict,
    assert_bitwise,
    bits_equal,
    independence_guard,
    judge,
    names_used,
    seeded_generator,
)

BEFORE_2_12 = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)

each_init = pytest.mark.parametrize("technique", INITS, ids=lambda technique: technique.name)
each_of_pytorch = pytest.mark.parametrize(
    "technique", [row for row in INITS if row.torch is not None], ids=lambda technique: technique.name
)
ALIASES = [name for name in reimpl.init.__all__ if f"{name}_" in reimpl.init.__all__]
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.float8_e4m3fn,
    torch.int64, torch.uint8, torch.bool,
)  # fmt: skip


def takes_generator(technique: InitTechnique) -> bool:
    return "generator" in inspect.signature(technique.ours).parameters


def draw(function: Callable[..., Any], tensor: torch.Tensor, technique: InitTechnique, kwargs: Any) -> torch.Tensor:
    """``tensor`` after ``function``, with a generator of its own where the function takes one."""
    torch.manual_seed(5)  # sparse_ takes its rows from the global generator
    generator = None if tensor.is_meta else seeded_generator(7, technique.name, device=tensor.device)
    result = function(tensor, **kwargs, **({"generator": generator} if takes_generator(technique) else {}))
    assert result is tensor
    return tensor


def skip_where_the_algorithm_is_older(technique: InitTechnique) -> None:
    if technique.name == "trunc_normal_" and BEFORE_2_12:
        pytest.skip("PyTorch inverted the distribution function before 2.12; the distribution is tested")


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_of_pytorch
def test_same_bits_as_pytorch(
    technique: InitTechnique, dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    assert technique.torch is not None
    skip_where_the_algorithm_is_older(technique)
    if dtype not in technique.dtypes:
        pytest.skip("PyTorch has no such factorisation")
    for kwargs in technique.kwargs:
        equal = True
        for shape in technique.shapes:
            ours, theirs = (
                draw(function, torch.full(shape, torch.nan, dtype=dtype, device=device), technique, kwargs)
                for function in (technique.ours, technique.torch)
            )
            equal = equal and bits_equal(ours, theirs)
            case = f"{shape}, {kwargs}, {dtype}"
            if not equal:
                assert_bitwise(ours, theirs, technique=technique.name, case=case, quantity="weight")
        # The distribution itself is the oracle's business: the distance here is from PyTorch's numbers.
        record(
            Verdict(0.0, 0.0, 0.0, 0.0, 0.0, ok=equal, bitwise=equal),
            kind="init",
            technique=technique.name,
            ids=technique.ids,
            case=", ".join(f"{key}={value}" for key, value in kwargs.items()) or "default",
            quantity="weight",
            implementation="eager",
            device=device,
            dtype=dtype,
        )


@pytest.mark.quick
@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_random_walk_scales_normal_numbers(
    dtype: torch.dtype, device: torch.device, record: Callable[..., Verdict]
) -> None:
    """What PyTorch has no counterpart of: the same normal numbers, times the oracle's standard deviation."""
    (technique,) = (row for row in INITS if row.torch is None)
    for kwargs in technique.kwargs:
        for shape in technique.shapes:
            ours = draw(technique.ours, torch.empty(shape, dtype=dtype, device=device), technique, kwargs)
            numbers = draw(reimpl.init.normal_, torch.empty(shape, dtype=dtype, device=device), technique, {})
            exact = numbers.cpu().double().numpy() * technique.oracle(shape, **kwargs)["std"]
            verdict = judge(ours, None, exact, None, dtype)
            record(
                verdict.check(technique.name, f"{shape}, {kwargs}"),
                kind="init",
                technique=technique.name,
                ids=technique.ids,
                case=", ".join(f"{key}={value}" for key, value in kwargs.items()) or "default",
                quantity="weight",
                implementation="eager",
                device=device,
                dtype=dtype,
            )


@each_of_pytorch
def test_global_generator_and_strides(technique: InitTechnique, device: torch.device) -> None:
    assert technique.torch is not None
    skip_where_the_algorithm_is_older(technique)
    shape = (6, 4, 3) if technique.name == "dirac_" else (6, 4)
    for kwargs in technique.kwargs:
        results = []
        for function in (technique.ours, technique.torch):
            torch.manual_seed(3)
            results.append(function(torch.zeros(shape, device=device).transpose(0, 1), **kwargs))
        assert bits_equal(*results)


def outcome(function: Callable[..., Any], make: Callable[[], torch.Tensor], technique: InitTechnique) -> Any:
    """The numbers, or the error's type and words."""
    try:
        return draw(function, make(), technique, technique.kwargs[0])
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_of_pytorch
def test_every_dtype_ends_as_pytorchs(technique: InitTechnique, dtype: torch.dtype, device: torch.device) -> None:
    """In the same numbers or the same error, and more than that where PyTorch has no factorisation."""
    assert technique.torch is not None
    skip_where_the_algorithm_is_older(technique)
    ours, theirs = (
        outcome(function, lambda: torch.zeros(technique.shapes[0], dtype=dtype, device=device), technique)
        for function in (technique.ours, technique.torch)
    )
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor), ours
        assert ours.dtype is dtype and torch.equal(ours, theirs)
    elif technique.name == "orthogonal_" and (dtype.is_complex or dtype in (torch.float16, torch.bfloat16)):
        product = ours.mT.conj().to(torch.complex128) @ ours.to(torch.complex128)
        # Rounded to 8 bits or more, 64 numbers a sum with relative errors below 2^-8: 0.02 is five times what adds up.
        assert float((product - torch.eye(len(product), device=device)).abs().max()) < 0.02
    else:
        assert ours == theirs


@each_of_pytorch
def test_meta_tensors_are_left_as_they_are(technique: InitTechnique) -> None:
    assert technique.torch is not None
    for function in (technique.ours, *([] if BEFORE_2_12 else [technique.torch])):  # 2.11 computes, where it can
        weight = draw(function, torch.empty(technique.shapes[0], device="meta"), technique, technique.kwargs[0])
        assert weight.is_meta and weight.shape == technique.shapes[0]


@each_init
def test_parameters_are_drawn_without_a_graph(technique: InitTechnique, device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.full(technique.shapes[0], torch.nan, device=device))
    version = weight._version
    assert technique.ours(weight, **technique.kwargs[0]) is weight
    assert weight.grad_fn is None and weight.requires_grad and bool(weight.isfinite().all())
    assert weight._version > version  # a graph that had saved the old numbers notices


@each_init
def test_no_rule_calls_pytorchs(technique: InitTechnique) -> None:
    forbidden = ("torch.nn.init.*", "aten::eye*", "aten::nn_*")
    with independence_guard(forbidden) as seen:
        for kwargs in technique.kwargs:
            technique.ours(torch.empty(technique.shapes[0]), **kwargs)
    assert any(name.startswith("aten::") for name in seen), "the guard slept"
    names = names_used(technique.ours)
    assert not [name for name in names if name.startswith("torch.nn.init")] and names


@each_of_pytorch
def test_signature_is_pytorchs_with_dialects_at_the_end(technique: InitTechnique) -> None:
    name = technique.name
    if name.startswith("lecun"):
        pytest.skip("a name of ours")
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (reimpl.init, torch.nn.init))
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.values()]
    assert all(p.default is not p.empty for p in ours.values() if p.kind is p.KEYWORD_ONLY)


def test_every_name_of_pytorchs_is_here() -> None:
    assert set(torch.nn.init.__all__) <= set(reimpl.init.__all__)
    assert len(ALIASES) == 11


@pytest.mark.parametrize("name", ALIASES)
def test_old_names_warn_in_pytorchs_words(name: str) -> None:
    shape, kwargs = ((4, 4, 3), {}) if name == "dirac" else ((4, 6), {})
    kwargs |= {"constant": {"val": 2.0}, "sparse": {"sparsity": 0.5}}.get(name, {})
    results, messages = [], []
    for module in (reimpl.init, torch.nn.init):
        torch.manual_seed(0)
        with pytest.warns(FutureWarning) as caught:
            results.append(getattr(module, name)(torch.empty(shape), **kwargs))
        messages.append([(w.category, str(w.message), w.filename) for w in caught])
    assert bits_equal(*results) and messages[0] == messages[1]


def test_gains() -> None:
    names = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu", "conv2d", "conv_transpose3d")
    for name in names:
        assert reimpl.init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    for slope in (0, 0.2, 1, 5.0):
        ours, theirs = (m.calculate_gain("leaky_relu", slope) for m in (reimpl.init, torch.nn.init))
        assert ours == theirs


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("calculate_gain", ("swish",), {}),
        ("calculate_gain", ("leaky_relu", "steep"), {}),
        ("calculate_gain", ("leaky_relu", True), {}),
        ("kaiming_normal_", (torch.empty(3),), {}),
        ("kaiming_uniform_", (torch.empty(3, 3),), {"mode": "fan_up"}),
        ("kaiming_uniform_", (torch.empty(3, 3),), {"nonlinearity": "swish"}),
        ("xavier_normal_", (torch.empty(()),), {}),
        ("xavier_uniform_", (torch.empty(4),), {}),
        ("normal_", (torch.empty(3), 0.0, -1.0), {}),
        ("uniform_", (torch.empty(3), 1.0, 0.0), {}),
        ("trunc_normal_", (torch.empty(3),), {"std": 0.0}),
        ("trunc_normal_", (torch.empty(3),), {"a": 1.0, "b": -1.0}),
        ("eye_", (torch.empty(3),), {}),
        ("dirac_", (torch.empty(3, 3),), {}),
        ("dirac_", (torch.empty(3, 3, 3), 2), {}),
        ("orthogonal_", (torch.empty(3),), {}),
        ("sparse_", (torch.empty(3, 3, 3), 0.5), {}),
        ("sparse_", (torch.empty(3, 3), 0.5, -1.0), {}),
    ],
)
@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_refuses_what_pytorch_refuses_in_its_words(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn.init, name)(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(reimpl.init, name)(*args, **kwargs)
    if not (BEFORE_2_12 and name == "trunc_normal_"):
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "words"),
    [
        ("lecun_normal_", (torch.empty(3),), {}, "fewer than 2 dimensions"),
        ("lecun_uniform_", (torch.empty(3),), {}, "fewer than 2 dimensions"),
        ("random_walk_", (torch.empty(3),), {}, "fewer than 2 dimensions"),
        ("random_walk_", (torch.empty(3, 0),), {}, r"fan in of at least 1, got shape \(3, 0\)"),
        ("random_walk_", (torch.empty(3, 3),), {"nonlinearity": "tanh"}, "Unsupported nonlinearity tanh"),
        ("kaiming_normal_", (torch.empty(3, 3),), {"fans": (0, 3)}, r"two positive numbers.*got \(0, 3\)"),
        ("xavier_normal_", (torch.empty(3, 3),), {"fans": (1, float("nan"))}, "two positive numbers"),
        ("sparse_", (torch.empty(3, 3), 1.5), {}, "sparsity must be between 0 and 1, got 1.5"),
        ("sparse_", (torch.empty(3, 3), float("nan")), {}, "sparsity must be between 0 and 1, got nan"),
        ("dirac_", (torch.empty(3, 3, 3), 0), {}, "groups must be at least 1, got 0"),
        ("orthogonal_", (torch.empty(3, 3),), {"groups": 2}, "dim 0 must be divisible by groups"),
    ],
)
def test_refuses_more(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    before = args[0].clone()
    with pytest.raises(ValueError, match=words):
        getattr(reimpl.init, name)(*args, **kwargs)
    assert bits_equal(before, args[0])


@pytest.mark.parametrize("name", ["kaiming_normal_", "kaiming_uniform_", "lecun_normal_", "lecun_uniform_"])
def test_no_elements_warns_as_pytorch_does(name: str) -> None:
    messages = []
    for module, function in ((reimpl.init, name), (torch.nn.init, name.replace("lecun", "kaiming"))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(module, function)(torch.empty(0, 3))
        messages.append([(w.category, str(w.message), w.filename) for w in caught])
    assert messages[0] == messages[1] and messages[0]


@pytest.mark.parametrize("kwargs", [{"mean": 9.0}, {"mean": -9.0}, {"mean": 1.0, "std": 0.1, "b": 0.5}])
def test_truncation_far_from_the_mean_warns_as_pytorch_does(kwargs: dict[str, float]) -> None:
    messages = []
    for module in (reimpl.init, torch.nn.init):
        with pytest.warns(UserWarning) as caught:
            module.trunc_normal_(torch.empty(3), **kwargs)
        messages.append([(w.category, str(w.message)) for w in caught])
        assert module is torch.nn.init or caught[0].filename == __file__
    assert messages[0] == messages[1]


def test_bounds_are_kept_as_the_dtype_rounds_them() -> None:
    """-0.1 and 0.1 are no numbers of bfloat16; what rounds to them is within the bounds, what rounds beyond is not."""
    weight = reimpl.init.trunc_normal_(torch.empty(10_000, dtype=torch.bfloat16), std=0.1, a=-0.1, b=0.1)
    assert float(weight.abs().max()) == float(torch.tensor(0.1, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (4, 8, 3, 3)])
def test_orthogonal_fills_what_cannot_be_viewed(shape: tuple[int, ...]) -> None:
    """PyTorch's raises for a channels_last weight; the numbers are those of the contiguous one."""
    weight = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view"):
        torch.nn.init.orthogonal_(weight)
    reimpl.init.orthogonal_(weight, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.init.orthogonal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
    assert torch.equal(weight, plain)


def test_orthogonal_blocks(device: torch.device) -> None:
    """With groups, each block is drawn for itself, in turn, from the same stream."""
    whole = reimpl.init.orthogonal_(
        torch.empty(12, 4, device=device), generator=seeded_generator(0, device=device), groups=3
    )
    generator = seeded_generator(0, device=device)
    for block in whole.chunk(3):
        assert torch.equal(block, torch.nn.init.orthogonal_(torch.empty(4, 4, device=device), generator=generator))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 2, 3), (4, 4)])
def test_orthogonal_is_orthogonal(shape: tuple[int, ...], device: torch.device) -> None:
    weight = reimpl.init.orthogonal_(torch.empty(shape, dtype=torch.float64, device=device), gain=2).flatten(1)
    small = weight if weight.shape[0] <= weight.shape[1] else weight.t()
    # Householder's orthogonality is good to a few n·eps; 1e-13 is 50 times that for n = 9.
    assert float((small @ small.t() - 4 * torch.eye(len(small), device=device)).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_orthogonal_in_low_precision_is_float32_rounded(dtype: torch.dtype, device: torch.device) -> None:
    low, single = (
        reimpl.init.orthogonal_(torch.empty(9, 5, dtype=t, device=device), generator=seeded_generator(0, device=device))
        for t in (dtype, torch.float32)
    )
    assert bits_equal(low, single.to(dtype))


def test_dirac_passes_the_input_on(device: torch.device) -> None:
    x = torch.randn(2, 6, 5, 5, device=device, dtype=torch.float64)  # float32 may be rounded to fewer bits on CUDA
    for groups in (1, 2, 3, 6):
        weight = reimpl.init.dirac_(torch.empty(6, 6 // groups, 3, 3, device=device, dtype=torch.float64), groups)
        assert torch.equal(torch.nn.functional.conv2d(x, weight, padding=1, groups=groups), x)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 1.0])
def test_sparse_counts_zeros_by_column(sparsity: float, device: torch.device) -> None:
    weight = reimpl.init.sparse_(torch.empty(21, 8, device=device), sparsity)
    zeros = (weight == 0).sum(0).tolist()
    assert zeros == [oracle.sparse((21, 8), sparsity)["zeros"]] * 8


def test_the_documentation_names_everything_and_its_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "init.md").read_text(encoding="utf-8")
    missing = [name for name in reimpl.init.__all__ if name not in ALIASES and f"`{name}`" not in text]
    assert not missing
    code, table = re.search(r"```python\n(.*?)```\s+```\n(.*?)```", text, re.DOTALL).groups()
    for other in set(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) - {code}:
        exec(other, {})
    capsys.readouterr()
    exec(code, {})
    # All columns but the last, whose random numbers another processor may draw otherwise.
    printed, shown = (
        [line.rsplit(maxsplit=1)[0] for line in block.splitlines()] for block in (capsys.readouterr().out, table)
    )
    assert printed == shown
