"""A tenant's gradients between two steps, one slot per micro-batch.

A backward *assigns* its micro-batch's slot instead of adding to a sum, and the slots are summed in
the order of their numbers. So a failed backward leaves nothing half added, and the order in which
micro-batches arrive does not change a bit of the result.
"""

from __future__ import annotations

import torch

Gradients = list[torch.Tensor | None]


class GradientSlots:
    """Gradients of a fixed list of parameters, by micro-batch number."""

    def __init__(self) -> None:
        self._slots: dict[int, Gradients] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, micro: int) -> bool:
        return micro in self._slots

    def assign(self, micro: int, gradients: Gradients) -> None:
        """Sets the gradients of one micro-batch."""
        self._slots[micro] = gradients

    def clear(self) -> None:
        """Drops all gradients."""
        self._slots.clear()

    def total(self) -> Gradients:
        """Sums the slots in the order of their numbers; None where no slot has a gradient."""
        ordered = [self._slots[micro] for micro in sorted(self._slots)]
        return [_sum(column) for column in zip(*ordered, strict=True)]

    def norm(self) -> float:
        """2-norm of the sum over all parameters."""
        return global_norm(self.total())


def global_norm(gradients: Gradients) -> float:
    """2-norm over all gradients, as ``torch.nn.utils.clip_grad_norm_`` computes it."""
    norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _sum(column: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    present = [gradient for gradient in column if gradient is not None]
    if not present:
        return None
    total = present[0]
    for gradient in present[1:]:
        total = total + gradient
    return total
