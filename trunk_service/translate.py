"""Between generated messages and the plain requests that sessions take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shared import __version__
from shared.adapters.config import accepted_methods
from shared.errors import ProtocolError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.dtypes import to_torch, to_wire
from trunk_service.limits import Limits
from trunk_service.optimizers import KINDS, OptimizerSpec
from trunk_service.requests import (
    BackwardRequest,
    CacheEdit,
    ForwardAnswer,
    ForwardRequest,
    HeldMode,
    OpenRequest,
    StepRequest,
)
from trunk_service.trunk import TrunkInfo

Tensors = Mapping[str, torch.Tensor]

_HELD_MODES = {
    None: pb.HELD_MODE_UNSPECIFIED,
    HeldMode.RETAINED: pb.HELD_MODE_RETAINED,
    HeldMode.RECOMPUTED: pb.HELD_MODE_RECOMPUTED,
}


def open_request(body: pb.Open) -> OpenRequest:
    """Reads the terms of a session.

    Raises:
        TensorError: If the wire dtype is unknown.
        ProtocolError: If the dropout probability is none.
    """
    wire_dtype = to_torch(body.wire_dtype or pb.DATA_TYPE_FLOAT32)
    if not wire_dtype.is_floating_point:
        raise ProtocolError(f"wire dtype {wire_dtype} is not a floating-point type")
    if body.HasField("dropout") and not 0.0 <= body.dropout < 1.0:
        raise ProtocolError(f"dropout {body.dropout} is not a probability from 0 to below 1")
    return OpenRequest(
        weight_digest=body.weight_digest,
        start_layer=body.start_layer,
        end_layer=body.end_layer,
        peft_config_json=body.peft_config_json,
        seed=body.seed,
        dropout=body.dropout if body.HasField("dropout") else None,
        wire_dtype=wire_dtype,
    )


def forward_request(body: pb.Forward, tensors: Tensors) -> ForwardRequest:
    """Reads a forward.

    Raises:
        ProtocolError: If ``hidden_states`` are missing or a tensor is not known.
    """
    _check_names(tensors, {"hidden_states"}, {"attention_mask", "position_ids"})
    return ForwardRequest(
        hidden_BTD=tensors["hidden_states"],
        attention_mask=tensors.get("attention_mask"),
        position_ids=tensors.get("position_ids"),
        request_id=body.request_id,
        keep_graph=body.keep_graph,
        training=body.training,
        step=body.step,
        micro=body.micro,
        cache_id=body.cache_id,
        cache_edits=[_cache_edit(op) for op in body.cache_ops],
    )


def backward_request(body: pb.Backward, tensors: Tensors) -> BackwardRequest:
    """Reads a backward.

    Raises:
        ProtocolError: If ``gradient`` is missing or a tensor is not known.
    """
    _check_names(tensors, {"gradient"}, set())
    return BackwardRequest(
        gradient_BTD=tensors["gradient"],
        request_id=body.request_id,
        need_input_gradient=body.need_input_gradient,
        reset_gradients=body.reset_gradients,
    )


def step_request(body: pb.Step) -> StepRequest:
    """Reads an optimizer step."""
    spec = OptimizerSpec(
        name=body.optimizer.name,
        hyperparameters=dict(body.optimizer.hyperparameters),
        flags=dict(body.optimizer.flags),
    )
    return StepRequest(body.step, body.gradient_scale, spec)


def adapter_tensors(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Reads the weights of a restore.

    Raises:
        ProtocolError: If a name does not begin with ``adapter/``.
    """
    if foreign := [name for name in tensors if not name.startswith("adapter/")]:
        raise ProtocolError(f"tensors {foreign[:3]} are not adapter weights (adapter/NAME)")
    return {name.removeprefix("adapter/"): tensor for name, tensor in tensors.items()}


def forward_result(answer: ForwardAnswer) -> pb.ForwardResult:
    """Writes what is held of a forward."""
    return pb.ForwardResult(held_mode=_HELD_MODES[answer.held_mode], held_bytes=answer.held_bytes)


def info_response(info: TrunkInfo, limits: Limits) -> pb.GetInfoResponse:
    """Writes what the trunk serves and accepts."""
    return pb.GetInfoResponse(
        model_type=info.model_type,
        num_layers=info.num_layers,
        start_layer=info.split.start,
        end_layer=info.split.end,
        hidden_size=info.hidden_size,
        max_positions=info.max_positions,
        compute_dtype=to_wire(info.dtype),
        weight_digest=info.weight_digest,
        peft_methods=accepted_methods(),
        optimizers=list(KINDS),
        max_tokens_per_request=limits.max_tokens_per_request,
        max_adapter_rank=limits.max_adapter_rank,
        max_adapter_parameters=limits.max_adapter_parameters,
        version=__version__,
    )


def max_tensor_bytes(request: pb.SessionRequest, info: TrunkInfo, limits: Limits) -> int:
    """Most tensor bytes a message may announce, by what it asks for."""
    kind = request.WhichOneof("body")
    if kind in ("forward", "backward"):
        # Hidden states or a gradient in the widest wire dtype, and a full mask with positions.
        tokens = limits.max_tokens_per_request
        return tokens * (info.hidden_size * 8 + info.max_positions * 4 + 16)
    return limits.max_adapter_parameters * 4 if kind == "restore" else 0


def _check_names(tensors: Tensors, needed: set[str], optional: set[str]) -> None:
    if needed - tensors.keys() or tensors.keys() - needed - optional:
        raise ProtocolError(
            f"tensors {sorted(tensors)} were sent; needed: {sorted(needed)}, "
            f"optional: {sorted(optional)}"
        )


def _cache_edit(op: pb.CacheOp) -> CacheEdit:
    match op.WhichOneof("op"):
        case "reorder":
            return CacheEdit(reorder=list(op.reorder.indices))
        case "crop":
            return CacheEdit(remove_tokens=op.crop.tokens_to_remove)
        case "repeat":
            return CacheEdit(repeats=op.repeat.repeats)
        case "reset":
            return CacheEdit(reset=True)
    raise ProtocolError("a cache operation that says nothing")
