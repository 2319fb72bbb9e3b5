"""Notices between two fused steps whether parameters and state are where they were, and reads gradients' addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate, chain
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ._shards import is_cut_alike, is_cut_up, local
from ._walk import Walker, find_walker

PLAIN = {Tensor, Parameter}
"""Classes of tensors whose operators are PyTorch's own."""
_PART = attrgetter("_local_tensor")


def _array(numbers: Sequence[int]) -> Any:
    return np.array(numbers, dtype=np.int64)


def _starts(lengths: Sequence[int]) -> Any:
    return _array([0, *accumulate(lengths)])


class SameItems:
    """A list whose items stay the same objects."""

    def __init__(self, items: Sequence[Any], walker: Walker | None) -> None:
        self.source, self.items = items, list(items)
        self.parts = {"the_list": id(items), "items": _array(list(map(id, items)))}
        self.question = walker.question(**self.parts) if walker is not None and type(items) is list else None

    def hold(self, items: Sequence[Any]) -> bool:
        """Whether ``items`` are those objects, in that order, and no more."""
        if self.question is not None and items is self.source:
            return self.question.holds()
        return len(items) == len(self.items) and all(map(is_, items, self.items))


class SameEntries:
    """Dictionaries whose keys and values stay the same objects, in the same order."""

    def __init__(self, dictionaries: Sequence[Mapping[Any, Any]], walker: Walker | None) -> None:
        self.dictionaries = dictionaries
        self.entries = list(chain.from_iterable(d.items() for d in dictionaries))
        self.values = [value for _, value in self.entries]
        self.parts = {
            "dictionaries": _array(list(map(id, dictionaries))),
            "starts": _starts(list(map(len, dictionaries))),
            "entries": _array(list(map(id, chain.from_iterable(self.entries)))),
        }
        self.plain = all(isinstance(d, dict) for d in dictionaries)
        self.question = walker.question(**self.parts) if walker is not None and self.plain else None

    def hold(self) -> bool:
        """Whether they hold those objects, in that order, and no more."""
        if self.question is not None:
            return self.question.holds()
        now = chain.from_iterable(d.items() for d in self.dictionaries)
        return sum(map(len, self.dictionaries)) == len(self.entries) and all(
            key is k and value is v for (key, value), (k, v) in zip(now, self.entries, strict=True)
        )


class Watch:
    """Parameters of one device and dtype, and their state, as they were when the addresses were taken.

    ``row`` is where the gradients' addresses are written.
    """

    def __init__(
        self, params: list[Tensor], states: Sequence[Mapping[str, Any]], row: Any, walker: Walker | None = None
    ) -> None:
        self.params, self.states, self.row = params, SameEntries(states, walker), row
        self.wholes = [*params, *(v for v in self.states.values if v is not None)]
        self.tensors = list(map(local, self.wholes))
        # held, so that what the addresses point to cannot be freed and its memory given to another tensor
        self.storages = [t.untyped_storage() for t in self.tensors]
        self.places = _array([t.data_ptr() for t in self.tensors])
        self.kinds = [(p.shape, p.stride(), p.data_ptr(), p.nbytes) for p in self.tensors[: len(params)]]

    def holds(self) -> bool:
        """Whether the state is the same objects as before, and all tensors lie where they lay.

        To be asked after ``gradients``, which may have looked at the parameters already.
        """
        return self.states.hold() and [t.data_ptr() for t in self.tensors] == self.places.tolist()

    def unchanged(self) -> bool:
        """``holds`` and ``gradients`` at little cost; ``False``, too, where those would have to tell."""
        return False

    def gradients(self) -> list[Tensor] | None:
        """Write the gradients' addresses to the row: 0 where there is none, 1 for an empty one.

        Returns:
            Copies in the parameters' strides, where a gradient has others; they must live until the step is done. Or
            ``None``, where the kernel cannot read a gradient: it is sparse, of another dtype or of another class, or
            has not the shape that the parameter had, or lies in the parameter's own memory. (That it lies
            on the parameter's device, ``Tensor.grad`` itself sees to; of the shape, only when it is set.)
        """
        copies: list[Tensor] = []
        for i, ((p, g), (shape, strides, place, size)) in enumerate(zip(self.pairs(), self.kinds, strict=True)):
            if g is None:
                self.row[i] = 0
                continue
            if p.shape != shape or p.stride() != strides or not _plain(g, p):
                return None
            address, is_turned = g.data_ptr(), g.stride() != strides
            if abs(address - place) < size:
                return None
            if is_turned:
                g = torch.empty_like(p).copy_(g)
                copies.append(g)
                address = g.data_ptr()
            self.row[i] = address or 1
        return copies

    def pairs(self) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Each parameter and its gradient, as far as they lie in this process."""
        return ((p, p.grad) for p in self.params)

    def count_change(self) -> None:
        """Tell autograd that the parameters were changed whose gradient's address is in the row."""
        params = self.params if self.row.all() else [self.params[i] for i in self.row.nonzero()[0].tolist()]
        torch.autograd.graph.increment_version(params)


class ShardWatch(Watch):
    """The same of ``DTensor``s: what lies in this process."""

    def __init__(
        self, params: list[Tensor], states: Sequence[Mapping[str, Any]], row: Any, walker: Walker | None = None
    ) -> None:
        super().__init__(params, states, row, walker)
        self.cut_up = [t for t in self.wholes if is_cut_up(t)]
        self.parts = list(map(_PART, self.cut_up))

    def holds(self) -> bool:
        return all(map(is_, map(_PART, self.cut_up), self.parts)) and super().holds()

    def pairs(self) -> Iterable[tuple[Tensor, Tensor | None]]:
        kind = type(self.params[0])
        for p in self.params:
            g = p.grad
            # a gradient that is cut in another way stays whole, and the kernel cannot read it
            yield _PART(p), _PART(g) if type(g) is kind and is_cut_alike(g, p) else g

    def count_change(self) -> None:
        super().count_change()
        torch.autograd.graph.increment_version([self.tensors[i] for i in self.row.nonzero()[0].tolist()])


def _plain(g: Tensor, p: Tensor) -> bool:
    return type(g) in PLAIN and g.dtype == p.dtype and not g.is_sparse and not g.is_neg() and g.shape == p.shape


class CompiledWatch(Watch):
    """The same, asked in compiled loops; what those cannot tell, Python does."""

    def __init__(self, params: list[Tensor], states: Sequence[Mapping[str, Any]], row: Any, walker: Walker) -> None:
        super().__init__(params, states, row, walker)
        handles, storages = walker.handles(self.tensors), [s._cdata for s in self.storages]
        bodies, sizes = [t._cdata for t in self.tensors], [t.nbytes for t in self.tensors]
        where = np.stack([handles, _array(bodies), _array(storages), self.places, _array(sizes)])
        own, rest = (np.ascontiguousarray(part) for part in np.split(where, [len(params)], axis=1))
        forms = [[*p.shape, *p.stride()] for p in params]
        gradients = {
            "params": own,
            "form_starts": _starts(list(map(len, forms))),
            "forms": _array(list(chain.from_iterable(forms))),
            "room": np.zeros((3, len(params)), dtype=np.int64),
            "marks": walker.marks(len(params)),
            "row": row,
            **walker.kind(params[0]),
        }
        self.of_gradients, self.of_rest, self.of_all = (
            walker.question(**parts) for parts in (gradients, {"where": rest}, {"where": where})
        )
        self.at_once = walker.question(**gradients, where=rest, **self.states.parts) if self.states.plain else None
        self.read = False
        """Whether the gradients were last read in compiled loops, which found the parameters in their places."""

    def unchanged(self) -> bool:
        self.read = self.at_once is not None and self.at_once.holds()
        return self.read

    def holds(self) -> bool:
        return self.states.hold() and (self.of_rest if self.read else self.of_all).holds()

    def gradients(self) -> list[Tensor] | None:
        self.read = self.of_gradients.holds()
        return [] if self.read else super().gradients()

    def count_change(self) -> None:
        if self.read:
            self.of_gradients.count_change()
        else:
            super().count_change()


def watch(params: list[Tensor], states: Sequence[Mapping[str, Any]], row: Any) -> Watch:
    """Watch parameters of one device and dtype and their states; gradients' addresses go to the row."""
    found = walker()
    if is_cut_up(params[0]):
        return ShardWatch(params, states, row, found)
    return Watch(params, states, row) if found is None else CompiledWatch(params, states, row, found)


@cache
def walker() -> Walker | None:
    """The compiled loops, or ``None`` where there are none, or where they do not say what Python says."""
    found = find_walker()
    return found if found is not None and _agrees(found) else None


def _agrees(walker: Walker) -> bool:
    """Whether compiled loops and Python say the same of tensors of several forms, as they are and after changes."""
    shapes = [(), (3,), (2, 3), (0,), (4, 1, 2), (2, 3)]
    params = [torch.zeros(shape, device="cpu").requires_grad_() for shape in shapes]
    params[-1] = torch.zeros(3, 2, device="cpu").t().requires_grad_()
    for p in params[1:]:
        p.grad = torch.empty_like(p)
    rows = [np.zeros(len(params), dtype=np.int64) for _ in range(2)]
    watches = Watch(params, [], rows[0]), CompiledWatch(params, [], rows[1], walker)

    def alike(holds: bool, readable: bool) -> bool:
        for each in watches:
            each.gradients()
        if not (watches[1].read == readable and [each.holds() for each in watches] == [holds, holds]):
            return False
        if watches[1].unchanged() != (holds and readable):
            return False
        for each, row in zip(watches, rows, strict=True):
            versions = [p._version for p in params]
            each.count_change()
            if [p._version - v for p, v in zip(params, versions, strict=True)] != [int(x != 0) for x in row]:
                return False
        return not readable or bool((rows[0] == rows[1]).all())

    if not alike(holds=True, readable=True):
        return False
    params[1].grad = None
    if not alike(holds=True, readable=True):
        return False
    params[2].grad = torch.empty(3, 2, device="cpu").t()
    if not alike(holds=True, readable=False):
        return False
    params[2].grad = torch.empty(2, 3, device="cpu")._neg_view()
    if not alike(holds=True, readable=False):
        return False
    params[2].grad = None
    params[1].data = torch.zeros(3, device="cpu")
    return alike(holds=False, readable=False)
