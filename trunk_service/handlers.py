"""What a session does for each kind of message: from a message to its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    gradient = {} if answer.gradient_BTD is None else {"gradient": answer.gradient_BTD}
    gradient |= {f"value/{name}": tensor for name, tensor in answer.values.items()}
    gradient |= {f"past/{number}": tensor for number, tensor in answer.past.items()}
    return pb.SessionResponse(backward=pb.BackwardResult()), gradient


def _release(tenant: TenantSession, body: pb.Release, tensors: translate.Tensors) -> Answer:
    tenant.release(list(body.request_ids), list(body.cache_ids))
    return pb.SessionResponse(release=pb.ReleaseResult()), {}


def _fetch(tenant: TenantSession, body: pb.Fetch, tensors: translate.Tensors) -> Answer:
    found = tenant.fetch(translate.fetch_request(body))
    result = pb.FetchResult(linear_modules=tenant.linear_modules)
    return pb.SessionResponse(fetch=result), found


HANDLERS: dict[str, Callable[[TenantSession, Any, translate.Tensors], Answer]] = {
    "forward": _forward,
    "backward": _backward,
    "release": _release,
    "fetch": _fetch,
}
