"""Lightning's ``Trainer`` and Hugging Face's ``accelerate`` drive ours as they drive PyTorch's."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from parity_tests.optim_cases import TECHNIQUES
from parity_tests.twins import EXECUTIONS, RICH, batch, small_model
from reimpl.testing.declarations import OptimizerTechnique
from reimpl.testing.optimizers import IMPLEMENTATIONS
from reimpl.testing.tolerance import bits_equal

pytestmark = pytest.mark.slow
executions = pytest.mark.parametrize("execution", EXECUTIONS)
BATCHES = 6


def _loader() -> DataLoader[Any]:
    x, y = (torch.cat(rows) for rows in zip(*(batch(step) for step in range(BATCHES))))
    return DataLoader(TensorDataset(x, y), batch_size=4)


def _hold(ours: nn.Module, theirs: nn.Module, execution: str) -> None:
    start = small_model().state_dict()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert not any(bits_equal(q, value) for key, value in start.items() if name.endswith(key)), (
            "nothing was trained"
        )
        if execution == "fused":
            torch.testing.assert_close(p, q)  # its default rtol: a dozen steps, each within a few ulp
        else:
            assert bits_equal(p, q), name


@executions
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_lightning(technique: OptimizerTechnique, execution: str, tmp_path: Path) -> None:
    """Accumulated and clipped gradients, a schedule, a checkpoint in the middle, and a second trainer that resumes."""
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is in the extra test")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, cls: Any, flags: dict[str, Any]) -> None:
            super().__init__()
            self.net, self.cls, self.flags = small_model(), cls, flags

        def training_step(self, rows: Any, index: int) -> torch.Tensor:
            return (self.net(rows[0]) - rows[1]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = self.cls(self.parameters(), **RICH[technique.name], **self.flags)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    def fit(module: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning advises on workers, loggers and devices
            trainer = pl.Trainer(
                accelerator="cpu", devices=1, max_epochs=epochs, accumulate_grad_batches=2, gradient_clip_val=0.5,
                default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
                enable_checkpointing=False, barebones=False,
            )  # fmt: skip
            trainer.fit(module, _loader(), ckpt_path=resume, weights_only=True if resume else None)
        return trainer

    modules = []
    for cls, flags in ((technique.ours, execution), (technique.torch, "forloop")):
        first = Module(cls, dict(IMPLEMENTATIONS[flags]))
        path = tmp_path / f"{len(modules)}.ckpt"
        fit(first, tmp_path, 2).save_checkpoint(path)
        second = Module(cls, dict(IMPLEMENTATIONS[flags]))
        trainer = fit(second, tmp_path, 4, resume=path)
        (optimizer,) = trainer.optimizers
        assert type(optimizer) is cls and optimizer.param_groups[0]["lr"] == RICH[technique.name]["lr"] / 2**4
        modules.append(second)
    _hold(*modules, execution)


def _epoch(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, scheduler: Any) -> None:
    for x, y in loader:
        with accelerator.accumulate(model):
            optimizer.zero_grad()
            accelerator.backward((model(x) - y).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()


@executions
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_accelerate(technique: OptimizerTechnique, execution: str, tmp_path: Path) -> None:
    """``prepare``, accumulation, clipping, a prepared schedule, and ``save_state`` and ``load_state`` in the middle."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is in the extra test")
    models = []
    for cls, flags in ((technique.ours, execution), (technique.torch, "forloop")):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = small_model()
        optimizer = cls(model.parameters(), **RICH[technique.name], **IMPLEMENTATIONS[flags])
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        prepared = accelerator.prepare(model, optimizer, _loader(), scheduler)
        _epoch(accelerator, *prepared)
        accelerator.save_state(str(tmp_path / flags))
        _epoch(accelerator, *prepared)
        after = copy.deepcopy(model.state_dict())
        accelerator.load_state(str(tmp_path / flags))
        _epoch(accelerator, *prepared)
        assert all(bits_equal(model.state_dict()[key], value) for key, value in after.items()), "resumed to other bits"
        assert type(prepared[1].optimizer) is cls
        models.append(model)
    _hold(*models, execution)
