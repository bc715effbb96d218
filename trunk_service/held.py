"""What is kept of each forward until its backward, in bytes accounted before it was computed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from shared.errors import ReusedRequestError, UnknownRequestError
from trunk_service.requests import ForwardRequest, HeldMode
from trunk_service.room import Room
from trunk_service.tenant_tree import TreeState


@dataclass
class HeldRequest:
    """The state of one forward.

    ``output`` is the end of the graph, or None when backward recomputes it from ``request``.
    """

    request: ForwardRequest
    input_BTD: torch.Tensor
    output_BTD: torch.Tensor | None
    room: Room
    state: TreeState
    """The client's adapters that it was computed with."""
    expires_at: float

    @property
    def mode(self) -> HeldMode:
        """How it is held."""
        return HeldMode.RECOMPUTED if self.output_BTD is None else self.room.mode

    def give_up_graph(self) -> None:
        """Lets go of the graph: it may be half used up. What it was made of is still there."""
        self.output_BTD = None
        self.room.give_up_graph()


class HeldRequests:
    """Held state of one session, by request id.

    Args:
        lease_s: Seconds until state that nobody asks for is freed.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._held: dict[str, HeldRequest] = {}

    def __len__(self) -> int:
        return len(self._held)

    def same(self, request: ForwardRequest) -> HeldRequest | None:
        """Returns what is held of this very forward, if it came before.

        Raises:
            ReusedRequestError: If another forward is held under its id.
        """
        held = self._held.get(request.request_id)
        if held is None:
            return None
        before = held.request
        pairs = (
            (request.hidden_BTD, before.hidden_BTD),
            (request.attention_mask, before.attention_mask),
            (request.position_ids, before.position_ids),
            *itertools.zip_longest(request.past, before.past),
        )
        if _plain(request) != _plain(before) or not all(_equal(a, b) for a, b in pairs):
            raise ReusedRequestError(
                f"another forward is held under request id {request.request_id[:120]!r}"
            )
        return held

    def add(
        self,
        request: ForwardRequest,
        input_BTD: torch.Tensor,
        output_BTD: torch.Tensor | None,
        room: Room,
        state: TreeState,
    ) -> HeldRequest:
        """Keeps a forward that there is room for."""
        expires_at = self._clock() + self._lease_s
        held = HeldRequest(request, input_BTD, output_BTD, room, state, expires_at)
        self._held[request.request_id] = held
        return held

    def get(self, request_id: str) -> HeldRequest:
        """Returns the state of a forward.

        Raises:
            UnknownRequestError: If there is none.
        """
        held = self._held.get(request_id)
        if held is None:
            raise UnknownRequestError(
                f"request {request_id[:120]!r} holds no state: no forward had this id, its "
                f"backward was done, or it was released or expired"
            )
        return held

    def drop(self, request_id: str) -> None:
        """Frees the state of a forward; one that is not there is ignored."""
        held = self._held.pop(request_id, None)
        if held is not None:
            held.room.close()

    def drop_all(self) -> None:
        """Frees everything."""
        for request_id in list(self._held):
            self.drop(request_id)

    @property
    def any_expired(self) -> bool:
        """Whether a lease is over; may be asked from any thread."""
        now = self._clock()
        return any(held.expires_at <= now for held in list(self._held.values()))

    def drop_expired(self) -> list[str]:
        """Frees state whose lease is over; returns the ids."""
        now = self._clock()
        expired = [request_id for request_id, h in self._held.items() if h.expires_at <= now]
        for request_id in expired:
            self.drop(request_id)
        return expired


def _plain(request: ForwardRequest) -> tuple[object, ...]:
    # A push is known by its version; its tensors are not kept.
    tensors = ("hidden_BTD", "attention_mask", "position_ids", "push", "past")
    return tuple(getattr(request, f.name) for f in fields(request) if f.name not in tensors)


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)
