"""What kind of layer a module is: PyTorch's classes, this package's, and what derives from either."""

from __future__ import annotations

from collections.abc import Collection

from torch.nn import Module

CONVOLUTIONS = frozenset(f"Conv{transpose}{n}d" for transpose in ("", "Transpose") for n in (1, 2, 3))
#: Layers that are affine in their input, with a weight and perhaps a bias.
AFFINE = CONVOLUTIONS | {"Linear", "Bilinear"}
NORMS = frozenset(("_NormBase", "_BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm"))
EMBEDDINGS = frozenset(("Embedding", "EmbeddingBag"))
RECURRENT = frozenset(("RNNBase", "RNNCellBase"))
LSTMS = frozenset(("LSTM", "LSTMCell"))
ATTENTION = frozenset(("MultiheadAttention",))


def is_a(module: Module, names: Collection[str]) -> bool:
    """Whether the module's class, or one that it derives from, is PyTorch's or ours and has one of the names.

    Names, because PyTorch has private classes among them. A stranger of the same name is not meant: its weight may be
    laid out otherwise.
    """
    return any(cls.__name__ in names and cls.__module__.split(".")[0] in _HOMES for cls in type(module).__mro__)


_HOMES = ("torch", "reimpl")
