"""The training loss and its gradients in one pass over the head, without the logits of a batch.

The ordinary way makes float32 logits of every position, a log-softmax of the same size and, in the
backward, both of their gradients; positions whose label is ignored are computed and thrown away.
Here only the positions that count reach the head, and they do with a block of the vocabulary at a
time, as attention that keeps to the cache goes over its keys (Milakov and Gimelshein,
arXiv:1805.02867; Dao et al., arXiv:2205.14135): a block's logits become exponentials relative to
the largest logit so far and are multiplied by the block's rows of the head, while all of them lie
in the processor's cache; a sum is scaled when a larger logit is found. The gradient of the cross
entropy with respect to what the head was given is that sum over the sum of exponentials, less the
label's row.

N positions, K of them with a label that counts, C of one chunk, D model dimension, V vocabulary,
B words of one block.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from shared.errors import InvalidInputError
from shared.models.onednn import OneDnnLinear, applies, product
from shared.models.single_row import SpreadLinear

IGNORED = -100
"""The label of positions that have no loss."""

CHUNK_ROWS = 1024
"""Most positions at a time: the head's rows are read anew for each chunk."""

VOCABULARY_BLOCK = 1024
"""Words at a time on a CPU: 4 MiB of logits and, at 768 dimensions, 3 MiB of the head. Elsewhere it
is the whole vocabulary, since a device wants much work at a time."""

# What families that change the head's logits call it in their configuration; None and 1 change
# nothing.
_LOGIT_CHANGES = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier_scale",
)


def with_fused_loss(full_class: Any) -> Callable[..., Any]:
    """A ``forward`` for a ``…ForCausalLM`` class, with its signature.

    In training mode with ``labels`` the output has ``logits=None``. In evaluation mode, without
    labels, with ``logits_to_keep``, under autocast, or if the logits are not just what a plain
    linear head makes (see :func:`can_fuse`), it is the class's own forward.

    Args:
        full_class: The family's class.
    """
    ordinary = full_class.forward
    signature = inspect.signature(ordinary)

    @functools.wraps(ordinary)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(signature.bind(self, *args, **kwargs).arguments)
        del inputs["self"]
        inputs |= inputs.pop("kwargs", {})
        if self.training and inputs.get("labels") is not None and can_fuse(self, inputs):
            return _fused_forward(self, **inputs)
        return ordinary(self, *args, **kwargs)

    return forward


def can_fuse(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a call's loss is the cross entropy of a plain linear head's own output.

    It is not with a quantised head, or one that PEFT has wrapped or somebody has hooked, with
    logits that are scaled or capped, or with another loss function.

    Args:
        model: The family's ``…ForCausalLM``.
        inputs: The call's arguments by name.
    """
    head = model.get_output_embeddings()
    return (
        type(head) in (nn.Linear, OneDnnLinear, SpreadLinear)
        and not (head._forward_hooks or head._forward_pre_hooks)
        and all(getattr(model.config, name, None) in (None, 1) for name in _LOGIT_CHANGES)
        and model.loss_function is ForCausalLMLoss
        and isinstance(keep := inputs.get("logits_to_keep", 0), int)
        and keep == 0
        and not torch.is_autocast_enabled(head.weight.device.type)
    )


def fused_linear_cross_entropy(
    hidden_ND: torch.Tensor,
    head: nn.Linear,
    labels_N: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
) -> torch.Tensor:
    """Cross entropy of ``head(hidden)``; its gradients are computed at once.

    Args:
        hidden_ND: What the head is given.
        head: With or without a bias.
        labels_N: Of the same positions, already shifted.
        num_items: What the sum is divided by; None takes the mean over labels that count.
        ignore_index: The label that does not count.

    Returns:
        A float32 scalar; NaN if no label counts and ``num_items`` is None, as torch's mean is.

    Raises:
        InvalidInputError: If a label is no word of the head's.
    """
    kept_K = (labels_N != ignore_index).nonzero().squeeze(1)
    outside = (found_K := labels_N[kept_K])[(found_K < 0) | (found_K >= len(head.weight))]
    if len(outside):
        raise InvalidInputError(
            f"label {int(outside[0])}: accepted are 0 to {len(head.weight) - 1}, and "
            f"{ignore_index} for what has no loss"
        )
    by_onednn = isinstance(head, OneDnnLinear) and applies(hidden_ND, head.weight, head.bias)
    total = _SummedLoss.apply(hidden_ND, head.weight, head.bias, labels_N, kept_K, by_onednn)
    divisor = len(kept_K) if num_items is None else num_items
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.to(total.device)
    loss: torch.Tensor = total / divisor
    return loss


@can_return_tuple  # type: ignore[untyped-decorator]
def _fused_forward(
    model: Any,
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    logits_to_keep: int = 0,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    outputs = model.base_model(**inputs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden_ND = outputs.last_hidden_state.flatten(0, -2)
    labels_N = shift_labels.reshape(-1).to(hidden_ND.device)
    head = model.get_output_embeddings()
    return CausalLMOutputWithPast(
        loss=fused_linear_cross_entropy(
            hidden_ND, head, labels_N, num_items_in_batch, ignore_index
        ),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


class _SummedLoss(torch.autograd.Function):
    """The sum over positions, so that whoever divides it also divides its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        kept_K: torch.Tensor,
        by_onednn: bool,
    ) -> torch.Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        # Sums over chunks are made in float32, whatever the model is in.
        grad_hidden_ND = torch.zeros_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if for_weight else None
        grad_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if for_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        # Chunks of one size: a small last one would be the slowest.
        for rows_C in kept_K.chunk(max(1, math.ceil(len(kept_K) / CHUNK_ROWS))):
            if not len(rows_C):
                continue
            hidden_CD, labels_C = hidden_ND[rows_C], labels_N[rows_C]
            chunk = _Chunk(hidden_CD, labels_C, by_onednn)
            chunk.run(weight_VD, bias_V, with_grad=for_hidden, keep=for_weight or for_bias)
            total += chunk.loss()
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows_C] = chunk.hidden_grad(weight_VD).to(hidden_ND.dtype)
            chunk.add_weight_grads(grad_weight_VD, grad_bias_V)
        ctx.nothing_counts = not len(kept_K)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, weight_VD.dtype)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.nothing_counts:
            grad = torch.zeros_like(grad)  # a mean over nothing has divided by zero
        # Not in place, so that a graph that is retained can be run again.
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


class _Chunk:
    """Positions whose loss and gradients are summed up over the vocabulary, block by block."""

    def __init__(self, hidden_CD: torch.Tensor, labels_C: torch.Tensor, by_onednn: bool) -> None:
        self._hidden_CD, self._labels_C, self._by_onednn = hidden_CD, labels_C, by_onednn
        self._weighted_CD = torch.zeros_like(hidden_CD, dtype=torch.float32)
        self._sum_C = self._weighted_CD.new_zeros(len(hidden_CD))
        self._at_label_C = torch.zeros_like(self._sum_C)
        # Not minus infinity, from which a word that is ruled out by its bias could not be told.
        self._largest_C = torch.full_like(self._sum_C, torch.finfo(torch.float32).min)
        self._kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def run(
        self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, with_grad: bool, keep: bool
    ) -> None:
        """Goes over the vocabulary.

        Args:
            weight_VD: The head's.
            bias_V: The head's, if it has one.
            with_grad: For :meth:`hidden_grad`.
            keep: For :meth:`add_weight_grads`, which needs every block's exponentials.
        """
        block = VOCABULARY_BLOCK if weight_VD.device.type == "cpu" else len(weight_VD)
        for first in range(0, len(weight_VD), block):
            weight_BD = weight_VD[first : first + block]
            bias_B = None if bias_V is None else bias_V[first : first + block]
            logits_CB = _logits(self._hidden_CD, weight_BD, bias_B, self._by_onednn)
            self._note_labels(logits_CB, first)
            exponentials_CB = self._exponentials(logits_CB)
            if with_grad:
                _add_product(self._weighted_CD, exponentials_CB, weight_BD, self._by_onednn)
            if keep:
                self._kept.append((first, exponentials_CB, self._largest_C))

    def loss(self) -> torch.Tensor:
        """The cross entropy's sum over the positions."""
        loss: torch.Tensor = (self._largest_C + self._sum_C.log() - self._at_label_C).sum()
        return loss

    def hidden_grad(self, weight_VD: torch.Tensor) -> torch.Tensor:
        """That sum's gradient [C, D] in float32 with respect to what the head was given."""
        mean_CD = self._weighted_CD.div_(self._sum_C[:, None])
        return mean_CD.sub_(weight_VD[self._labels_C])

    def add_weight_grads(self, weight_VD: torch.Tensor | None, bias_V: torch.Tensor | None) -> None:
        """Adds that sum's gradients with respect to the head's weight and bias."""
        for first, exponentials_CB, largest_C in self._kept:
            words = slice(first, first + exponentials_CB.shape[1])
            # Of exponentials relative to another largest logit: what makes probabilities of them.
            scale_C = (largest_C - self._largest_C).exp_().div_(self._sum_C)
            if weight_VD is not None:
                scaled_CD = (self._hidden_CD * scale_C[:, None]).to(self._hidden_CD.dtype)
                _add_product(weight_VD[words], exponentials_CB.T, scaled_CD)
            if bias_V is not None:
                bias_V[words] += exponentials_CB.T @ scale_C
        if weight_VD is not None:
            weight_VD.index_add_(0, self._labels_C, self._hidden_CD.float(), alpha=-1)
        if bias_V is not None:
            bias_V.index_add_(0, self._labels_C, torch.ones_like(self._sum_C), alpha=-1)

    def _note_labels(self, logits_CB: torch.Tensor, first: int) -> None:
        words = logits_CB.shape[1]
        place_C = self._labels_C - first
        here_C = (place_C >= 0) & (place_C < words)
        found_C = logits_CB.gather(1, place_C.clamp(0, words - 1)[:, None])[:, 0]
        self._at_label_C = torch.where(here_C, found_C, self._at_label_C)

    def _exponentials(self, logits_CB: torch.Tensor) -> torch.Tensor:
        """Makes logits exponentials, in place, and brings the sums to the same largest logit."""
        largest_C = torch.maximum(self._largest_C, logits_CB.amax(1))
        shrunk_C = (self._largest_C - largest_C).exp_()
        self._largest_C = largest_C
        exponentials_CB = logits_CB.sub_(largest_C[:, None]).exp_()
        self._sum_C = torch.addcmul(exponentials_CB.sum(1), self._sum_C, shrunk_C)
        self._weighted_CD *= shrunk_C[:, None]
        return exponentials_CB


def _logits(
    hidden_CD: torch.Tensor,
    weight_BD: torch.Tensor,
    bias_B: torch.Tensor | None,
    by_onednn: bool,
) -> torch.Tensor:
    """The head's output [C, B] in float32."""
    if by_onednn:
        made: torch.Tensor = product(hidden_CD, weight_BD, bias_B)
        return made
    return nn.functional.linear(hidden_CD, weight_BD, bias_B).float()


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, by_onednn: bool = False
) -> None:
    """Adds ``left @ right``, computed in the type of ``right``, to a total in float32."""
    if by_onednn:
        total += product(left, right.T)
    elif right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right
