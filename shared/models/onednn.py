"""Frozen linear layers whose float32 products oneDNN computes.

On a CPU torch gives float32 products to MKL, which keeps to AVX2 kernels on processors other than
Intel's. oneDNN, which torch brings along and uses for bfloat16, has AVX-512 kernels for all of
them: on an AMD EPYC it was measured at 2.1 to 2.3 times MKL's speed, on an Intel Xeon at 0.9 to
1.1. It sums in another order: results are the same up to rounding, not to the bit. Weights stay as
they are; nothing is kept beside them.

Dimension letters: K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from shared.errors import InvalidInputError


class OneDnnLinear(nn.Linear):
    """A linear layer by oneDNN while its weights are frozen, else as ever."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., K] to [..., N]."""
        if not applies(input, self.weight, self.bias):
            return super().forward(input)
        return _linear(input, self.weight, self.bias)


class OneDnnConv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight lies the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., K] to [..., N]."""
        if not applies(x, self.weight, self.bias):
            output: torch.Tensor = super().forward(x)
            return output
        return _linear(x, self.weight.T, self.bias)


_CLASSES = {nn.Linear: OneDnnLinear, Conv1D: OneDnnConv1D}


def use_onednn(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Lets oneDNN compute the plain linear layers of a module, in place.

    Quantised layers stay as they are, and so does a layer for as long as it is trained itself.

    Raises:
        InvalidInputError: If they are not in float32 on a CPU, there are none, or torch has no
            oneDNN.
    """
    plain = _plain(module)
    if reason := _why_not(plain, dtype, device):
        raise InvalidInputError(f"onednn: {reason}")
    for layer in plain:
        # By class, so that copies, PEFT's wrappers and saved names stay those of the same layer.
        layer.__class__ = _CLASSES[type(layer)]


def can_use_onednn(module: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`use_onednn` has something to do here, and can."""
    return not _why_not(_plain(module), dtype, device)


def _plain(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if type(layer) in _CLASSES]


def _why_not(plain: list[nn.Module], dtype: torch.dtype, device: torch.device) -> str:
    if dtype != torch.float32 or device.type != "cpu":
        return f"it is for float32 on a CPU, not {dtype} on {device}: leave it out"
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    return "" if plain else "there is no plain linear layer; are they quantised?"


def product(
    input: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> Any:
    """``input [..., K] @ weight^T + bias`` without a graph; ``weight`` may be a transposed view."""
    # What torch.compile makes of a linear layer with frozen weights.
    return torch.ops.mkldnn._linear_pointwise(input, weight_NK, bias_N, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_NK)
        output: torch.Tensor = product(input, weight_NK, bias_N)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight_NK,) = ctx.saved_tensors
        return product(grad, weight_NK.T), None, None


def _linear(
    input: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
) -> torch.Tensor:
    if torch.is_grad_enabled() and input.requires_grad:
        output: torch.Tensor = _FrozenLinear.apply(input, weight_NK, bias_N)
    else:
        output = product(input, weight_NK, bias_N)
    return output


def applies(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN computes a layer's product with this input, now."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return (
        not (trained and torch.is_grad_enabled())
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and input.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )
