"""Early stopping: the notes' rule, patience, the best weights, its state; any loop."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from reimpl.strategies import EarlyStopping
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.quick
NAN = float("nan")


def steps_until_stop(stopping: EarlyStopping, values: list[float]) -> int | None:
    return next((i for i, value in enumerate(values) if stopping.step(value)), None)


@pytest.mark.parametrize(
    ("arguments", "values", "stops_at", "best"),
    [
        pytest.param({}, [3, 2, 1, 1.5, 0], 3, 2, id="the notes' rule"),
        pytest.param({}, [3, 2, 2, 2, 2.1], 4, 1, id="a plateau is no rise"),
        pytest.param({"patience": 2}, [3, 2, 2.5, 2.4, 1, 1.5, 1.4, 1.3], 7, 4, id="patience starts anew"),
        pytest.param({"patience": 2}, [3, 4, 4, 2, 1], None, 4, id="borne"),
        pytest.param({"min_delta": 0.5}, [3, 2, 1.7], 2, 1, id="too small a gain is bad"),
        pytest.param({"min_delta": 0.5}, [3, 2.5, 2.4], None, 2, id="exactly the gain asked for is neither"),
        pytest.param({"min_delta": 0.1, "patience": 1}, [2, 2, 2], 2, 0, id="a plateau with min_delta"),
        pytest.param({"mode": "max"}, [0.1, 0.5, 0.4], 2, 1, id="accuracy"),
        pytest.param({"mode": "max", "min_delta": 0.2}, [0.1, 0.5, 0.6], 2, 1, id="accuracy with min_delta"),
        pytest.param({}, [3, NAN, 1], 1, 0, id="NaN is bad"),
        pytest.param({"patience": 1}, [NAN, 2, 1], None, 2, id="NaN first"),
        pytest.param({}, [float("inf"), float("inf"), 3], None, 2, id="infinity is no worse than itself"),
    ],
)
def test_when_it_stops(arguments: dict[str, Any], values: list[float], stops_at: int | None, best: int) -> None:
    stopping = EarlyStopping(**arguments)
    assert steps_until_stop(stopping, values) == stops_at
    assert stopping.stopped == (stops_at is not None)
    assert stopping.best_step == best and stopping.best == values[best]
    assert stopping.steps == (len(values) if stops_at is None else stops_at + 1)


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model(torch.randn(8, 3))


def test_best_weights_come_back(device: torch.device) -> None:
    model, stopping = _model().to(device), EarlyStopping(patience=1)
    seen = []
    for value in (3.0, 1.0, 2.0, torch.tensor(4.0, device=device)):
        _change(model)
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        stopped = stopping.step(value, model)
    assert stopped and not bits_equal(seen[1]["0.weight"], model.state_dict()["0.weight"])
    for _ in range(2):
        stopping.restore(model)
        assert all(bits_equal(value, seen[1][name]) for name, value in model.state_dict().items())
        _change(model)  # what is kept is a copy


def test_state_is_saved_and_loaded() -> None:
    values = [3.0, 1.0, 2.0, 1.5, 0.9, 1.0, 1.1, 1.2]
    whole, model = EarlyStopping(patience=2), _model()
    for cut in range(len(values) - 1):
        stopping, buffer = EarlyStopping(patience=2), io.BytesIO()
        for value in values[: cut + 1]:
            _change(model)
            stopping.step(value, model)
        torch.save(stopping.state_dict(), buffer)
        buffer.seek(0)
        resumed = EarlyStopping(patience=2)
        resumed.load_state_dict(torch.load(buffer, weights_only=True))
        rest = [stopping.step(value) for value in values[cut + 1 :]]
        assert [resumed.step(value) for value in values[cut + 1 :]] == rest and rest[-1]
        assert (resumed.best, resumed.best_step, resumed.steps) == (0.9, 4, 8) == (stopping.best, 4, 8)
    assert steps_until_stop(whole, values) == 7


def test_loaded_weights_are_restored_with_their_versions() -> None:
    model, stopping = _model(), EarlyStopping()
    stopping.step(1.0, model)
    other = EarlyStopping()
    other.load_state_dict(stopping.state_dict())
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    _change(model)
    stopping.step(0.5, model)  # what was loaded is a copy
    other.restore(model)
    assert all(bits_equal(x, expected[name]) for name, x in model.state_dict().items())
    assert other._weights is not None and other._weights._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="weights"):
        other.load_state_dict({"best": 1.0, "best_step": 0, "steps": 1, "bad": 0})
    assert other.best == 1.0


def test_the_training_loss_stops_nothing() -> None:
    """Erratum N0.6: where a network overfits, its training loss falls all the way and the validation loss rises."""
    torch.manual_seed(0)
    x, noise = torch.randn(2, 40, 20), torch.randn(2, 40, 1)
    y = x[:, :, :1] + noise
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    watching_train, watching_dev = EarlyStopping(patience=5), EarlyStopping(patience=5)
    dev_losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[0]), y[0])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            dev_losses.append(float(nn.functional.mse_loss(model(x[1]), y[1])))
        watching_train.step(loss)
        if not watching_dev.stopped:
            watching_dev.step(dev_losses[-1], model)
    assert not watching_train.stopped and watching_train.best_step == 59
    assert watching_dev.stopped and watching_dev.steps < 40
    assert dev_losses[-1] > 1.3 * min(dev_losses)
    watching_dev.restore(model)
    with torch.no_grad():
        best = float(nn.functional.mse_loss(model(x[1]), y[1]))
    assert best == pytest.approx(watching_dev.best, rel=1e-6)


def test_nothing_to_restore() -> None:
    model, stopping = _model(), EarlyStopping()
    with pytest.raises(RuntimeError, match="no weights to restore after 0 steps"):
        stopping.restore(model)
    stopping.step(1.0)
    with pytest.raises(RuntimeError, match="no weights to restore after 1 steps"):
        stopping.restore(model)
    stopping.step(0.5, model)
    stopping.step(0.4)  # a better one without weights: the old ones are no longer the best
    with pytest.raises(RuntimeError, match="call step"):
        stopping.restore(model)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"min_delta": -0.1}, "min_delta must be finite and at least 0, got -0.1"),
        ({"min_delta": NAN}, "min_delta must be finite and at least 0, got nan"),
        ({"mode": "least"}, r"mode must be one of \('min', 'max'\), got 'least'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EarlyStopping(**arguments)


@pytest.mark.parametrize("patience", [NAN, 1.5, float("inf"), "3", None])
def test_patience_is_a_whole_number(patience: Any) -> None:
    with pytest.raises(TypeError, match=f"patience must be an integer of at least 0, got {patience!r}"):
        EarlyStopping(patience=patience)


def test_looks() -> None:
    stopping = EarlyStopping(2)
    assert repr(stopping) == "EarlyStopping(patience=2, min_delta=0.0, mode='min')"
    stopping.step(0.25)
    assert repr(stopping) == "EarlyStopping(patience=2, min_delta=0.0, mode='min'): best 0.25 at step 0 of 1"
