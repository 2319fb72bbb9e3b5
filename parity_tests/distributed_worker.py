"""One of two gloo processes that train together: ours beside PyTorch's under DDP, FSDP2 and a sharded optimizer.

``test_real_distributed.py`` starts both, with a folder, the rank, and the names of the optimizers; each check runs for
each optimizer and implementation, and what went wrong is left in the folder.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from parity_tests.declarations import OPTIMIZERS
from parity_tests.twins import EXECUTIONS, RICH, loss_of, small_model
from reimpl.optim import _fused
from reimpl.testing.optimizer_cases import flags_of
from reimpl.testing.samples import random_tensor, seeded_generator

WORLD = 2
STEPS = 3
RUNS = (("theirs", "forloop"), *(("ours", execution) for execution in EXECUTIONS))
#: ``make(params)`` gives an optimizer; its class and arguments are ``make.func`` and ``make.keywords``.
Make = functools.partial[torch.optim.Optimizer]


def maker(name: str, whose: str, execution: str) -> Make:
    """What makes ours or PyTorch's of a name, with all the state it can have."""
    technique = next(t for t in OPTIMIZERS if t.name == name)
    cls: Any = technique.ours if whose == "ours" else technique.torch
    return functools.partial(cls, **{**RICH[name], **flags_of(technique, execution)})


def runs_of(name: str) -> tuple[tuple[str, str], ...]:
    """Those of :data:`RUNS` that there are of a name."""
    technique = next(t for t in OPTIMIZERS if t.name == name)
    return tuple(run for run in RUNS if run[1] in ("forloop", *technique.implementations))


def chosen(make: Make, model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters that the optimizer takes."""
    return [p for p in model.parameters() if p.dim() == 2 or make.func.__name__ != "Muon"]


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps whose gradients do not depend on how the model is cut up, and are cut up as its parameters are."""
    for step in range(first, last):
        for p in model.parameters():
            whole = random_tensor(p.shape, p.dtype, seeded_generator(step, tuple(p.shape)))
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole
        optimizer.step()


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take up a checkpoint, whatever the number of processes it was written by and is read by."""
    packed = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.load(packed, checkpoint_id=path, no_dist=not dist.is_initialized())
    model.load_state_dict(packed["model"])
    set_optimizer_state_dict(model, optimizer, packed["optimizer"])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _locals(model: nn.Module) -> list[torch.Tensor]:
    return [_local(p) for p in model.parameters()]


class _Tables(nn.Module):
    """Two tables, whose gradients are sparse: of some rows, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tables = nn.ModuleList([nn.Embedding(rows, 3, sparse=True) for rows in (9, 5)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.tables[0](rows) * self.tables[1](rows % 5)
        return product


def _replicated(make: Make) -> DistributedDataParallel:
    """The model of an optimizer, whole in each process."""
    return DistributedDataParallel(_Tables() if make.func.__name__ in SPARSE else small_model())


def _loss(model: nn.Module, step: int) -> torch.Tensor:
    if isinstance(getattr(model, "module", None), _Tables):
        loss: torch.Tensor = model(torch.tensor([step, 2, 2])).square().sum()
        return loss
    return loss_of(model, step)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A few steps, each process with batches of its own."""
    for step in range(STEPS):
        optimizer.zero_grad()
        _loss(model, WORLD * step + dist.get_rank()).backward()
        optimizer.step()


def _everybodys(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values of all processes, one after the other."""
    everybodys: list[Any] = [None] * WORLD
    dist.all_gather_object(everybodys, values)
    return [value for theirs in everybodys for value in theirs]


def _ddp(make: Make, folder: Path) -> list[torch.Tensor]:
    """Each process the whole model, gradients averaged."""
    model = _replicated(make)
    _train(model, make(chosen(make, model)))
    return _everybodys(_locals(model))


def _zero(make: Make, folder: Path) -> list[torch.Tensor]:
    """Each process the state of some parameters, and the whole of it on request."""
    model = _replicated(make)
    optimizer = ZeroRedundancyOptimizer(chosen(make, model), optimizer_class=make.func, **make.keywords)  # type: ignore[arg-type]
    _train(model, optimizer)
    assert type(optimizer.optim) is make.func
    assert 0 < len(optimizer.optim.state) < len(list(model.parameters()))
    optimizer.consolidate_state_dict(to=0)
    values = _everybodys(_locals(model))
    if dist.get_rank() == 0:
        state = optimizer.state_dict()["state"]
        values += [value for i in sorted(state) for _, value in sorted(state[i].items()) if torch.is_tensor(value)]
    return values


def _sharded() -> nn.Module:
    """The small model as ``DTensor``, cut along the rows into uneven parts."""
    model, mesh = small_model(), init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp(make: Make, folder: Path) -> list[torch.Tensor]:
    """Parameters, gradients and state in parts."""
    model = _sharded()
    optimizer = make(chosen(make, model))
    _train(model, optimizer)
    values = _locals(model)
    if optimizer.defaults.get("fused"):
        assert _fused.streams(optimizer), "the parts were not stepped by a kernel"
    for p in model.parameters():
        for key, value in sorted(optimizer.state[p].items()):
            assert isinstance(p, DTensor) and isinstance(value, DTensor) == (value.dim() > 0), key
            values.append(_local(value))
    return values


def _moved(make: Make, folder: Path) -> list[torch.Tensor]:
    """Parts that move to other memory, and gradients that are whole in one step and absent in another."""
    model = _sharded()
    optimizer = make(chosen(make, model))
    step_by_hand(model, optimizer, 0, 2)
    for p in model.parameters():
        assert isinstance(p, DTensor)
        p._local_tensor = p._local_tensor.clone()
    step_by_hand(model, optimizer, 2, 4)
    for p in model.parameters():
        assert isinstance(p, DTensor) and isinstance(p.grad, DTensor)
        p.grad = DTensor.from_local(p.grad.full_tensor(), p.device_mesh, [Replicate()])
    optimizer.step()
    optimizer.step()
    for p in list(model.parameters())[1:]:
        p.grad = None
    optimizer.step()
    step_by_hand(model, optimizer, 4, 5)
    return _locals(model)


def _checkpoint(make: Make, folder: Path) -> list[torch.Tensor]:
    """A distributed checkpoint in the middle, from which a second run goes on; its file and its end are left behind."""
    model = _sharded()
    optimizer = make(chosen(make, model))
    step_by_hand(model, optimizer, 0, STEPS)
    packed = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(packed, checkpoint_id=folder)
    step_by_hand(model, optimizer, STEPS, 2 * STEPS)

    again = _sharded()
    other = make(chosen(make, again))
    load(again, other, folder)
    step_by_hand(again, other, STEPS, 2 * STEPS)
    whole = [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]
    if dist.get_rank() == 0:
        torch.save(whole, folder / "end.pt")
    assert all(map(torch.equal, _locals(model), _locals(again))), "the second run went another way"
    return whole


CHECKS = {"ddp": _ddp, "zero": _zero, "fsdp": _fsdp, "moved": _moved, "checkpoint": _checkpoint}
#: PyTorch's own Adafactor takes no parts of parameters: ours is held to what that does to the whole ones.
SHARDED_BY_OURS_ALONE = ("Adafactor",)
#: Which want sparse gradients: no parameter that is cut up has one.
SPARSE = ("SparseAdam",)


def checks_of(name: str) -> list[str]:
    """The checks that can be made of a name."""
    if name in SPARSE:
        return ["ddp", "zero"]
    return [kind for kind in CHECKS if name not in SHARDED_BY_OURS_ALONE or kind not in ("fsdp", "moved")]


def _unsharded(make: Make) -> list[torch.Tensor]:
    """What :func:`_checkpoint` gives, without its parts."""
    model = small_model()
    step_by_hand(model, make(model.parameters()), 0, 2 * STEPS)
    return _locals(model)


def _compare(kind: str, name: str, folder: Path) -> str:
    """What is wrong with ours: a line for each implementation that failed or parted from PyTorch's."""
    results: dict[tuple[str, str], list[torch.Tensor]] = {}
    wrong, in_parts = "", kind == "checkpoint" and name in SHARDED_BY_OURS_ALONE
    for run in runs_of(name):
        try:
            if in_parts and run == RUNS[0]:
                results[run] = _unsharded(maker(name, *run))
            else:
                results[run] = CHECKS[kind](maker(name, *run), folder / "-".join((name, *run)))
        except Exception:
            wrong += f"{' '.join(run)}: {traceback.format_exc()}\n"
    expected = results.get(RUNS[0])
    if expected is None:
        return wrong  # of PyTorch's own, first
    for (whose, execution), values in results.items():
        for index, (value, theirs) in enumerate(zip(values, expected, strict=True)):
            # fused: assert_close's default rtol, for three to six steps that are each within a few ulp; so for parts
            # whose squares are summed up in another order than the whole's
            tolerance = {} if execution == "fused" or in_parts else {"rtol": 0, "atol": 0}
            try:
                torch.testing.assert_close(value, theirs, **tolerance)
            except AssertionError as error:
                wrong += f"{whose} {execution}, tensor {index}: {error}\n"
    return wrong


def main(folder: Path, rank: int, names: list[str]) -> None:
    """Run all checks for the optimizers of these names and write what is wrong with each to ``<rank>.json``."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    said = {f"{kind} {name}": _compare(kind, name, folder) for name in names for kind in checks_of(name)}
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    os._exit(0)  # a thread that gloo leaves behind now and then aborts the interpreter on its way out
