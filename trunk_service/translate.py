"""Between generated messages and the plain requests that sessions take."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shared import __version__
from shared.adapters.state_push import StatePush
from shared.errors import ProtocolError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from shared.wire.dtypes import to_format, to_torch, to_wire
from shared.wire.structures import read_structure, read_values
from trunk_service.limits import Limits
from trunk_service.requests import (
    BackwardRequest,
    CacheEdit,
    FetchRequest,
    ForwardAnswer,
    ForwardRequest,
    HeldMode,
    OpenRequest,
)
from trunk_service.trunk import TrunkInfo

Tensors = Mapping[str, torch.Tensor]

_ATTENTIONS = ("", "eager", "sdpa")

_HELD_MODES = {
    None: pb.HELD_MODE_UNSPECIFIED,
    HeldMode.RETAINED: pb.HELD_MODE_RETAINED,
    HeldMode.RECOMPUTED: pb.HELD_MODE_RECOMPUTED,
    HeldMode.OFFLOADED: pb.HELD_MODE_OFFLOADED,
}


def open_request(body: pb.Open) -> OpenRequest:
    """Reads the terms of a session."""
    return OpenRequest(
        weight_digest=body.weight_digest,
        start_layer=body.start_layer,
        end_layer=body.end_layer,
        library_versions=dict(body.library_versions),
    )


def forward_request(body: pb.Forward, tensors: Tensors) -> ForwardRequest:
    """Reads a forward.

    Raises:
        ProtocolError: If ``hidden_states`` are missing or a tensor is not known.
        TensorError: If the answer's format is unknown.
    """
    push = _push(body, tensors) if body.HasField("state") else None
    more = {f"value/{i}" for i in range(len(push.values))} if push else set[str]()
    past = [name for name in tensors if name.startswith("past/")]
    more |= {f"past/{i}" for i in range(len(past))}
    _check_names(tensors, {"hidden_states"} | more, {"attention_mask", "position_ids"})
    return ForwardRequest(
        hidden_BTD=tensors["hidden_states"],
        attention_mask=tensors.get("attention_mask"),
        position_ids=tensors.get("position_ids"),
        request_id=body.request_id,
        keep_graph=body.keep_graph,
        training=body.training,
        cache_id=body.cache_id,
        cache_edits=[_cache_edit(op) for op in body.cache_ops],
        cached_tokens=body.cached_tokens if body.HasField("cached_tokens") else None,
        answer_format=to_format(body.answer_format),
        state_version=body.state_version,
        push=push,
        past=tuple(tensors[f"past/{i}"] for i in range(len(past))),
        adapter_names=tuple(body.adapter_names),
        attention=_attention(body.attention),
        autocast=_autocast(body.autocast),
        dropout_key=body.dropout_key,
        blocks=(body.first_block, body.end_block) if body.end_block else None,
    )


def backward_request(body: pb.Backward, tensors: Tensors) -> BackwardRequest:
    """Reads a backward.

    Raises:
        ProtocolError: If ``gradient`` is missing or a tensor is not known.
        TensorError: If the answer's format is unknown.
    """
    _check_names(tensors, {"gradient"}, set())
    return BackwardRequest(
        gradient_BTD=tensors["gradient"],
        request_id=body.request_id,
        need_input_gradient=body.need_input_gradient,
        answer_format=to_format(body.answer_format),
        values=tuple(body.values),
        past=tuple(body.past),
        keep_graph=body.keep_graph,
        value_format=to_format(body.value_format),
    )


def _attention(word: str) -> str:
    if word not in _ATTENTIONS:
        raise ProtocolError(
            f"attention {word[:80]!r} is not accepted: {' and '.join(_ATTENTIONS[1:])} are"
        )
    return word


def _autocast(data_type: int) -> torch.dtype | None:
    if not data_type:
        return None
    if data_type not in (pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_FLOAT16):
        raise ProtocolError(f"autocast to type {data_type}; accepted: bfloat16 and float16")
    return to_torch(data_type)


def _push(body: pb.Forward, tensors: Tensors) -> StatePush:
    state = body.state
    if not 0 <= state.since < state.version == body.state_version:
        raise ProtocolError(
            f"a state of version {state.version} after {state.since}, in a forward that means "
            f"{body.state_version}"
        )
    values = read_values(state.values)
    names = [f"value/{i}" for i in range(len(values))]
    if missing := [name for name in names if name not in tensors]:
        raise ProtocolError(f"{len(values)} values were announced, {missing[0]} is not there")
    return StatePush(
        state.version,
        state.since,
        read_structure(state.structure) if state.HasField("structure") else None,
        values,
        tuple(
            tensors[name].float() if value.rounded else tensors[name]
            for name, value in zip(names, state.values, strict=True)
        ),
    )


def fetch_request(body: pb.Fetch) -> FetchRequest:
    """Reads which base weights are wanted."""
    return FetchRequest(tuple(body.names), tuple(body.norm_rows), tuple(body.norm_columns))


def forward_result(answer: ForwardAnswer) -> pb.ForwardResult:
    """Writes what is held of a forward."""
    return pb.ForwardResult(
        held_mode=_HELD_MODES[answer.held_mode],
        held_bytes=answer.held_bytes,
    )


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
        peft_methods=limits.peft_methods,
        max_tokens_per_request=limits.max_tokens_per_request,
        max_adapter_rank=limits.max_adapter_rank,
        max_adapter_parameters=limits.max_adapter_parameters,
        version=__version__,
        quantization=info.quantization,
        library_versions=library_versions(),
        config_json=info.config_json,
    )


def max_tensor_bytes(request: pb.SessionRequest, info: TrunkInfo, limits: Limits) -> int:
    """Most tensor bytes a message may announce, by what it asks for."""
    kind = request.WhichOneof("body")
    if kind not in ("forward", "backward"):
        return 0
    # Hidden states or a gradient in the widest wire dtype, and a full mask with positions.
    tokens = limits.max_tokens_per_request
    count = tokens * (info.hidden_size * 8 + info.max_positions * 4 + 16)
    pushes = kind == "forward" and request.forward.HasField("state")
    return count + limits.max_adapter_parameters * 4 * pushes


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
