"""Recurrent cells as modules."""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from reimpl import functional as F
from reimpl import init
from reimpl.nn._recorded import one_node


class _Cell(Module):
    __constants__: ClassVar[list[str]] = ["input_size", "hidden_size", "bias"]
    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, chunks: int, device: Any = None, dtype: Any = None
    ) -> None:
        Module.__init__(self)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias

        def parameter(*shape: int) -> Parameter:
            return Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight_ih = parameter(chunks * hidden_size, input_size)
        self.weight_hh = parameter(chunks * hidden_size, hidden_size)
        for name in ("bias_ih", "bias_hh"):
            self.register_parameter(name, parameter(chunks * hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size))."""
        bound = 1 / sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for parameter in self.parameters():
            init.uniform_(parameter, -bound, bound)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")

    def _zeros(self, input: Tensor) -> Tensor:
        return torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is True else f", bias={self.bias}")


class RNNCell(_Cell, torch.nn.RNNCell):  # type: ignore[misc]
    """:func:`reimpl.functional.rnn_tanh_cell`, or ``rnn_relu_cell``, with its weights.

    Args:
        input_size, hidden_size: sizes.
        bias: whether there are biases.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters.

    Called with an input of shape (N, input_size) or (input_size) and a hidden state (zeros if left out), it returns
    the next hidden state.

    Source: F14; N2. PyTorch: :class:`torch.nn.RNNCell`.
    """

    __constants__: ClassVar[list[str]] = [*_Cell.__constants__, "nonlinearity"]  # type: ignore[misc]
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype)
        self.nonlinearity = nonlinearity

    @one_node
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        self._check_input(input)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        cell = F.rnn_tanh_cell if self.nonlinearity == "tanh" else F.rnn_relu_cell
        batch = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            hx = self._zeros(batch)
        elif input.dim() == 1:
            hx = hx.unsqueeze(0)
        output = cell(batch, hx, *self._weights())
        return output if input.dim() == 2 else output.squeeze(0)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity}")


class LSTMCell(_Cell, torch.nn.LSTMCell):  # type: ignore[misc]
    """:func:`reimpl.functional.lstm_cell` with its weights.

    Args:
        input_size, hidden_size: sizes.
        bias: whether there are biases.
        device, dtype: of the parameters.

    Called with an input of shape (N, input_size) or (input_size) and a pair (h, c) (zeros if left out), it returns the
    next pair.

    Source: F14; N2. PyTorch: :class:`torch.nn.LSTMCell`.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype)

    @one_node
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        self._check_input(input)
        for i, state in enumerate(hx or ()):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{i}] to be 1D or 2D, got {state.dim()}D instead")
        batch = input if input.dim() == 2 else input.unsqueeze(0)
        if hx is None:
            zeros = self._zeros(batch)
            hx = (zeros, zeros)
        elif input.dim() == 1:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        hidden, cell = F.lstm_cell(batch, hx, *self._weights())
        return (hidden, cell) if input.dim() == 2 else (hidden.squeeze(0), cell.squeeze(0))
