"""Large linear layers of a single row, on all threads.

A token of one text is one row in every layer. MKL, which computes torch's float32 products on a
CPU, multiplies a single row on one thread, whatever their number; reading GPT-2's head alone is a
quarter of such a token's time. Here the outputs are divided among the threads instead. Each output
is the same sum in the same order, and whether its bits are the same on this machine is tried for
each layer before it is used. Small layers stay as they are: what waking the others costs is more
than they save in CPU seconds.

Dimension letters: G groups, K inputs, N outputs.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

LARGE_BYTES = 16 * 1024**2
_ALIGNED = 64  # outputs of a group, so that kernels see blocks where they saw them before


class SpreadLinear(nn.Linear):
    """A linear layer whose single rows are computed on all threads."""

    groups = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., K] to [..., N]."""
        if not _applies(input, self.weight, self.groups):
            return super().forward(input)
        return product(input, self.weight.T, self.bias, self.groups)


class SpreadConv1D(Conv1D):  # type: ignore[misc]
    """GPT-2's linear layer, whose weight lies the other way round."""

    groups = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., K] to [..., N]."""
        if not _applies(x, self.weight, self.groups):
            output: torch.Tensor = super().forward(x)
            return output
        return product(x, self.weight, self.bias, self.groups)


_CLASSES = {nn.Linear: SpreadLinear, Conv1D: SpreadConv1D}


def spread_single_rows(module: nn.Module, large_bytes: int = LARGE_BYTES) -> int:
    """Lets the plain linear layers of a module compute single rows on all threads, in place.

    Args:
        module: Its weights are loaded.
        large_bytes: Bytes of a weight from which it is worth it.

    Returns:
        How many layers do; none with one thread, or elsewhere than in float32 on a CPU.
    """
    groups = torch.get_num_threads()
    found = [m for m in module.modules() if type(m) in _CLASSES and _is_large(m, large_bytes)]
    return sum(_spread(layer, groups) for layer in found) if groups > 1 else 0


def product(
    input: torch.Tensor, weight_KN: torch.Tensor, bias_N: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """``input @ weight + bias`` of a single row [..., K], its outputs divided into groups.

    Args:
        input: One row, of any number of dimensions.
        weight_KN: A view with any strides.
        bias_N: Added, if there is one.
        groups: Computed in parallel; what is left of N comes after them.
    """
    inputs, outputs = weight_KN.shape
    each = outputs // (groups * _ALIGNED) * _ALIGNED
    row_1K, split = input.reshape(1, inputs), groups * each
    of_input, of_output = weight_KN.stride()
    weight_GKN = weight_KN.as_strided(
        (groups, inputs, each), (each * of_output, of_input, of_output), weight_KN.storage_offset()
    )
    row_G1K = row_1K.expand(groups, 1, inputs)
    if bias_N is None:
        first_G1N = torch.bmm(row_G1K, weight_GKN)
        rest_1N = torch.mm(row_1K, weight_KN[:, split:])
    else:
        first_G1N = torch.baddbmm(bias_N[:split].view(groups, 1, each), row_G1K, weight_GKN)
        rest_1N = torch.addmm(bias_N[split:], row_1K, weight_KN[:, split:])
    return torch.cat([first_G1N.view(1, split), rest_1N], dim=1).view(*input.shape[:-1], outputs)


def _applies(input: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    return (
        input.numel() == input.shape[-1]
        and not torch.is_grad_enabled()
        and groups > 1
        and torch.get_num_threads() > 1
        and input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _is_large(layer: nn.Module, large_bytes: int) -> bool:
    weight = layer.get_parameter("weight")
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and weight.nbytes >= large_bytes


def _spread(layer: nn.Module, groups: int) -> bool:
    """Changes a layer if its bits stay the same; tells whether it did."""
    plain, inputs = type(layer), _inputs(layer)
    row = layer.get_parameter("weight").new_empty(1, 1, inputs)  # whatever torch's defaults are
    row.normal_(generator=torch.Generator("cpu").manual_seed(0))
    with torch.inference_mode():
        expected = layer(row)
        # By class, so that copies, PEFT's wrappers and saved names stay those of the same layer.
        layer.__class__ = _CLASSES[plain]
        layer.groups = groups  # type: ignore[assignment]
        same = torch.equal(layer(row), expected)
    if not same:
        layer.__class__ = plain
        del layer.groups
        logger.info("single rows of a layer of %d inputs stay on one thread", inputs)
    return same


def _inputs(layer: nn.Module) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)  # type: ignore[arg-type]
