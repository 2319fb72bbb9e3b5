"""What a layer's two passes do, written down once: kernels, their tables of words, tensors kept in between.

Python runs a plan with :func:`run`, :mod:`reimpl.functional._node.native` all of a layer in compiled code.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import prod
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from reimpl.optim import _threads

# Words between those that are read and those that all threads write, so that no line of the cache holds both.
_APART = (0,) * 8


class Address(NamedTuple):
    """A word: where a tensor's numbers lie, or 0 without the tensor."""

    tensor: int


class Number(NamedTuple):
    """A word: one of the doubles that a call is given beside its tensors."""

    number: int


class Scratch:
    """A word: the address of so many others, all 0, for the length of a call; several words can share one."""

    def __init__(self, words: int) -> None:
        self.words = words


class Room(Scratch):
    """The same, not cleared."""


class Constants:
    """A word: the address of others, whose values are given."""

    def __init__(self, words: Iterable[int]) -> None:
        self.words = array("q", words)


class Share(Enum):
    """A word of work that is done number by number: how many numbers the first tensor has, and how many of them a
    thread takes at once."""

    COUNT, BLOCK = range(2)


class _Counters:
    pass


COUNTERS = _Counters()
"""A word: the address of two counters of one launch, at 0, that its threads share."""

Word = int | Address | Number | Scratch | Constants | Share | _Counters


class Launch(NamedTuple):
    """A kernel's call on so many threads, with a table of its own or, without ``words``, that of the one before."""

    kernel: int
    words: Sequence[Word] | None
    threads: int


Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """Kernels that run one after the other, and the table that holds the words of all.

    Args:
        launches: kernels, the places of their words, and their threads.
        words: the table, in which the pairs put other words at their places:
        addresses: of tensors, by number.
        inside: of other words, by place.
        rooms: of words that are not cleared, by place among these.
        numbers: doubles given with the call.
        shares: for work number by number, the values of a :class:`Share`.
        room: how many words are not cleared.
        grain: work number by number: the fewest numbers that another thread is woken for; otherwise 0.
    """

    launches: tuple[tuple[int, int, int], ...]
    words: array[int]
    addresses: Pairs
    inside: Pairs
    rooms: Pairs
    numbers: Pairs
    shares: Pairs
    room: int
    grain: int


def step(*launches: Launch, grain: int = 0) -> Step:
    """The step of some launches."""
    table: list[int] = []
    calls: list[tuple[int, int, int]] = []
    found: dict[type, list[tuple[int, int]]] = {kind: [] for kind in (Address, Number, Room, Share)}
    beyond: dict[Scratch | Constants, list[int]] = {}
    counters: list[int] = []
    for kernel, words, threads in launches:
        calls.append((kernel, calls[-1][1] if words is None else len(table), threads))
        for at, word in enumerate(words or (), len(table)):
            if isinstance(word, (Address, Number)):
                found[type(word)].append((at, word[0]))
            elif isinstance(word, Share):
                found[Share].append((at, word.value))
            elif isinstance(word, (Scratch, Constants)):
                beyond.setdefault(word, []).append(at)
            elif isinstance(word, _Counters):
                counters.append(at)
            table.append(word if isinstance(word, int) else 0)
    inside: list[tuple[int, int]] = []
    room = 0
    for held, places in beyond.items():
        if isinstance(held, Room):
            found[Room].extend((at, room) for at in places)
            room += held.words
            continue
        inside.extend((at, len(table)) for at in places)
        table.extend(held.words if isinstance(held, Constants) else (0,) * held.words)
    for at in counters:
        table.extend(_APART)
        inside.append((at, len(table)))
        table.extend((0, 0))
    pairs = (tuple(found[Address]), tuple(inside), tuple(found[Room]), tuple(found[Number]), tuple(found[Share]))
    return Step(tuple(calls), array("q", table), *pairs, room, grain)


_DOUBLE, _WORD = Struct("d"), Struct("q")


def bits(number: float) -> int:
    """A double's bits as a word."""
    return 0 if number == 0 else _WORD.unpack(_DOUBLE.pack(number))[0]


def number_of(word: int) -> float:
    """The double whose bits a word holds."""
    return _DOUBLE.unpack(_WORD.pack(word))[0]  # type: ignore[no-any-return]


def run(
    step: Step, tensors: Sequence[Tensor | None], given: Iterable[tuple[int, int]] = (), numbers: Sequence[float] = ()
) -> array[int]:
    """Run a step with its tensors and numbers, and with words that only the call knows.

    Returns:
        the table, in which the kernels may have answered.
    """
    table = step.words[:]
    start = table.buffer_info()[0]
    # held until the kernels have run
    space = torch.empty(step.room, dtype=torch.int64, device="cpu") if step.room else None
    for at, place in step.inside:
        table[at] = start + 8 * place
    for at, place in step.rooms:
        table[at] = space.data_ptr() + 8 * place  # type: ignore[union-attr]
    for at, number in step.addresses:
        table[at] = tensors[number].data_ptr()  # type: ignore[union-attr]
    for at, number in step.numbers:
        table[at] = bits(numbers[number])
    for at, word in given:
        table[at] = word
    most = None
    if step.grain:
        count = tensors[0].numel()  # type: ignore[union-attr]
        most = max(1, min(count // step.grain, torch.get_num_threads()))
        # whole registers
        block = -(-count // most // 16) * 16
        for at, what in step.shares:
            table[at] = (count, block)[what]
    for kernel, place, threads in step.launches:
        _threads.run(kernel, start + 8 * place, threads if most is None else most)
    return table


def run_once(kernel: int, words: Sequence[int], threads: int) -> None:
    """Run a kernel with words that only this call knows, behind that of its counters: sooner than making a step."""
    table = array("q", (0, *words, *_APART, 0, 0))
    start = table.buffer_info()[0]
    table[0] = start + 8 * (len(table) - 2)
    _threads.run(kernel, start, threads)


class Layout(NamedTuple):
    """What a tensor is like."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def dense(*sizes: int, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of a contiguous tensor."""
    return Layout(dtype, sizes, tuple(prod(max(s, 1) for s in sizes[d + 1 :]) for d in range(len(sizes))))


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(tensor.dtype, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """A layer for arguments of given layouts: one output, and gradients of those arguments that want them.

    Args:
        arguments: their layouts, ``None`` where there is none. Where the steps work number by number, any dense layout
            of the first one's dtype is done.
        outputs: layouts of the outputs, of which a caller sees the first.
        forward: a step with the arguments and then the outputs as its tensors.
        backward: a step with what is saved, the first output's gradient and the results as its tensors.
        saved: which of the arguments and outputs are kept.
        carried: words of the forward pass that hold doubles, with their places in the backward pass.
        refusal: the word that the forward pass sets where the numbers will not do, 0 if it never does.
        differentiable: the arguments that want gradients, which are the results.
        changed: the arguments that the forward pass writes to.
    """

    arguments: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]
    forward: Step
    backward: Step
    saved: tuple[int, ...]
    carried: Pairs = ()
    refusal: int = 0
    differentiable: tuple[int, ...] = (0,)
    changed: tuple[int, ...] = ()
