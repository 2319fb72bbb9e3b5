"""What a layer's two passes do, written down once: kernels, their tables of words, tensors kept in between.

Python runs a plan with :func:`run`, :mod:`reimpl.functional._node.native` all of a layer in compiled code.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
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


class Scratch:
    """A word: the address of so many others, all 0, for the length of a call; several words can share one."""

    def __init__(self, words: int) -> None:
        self.words = words


Word = int | Address | Scratch


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """A kernel and its table: that of two counters' address, two words left free, the words given, and so on.

    ``addresses`` are places of words with the numbers of tensors, ``inside`` with the places of other words.
    """

    kernel: int
    words: array[int]
    addresses: tuple[tuple[int, int], ...]
    inside: tuple[tuple[int, int], ...]
    threads: int
    finish: int = 0
    finish_at: int = 0


def step(kernel: int, words: Sequence[Word], threads: int, finish: int = 0, last: Sequence[Word] = ()) -> Step:
    """The step of a kernel at an address on so many threads, and of one called last, with the words ``last``."""
    given: list[Word] = [0, 0, 0, *words, *last]
    table = [0] * len(given)
    addresses, inside, places = [], [], dict[Scratch, int]()
    for at, word in enumerate(given):
        if isinstance(word, Address):
            addresses.append((at, word.tensor))
        elif isinstance(word, Scratch):
            if word not in places:
                places[word] = len(table)
                table.extend((0,) * word.words)
            inside.append((at, places[word]))
        else:
            table[at] = word
    inside.append((0, len(table) + len(_APART)))
    table.extend((*_APART, 0, 0))
    finish_at = 3 + len(words) if last else 0
    return Step(kernel, array("q", table), tuple(addresses), tuple(inside), threads, finish, finish_at)


def run(step: Step, tensors: Sequence[Tensor | None], given: Sequence[tuple[int, int]] = ()) -> array[int]:
    """Run a step with its tensors, and with words that only the call knows.

    Returns:
        the table, in which the kernel may have answered.
    """
    table = step.words[:]
    start = table.buffer_info()[0]
    for at, place in step.inside:
        table[at] = start + 8 * place
    for at, number in step.addresses:
        table[at] = tensors[number].data_ptr()  # type: ignore[union-attr]
    for at, word in given:
        table[at] = word
    _threads.run(step.kernel, start, step.threads)
    if step.finish:
        _threads.run(step.finish, start + 8 * step.finish_at, 1)
    return table


class Layout(NamedTuple):
    """What a tensor is like."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def dense(*sizes: int, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of a contiguous tensor."""
    return Layout(dtype, sizes, tuple(prod(max(s, 1) for s in sizes[d + 1 :]) for d in range(len(sizes))))


_DOUBLE, _WORD = Struct("d"), Struct("q")


def bits(number: float) -> int:
    """A double's bits as a word."""
    return 0 if number == 0 else _WORD.unpack(_DOUBLE.pack(number))[0]


def number_of(word: int) -> float:
    """The double whose bits a word holds."""
    return _DOUBLE.unpack(_WORD.pack(word))[0]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """A layer for arguments of given layouts; the gradient is that of the first, and the first output's alone is done.

    Args:
        arguments: their layouts, ``None`` where there is none.
        outputs: layouts of the outputs, of which a caller sees the first.
        forward: a step with the arguments and then the outputs as its tensors.
        backward: a step with what is saved, the gradient and the result as its tensors.
        saved: which of the arguments and outputs are kept.
        carried: words of the forward pass that hold doubles, with their places in the backward pass.
        refusal: the word that the forward pass sets where the numbers will not do, 0 if it never does.
    """

    arguments: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]
    forward: Step
    backward: Step
    saved: tuple[int, ...]
    carried: tuple[tuple[int, int], ...] = ()
    refusal: int = 0
