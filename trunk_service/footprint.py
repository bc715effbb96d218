"""How many bytes an autograd graph will hold, measured on a small one of the same model.

What a forward keeps for its backward depends on the family, the attention kernel, the adapter and
dropout. Rather than a formula for each, two tiny forwards are run and what autograd saved is
counted; a cost per token and, for kernels that keep attention weights, per squared length follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_SHORT, _LONG = 8, 16


@dataclass(frozen=True)
class Footprint:
    """Bytes kept by a graph: ``batch * (per_token * T + per_token_squared * T**2)``."""

    per_token: float
    per_token_squared: float

    def graph_bytes(self, batch: int, tokens: int) -> int:
        """Estimated bytes of the graph of a [batch, tokens, D] forward."""
        return round(batch * (self.per_token * tokens + self.per_token_squared * tokens**2))


def measure_footprint(model: Any, hidden_size: int, dtype: torch.dtype) -> Footprint:
    """Measures a model in training mode (callers key the generator: dropout may draw)."""
    short = _saved_bytes(model, _SHORT, hidden_size, dtype)
    long = _saved_bytes(model, _LONG, hidden_size, dtype)
    squared = max(0.0, (long - 2 * short) / (_LONG**2 - 2 * _SHORT**2))
    return Footprint((short - squared * _SHORT**2) / _SHORT, squared)


def _saved_bytes(model: Any, tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = (tensor._values() if tensor.is_sparse else tensor).untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: its node would hold it, and it the node, out of gc's sight.
        return tensor.detach()

    device = next(model.parameters()).device
    hidden = torch.zeros(1, tokens, hidden_size, dtype=dtype, device=device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        output = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        del output
    return sum(saved.values())
