"""What a session does for each kind of message: from a message to its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.formats import Packed
from trunk_service import translate
from trunk_service.requests import ForwardAnswer
from trunk_service.session import TenantSession

Answer = tuple[pb.SessionResponse, Mapping[str, Packed]]


def _forward(tenant: TenantSession, body: pb.Forward, tensors: translate.Tensors) -> Answer:
    return forward_answer(tenant.forward(translate.forward_request(body, tensors)))


def forward_answer(answer: ForwardAnswer) -> Answer:
    """The message that answers a forward, and its tensors."""
    response = pb.SessionResponse(forward=translate.forward_result(answer))
    return response, {"hidden_states": answer.hidden_BTD}


def _backward(tenant: TenantSession, body: pb.Backward, tensors: translate.Tensors) -> Answer:
    answer = tenant.backward(translate.backward_request(body, tensors))
    result = pb.BackwardResult(gradient_norm=answer.gradient_norm)
    gradient = {} if answer.gradient_BTD is None else {"gradient": answer.gradient_BTD}
    gradient |= {f"value/{name}": tensor for name, tensor in answer.values.items()}
    gradient |= {f"past/{number}": tensor for number, tensor in answer.past.items()}
    return pb.SessionResponse(backward=result), gradient


def _step(tenant: TenantSession, body: pb.Step, tensors: translate.Tensors) -> Answer:
    answer = tenant.step(translate.step_request(body))
    result = pb.StepResult(committed_step=answer.committed_step, gradient_norm=answer.gradient_norm)
    return pb.SessionResponse(step=result), {}


def _release(tenant: TenantSession, body: pb.Release, tensors: translate.Tensors) -> Answer:
    tenant.release(list(body.request_ids), list(body.cache_ids))
    return pb.SessionResponse(release=pb.ReleaseResult()), {}


def _snapshot(tenant: TenantSession, body: pb.Snapshot, tensors: translate.Tensors) -> Answer:
    adapter = tenant.adapters.get(body.adapter)
    sent: dict[str, torch.Tensor] = {}
    if pb.SNAPSHOT_PART_ADAPTER in body.parts:
        sent |= _named("adapter", adapter.weights())
    if pb.SNAPSHOT_PART_GRADIENTS in body.parts:
        sent |= _named("gradient", adapter.accumulated())
    if pb.SNAPSHOT_PART_OPTIMIZER in body.parts:
        sent |= _named("optimizer", adapter.optimizer_state())
    result = pb.SnapshotResult(
        peft_config_json=adapter.config_json,
        committed_step=adapter.committed.committed_step,
    )
    return pb.SessionResponse(snapshot=result), sent


def _restore(tenant: TenantSession, body: pb.Restore, tensors: translate.Tensors) -> Answer:
    tenant.restore(translate.restore_request(body, tensors))
    return pb.SessionResponse(restore=pb.RestoreResult()), {}


def _add_adapter(tenant: TenantSession, body: pb.AddAdapter, tensors: translate.Tensors) -> Answer:
    added = tenant.adapters.add(translate.adapter_request(body))
    result = pb.AddAdapterResult(trainable_parameters=added.trainable_parameters)
    return pb.SessionResponse(add_adapter=result), {}


def _remove_adapter(
    tenant: TenantSession, body: pb.RemoveAdapter, tensors: translate.Tensors
) -> Answer:
    tenant.remove_adapter(body.adapter)
    return pb.SessionResponse(remove_adapter=pb.RemoveAdapterResult()), {}


def _list_adapters(
    tenant: TenantSession, body: pb.ListAdapters, tensors: translate.Tensors
) -> Answer:
    described = [
        pb.AdapterDescription(
            adapter=name,
            peft_config_json=adapter.config_json,
            trainable_parameters=adapter.trainable_parameters,
            committed_step=adapter.committed.committed_step,
        )
        for name, adapter in tenant.adapters.items()
    ]
    return pb.SessionResponse(list_adapters=pb.ListAdaptersResult(adapters=described)), {}


def _importance(tenant: TenantSession, body: pb.Importance, tensors: translate.Tensors) -> Answer:
    scores = tenant.adapters.get(body.adapter).importance(body.update, body.report)
    return pb.SessionResponse(importance=pb.ImportanceResult()), _named("importance", scores)


def _allocate(tenant: TenantSession, body: pb.Allocate, tensors: translate.Tensors) -> Answer:
    tenant.adapters.get(body.adapter).allocate(translate.named(tensors, "keep/"), body.last)
    return pb.SessionResponse(allocate=pb.AllocateResult()), {}


def _fetch(tenant: TenantSession, body: pb.Fetch, tensors: translate.Tensors) -> Answer:
    found = tenant.fetch(list(body.names))
    result = pb.FetchResult(linear_modules=tenant.linear_modules)
    return pb.SessionResponse(fetch=result), found


def _named(kind: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}/{name}": tensor for name, tensor in tensors.items()}


HANDLERS: dict[str, Callable[[TenantSession, Any, translate.Tensors], Answer]] = {
    "forward": _forward,
    "backward": _backward,
    "step": _step,
    "release": _release,
    "snapshot": _snapshot,
    "restore": _restore,
    "add_adapter": _add_adapter,
    "remove_adapter": _remove_adapter,
    "list_adapters": _list_adapters,
    "importance": _importance,
    "allocate": _allocate,
    "fetch": _fetch,
}
