"""The training loss and its gradients in one pass over the head, without the logits of a batch.

The ordinary way makes float32 logits of every position, a log-softmax of the same size and, in the
backward, both of their gradients; positions whose label is ignored are computed and thrown away.
Here only the positions that count reach the head, a chunk of rows at a time in one buffer, which is
logits, then probabilities, then the gradient with respect to the logits. The method is that of
Liger's fused linear cross entropy (arXiv:2410.10989).

A frozen float32 head on a CPU, which is most of a client's step, is gone over with a block of the
vocabulary at a time, as attention that keeps to the cache goes over its keys (Milakov and
Gimelshein, arXiv:1805.02867; Dao et al., arXiv:2205.14135): a block's logits become exponentials
relative to the largest logit so far and are multiplied by the block's rows of the head, while all
of them lie in the processor's cache; the sum is scaled when a larger logit is found. A head that is
trained needs every probability at the end, and in less precision than float32 the difference
between such a sum and the label's row would be lost.

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

IGNORED = -100
"""The label of positions that have no loss."""

CHUNK_ROWS = 512
"""Most positions at a time: a CPU's matrix products want many, memory few."""

ONEDNN_CHUNK_ROWS = 256
"""The same where oneDNN computes them; it does not write into a buffer of ours, and memory that is
not much larger is not asked of the system anew."""

VOCABULARY_BLOCK = 1024
"""Words at a time: 2 MiB of logits and, at 768 dimensions, 3 MiB of the head."""

_OfChunk = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]
"""Of what a chunk's head is given [C, D], its weight, its bias and the labels [C]: the summed loss
and its gradient [C, D]."""

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
        type(head) in (nn.Linear, OneDnnLinear)
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
    total = _summed_loss(hidden_ND, head, labels_N, kept_K)
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


# Logits are the largest thing a client makes; fresh memory for them costs a page fault for every
# 4 KiB at every step. Who takes the buffer has it alone, whatever other threads compute.
_spare_buffers: dict[torch.device, torch.Tensor] = {}


def _take_buffer(count: int, device: torch.device) -> torch.Tensor:
    spare = _spare_buffers.pop(device, None)
    if spare is not None and len(spare) >= count:
        return spare
    return torch.empty(count, dtype=torch.float32, device=device)


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
    ) -> torch.Tensor:
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        # Sums over chunks are made in float32, whatever the model is in.
        grad_hidden_ND = torch.zeros_like(hidden_ND) if for_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if for_weight else None
        grad_bias_V = torch.zeros_like(weight_VD[:, 0], dtype=torch.float32) if for_bias else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        # Chunks of one size: a small last one would be the slowest.
        chunks = kept_K.chunk(max(1, math.ceil(len(kept_K) / CHUNK_ROWS)))
        buffer = _take_buffer(len(chunks[0]) * len(weight_VD), hidden_ND.device)
        for rows_C in chunks:
            hidden_CD = hidden_ND[rows_C]
            # Vocabulary first: for both products the faster way round, and for the weight's
            # gradient the way it lies in memory.
            logits_VC = buffer[: len(weight_VD) * len(rows_C)].view(len(weight_VD), len(rows_C))
            _logits(hidden_CD, weight_VD, bias_V, logits_VC)
            total += _to_gradient(logits_VC, labels_N[rows_C], vocabulary=0)
            if grad_bias_V is not None:
                grad_bias_V += logits_VC.sum(1)
            grad_VC = logits_VC.to(hidden_ND.dtype)
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_VC, hidden_CD)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows_C] = grad_VC.T @ weight_VD
        _spare_buffers[hidden_ND.device] = buffer
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
        return (*scaled, None, None)


class _FrozenSummedLoss(torch.autograd.Function):
    """The same for a frozen head, by a function that makes a chunk's loss and gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        labels_N: torch.Tensor,
        kept_K: torch.Tensor,
        of_chunk: _OfChunk,
        chunk_rows: int,
    ) -> torch.Tensor:
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        total = torch.zeros(())
        for rows_C in kept_K.chunk(max(1, math.ceil(len(kept_K) / chunk_rows))):
            if not len(rows_C):
                continue
            loss, grad_CD = of_chunk(hidden_ND[rows_C], weight_VD, bias_V, labels_N[rows_C])
            total += loss
            grad_hidden_ND[rows_C] = grad_CD
        ctx.nothing_counts = not len(kept_K)
        ctx.save_for_backward(grad_hidden_ND)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_hidden_ND,) = ctx.saved_tensors
        if ctx.nothing_counts:
            grad = torch.zeros_like(grad)
        return grad_hidden_ND * grad, None, None, None, None, None, None


def _by_onednn(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`_blockwise` gives, by oneDNN: its products want the vocabulary whole and last."""
    logits_CV = product(hidden_CD, weight_VD, bias_V)
    loss = _to_gradient(logits_CV, labels_C, vocabulary=1)
    return loss, product(logits_CV, weight_VD.T)


def _blockwise(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions' summed cross entropy and its gradient with respect to what the head is given.

    The gradient is the head's rows weighted by the probabilities, less the label's row.
    """
    weighted_CD = torch.zeros_like(hidden_CD)
    sum_C = weighted_CD.new_zeros(len(hidden_CD))
    at_label_C = torch.zeros_like(sum_C)
    # Not minus infinity, from which a word that is ruled out by its bias could not be told.
    largest_C = torch.full_like(sum_C, torch.finfo(sum_C.dtype).min)
    for first in range(0, len(weight_VD), VOCABULARY_BLOCK):
        weight_BD = weight_VD[first : first + VOCABULARY_BLOCK]
        bias_B = None if bias_V is None else bias_V[first : first + VOCABULARY_BLOCK]
        logits_CB = nn.functional.linear(hidden_CD, weight_BD, bias_B)
        place_C = labels_C - first
        here_C = (place_C >= 0) & (place_C < len(weight_BD))
        found_C = logits_CB.gather(1, place_C.clamp(0, len(weight_BD) - 1)[:, None])[:, 0]
        at_label_C = torch.where(here_C, found_C, at_label_C)
        larger_C = torch.maximum(largest_C, logits_CB.amax(1))
        shrunk_C = (largest_C - larger_C).exp_()
        largest_C = larger_C
        exponentials_CB = logits_CB.sub_(largest_C[:, None]).exp_()
        sum_C = torch.addcmul(exponentials_CB.sum(1), sum_C, shrunk_C)
        weighted_CD.mul_(shrunk_C[:, None]).addmm_(exponentials_CB, weight_BD)
    # In this order, since log(sum) is small beside the largest logit.
    loss = ((largest_C - at_label_C) + sum_C.log()).sum()
    return loss, weighted_CD.div_(sum_C[:, None]).sub_(weight_VD[labels_C])


def _summed_loss(
    hidden_ND: torch.Tensor, head: nn.Linear, labels_N: torch.Tensor, kept_K: torch.Tensor
) -> Any:
    """By the way that is fastest for a head."""
    given = (hidden_ND, head.weight, head.bias, labels_N, kept_K)
    trained = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
    in_float32 = hidden_ND.dtype == head.weight.dtype == torch.float32
    if trained or not in_float32 or hidden_ND.device.type != "cpu" or not hidden_ND.requires_grad:
        return _SummedLoss.apply(*given)
    if isinstance(head, OneDnnLinear) and applies(hidden_ND, head.weight, head.bias):
        return _FrozenSummedLoss.apply(*given, _by_onednn, ONEDNN_CHUNK_ROWS)
    return _FrozenSummedLoss.apply(*given, _blockwise, CHUNK_ROWS)


def _logits(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    out_VC: torch.Tensor,
) -> None:
    """The head's output, transposed, in float32."""
    in_place = hidden_CD.dtype == torch.float32
    out = out_VC if in_place else None
    if bias_V is None:
        made = torch.mm(weight_VD, hidden_CD.T, out=out)
    else:
        made = torch.addmm(bias_V[:, None], weight_VD, hidden_CD.T, out=out)
    if not in_place:
        out_VC.copy_(made)


def _to_gradient(logits: torch.Tensor, labels_C: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Makes logits the gradient of their summed cross entropy, in place; returns that sum.

    Args:
        logits: [V, C] or [C, V].
        labels_C: Of the positions.
        vocabulary: The dimension of V.
    """
    places_C = torch.arange(len(labels_C), device=labels_C.device)
    labelled = (labels_C, places_C) if vocabulary == 0 else (places_C, labels_C)
    at_label_C = logits[labelled]
    largest_C = logits.amax(vocabulary)
    probabilities = torch.softmax(logits, vocabulary, out=logits)
    # The largest probability is exp(largest - logsumexp), and never so small that it is lost.
    logsumexp_C = largest_C - probabilities.amax(vocabulary).log()
    probabilities[labelled] -= 1
    return (logsumexp_C - at_label_C).sum()


def _add_product(total_VD: torch.Tensor, left_VC: torch.Tensor, right_CD: torch.Tensor) -> None:
    if left_VC.dtype == total_VD.dtype:
        total_VD.addmm_(left_VC, right_CD)
    else:
        total_VD += left_VC @ right_CD
