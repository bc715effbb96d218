"""What a forward's and a backward's tensors must be, checked before anything is computed."""

from __future__ import annotations

import torch

from shared.errors import TensorError
from trunk_service.requests import ForwardRequest
from trunk_service.trunk import TrunkInfo


def check_forward(
    request: ForwardRequest,
    info: TrunkInfo,
    max_tokens: int,
    cached_tokens: int,
    finite: bool,
) -> None:
    """Refuses hidden states, masks and positions that the trunk cannot compute on.

    Args:
        request: What the tenant sent.
        info: The trunk's model.
        max_tokens: Most batch rows times tokens.
        cached_tokens: Tokens already in the cache that is extended.
        finite: Whether NaN and Inf are refused.

    Raises:
        TensorError: Names the tensor, what was given and what is accepted.
    """
    check_values("hidden_states", request.hidden_BTD, info.hidden_size, finite)
    batch, tokens, _ = request.hidden_BTD.shape
    _check_past(request.past, batch, info, finite)
    cached_tokens += request.past_tokens
    total = cached_tokens + tokens
    if batch * tokens > max_tokens:
        raise TensorError(
            f"hidden_states hold {batch} x {tokens} tokens; this trunk accepts {max_tokens}"
        )
    # A packed row is longer than any of its texts; then the positions say what counts.
    limit = info.position_limit
    if request.position_ids is None and total > limit:
        raise TensorError(f"{total} tokens are too long: the model has {limit} positions")
    if request.attention_mask is not None:
        _check_mask(request.attention_mask, batch, tokens, total)
    if request.position_ids is not None:
        _check_positions(request.position_ids, batch, tokens, limit)


def check_values(name: str, tensor: torch.Tensor, hidden_size: int, finite: bool) -> None:
    """Refuses what is not a [B, T, D] tensor of floating-point numbers.

    Args:
        name: Of the tensor.
        tensor: What the tenant sent.
        hidden_size: D.
        finite: Whether NaN and Inf are refused.

    Raises:
        TensorError: Names what was given and what is accepted.
    """
    shape = tuple(tensor.shape)
    if len(shape) != 3 or 0 in shape:
        raise TensorError(f"{name} has shape {shape}; accepted: [batch, tokens, {hidden_size}]")
    if shape[2] != hidden_size:
        raise TensorError(f"{name} has hidden size {shape[2]}; the model's is {hidden_size}")
    if not tensor.is_floating_point():
        raise TensorError(f"{name} is {tensor.dtype}; accepted: a floating-point type, int8 blocks")
    if finite and not bool(torch.isfinite(tensor).all()):
        raise TensorError(f"{name} holds NaN or Inf, which this trunk's host refuses")


def _check_past(past: tuple[torch.Tensor, ...], batch: int, info: TrunkInfo, finite: bool) -> None:
    blocks = info.split.end - info.split.start
    if not past:
        return
    shapes = {tuple(tensor.shape) for tensor in past}
    shape = next(iter(shapes))
    wide = len(shape) == 4 and shape[0] == batch and 0 < shape[2] <= info.max_positions
    if len(past) != 2 * blocks or len(shapes) > 1 or not wide:
        raise TensorError(
            f"{len(past)} past tensors of shapes {sorted(shapes)[:2]}; accepted: keys and values "
            f"[{batch}, heads, tokens, size of a head] of each of {blocks} blocks"
        )
    if not all(t.is_floating_point() for t in past):
        raise TensorError("past tensors are not all floating-point numbers")
    if finite and not all(bool(torch.isfinite(t).all()) for t in past):
        raise TensorError("past tensors hold NaN or Inf, which this trunk's host refuses")


def _check_mask(mask: torch.Tensor, batch: int, tokens: int, total: int) -> None:
    flat, full = (batch, total), (batch, 1, tokens, total)
    shape = tuple(mask.shape)
    if shape == flat and not mask.is_floating_point():
        return
    # A four-dimensional mask may be additive: then it is floating point and holds -Inf.
    if shape == full and (mask.dtype == torch.bool or _is_additive(mask)):
        return
    raise TensorError(
        f"attention_mask is {mask.dtype} {shape}; accepted: whole numbers or bool "
        f"{list(flat)}, or bool or floating point without NaN and +Inf {list(full)}"
    )


def _is_additive(mask: torch.Tensor) -> bool:
    return mask.is_floating_point() and bool((mask < float("inf")).all())


def _check_positions(positions: torch.Tensor, batch: int, tokens: int, limit: int) -> None:
    shape = tuple(positions.shape)
    if shape not in ((batch, tokens), (1, tokens)) or positions.dtype != torch.int64:
        raise TensorError(
            f"position_ids are {positions.dtype} {shape}; accepted: int64 "
            f"[{batch}, {tokens}] or [1, {tokens}]"
        )
    if int(positions.min()) < 0 or int(positions.max()) >= limit:
        raise TensorError(f"position_ids are not all within 0 .. {limit - 1}")
