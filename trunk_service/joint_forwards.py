"""Messages that ask for one cached token, done together: the edge of :mod:`joint_decoding`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from shared.errors import TrunklineError
from shared.failpoints import reach
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from trunk_service import translate
from trunk_service.handlers import Answer, forward_answer
from trunk_service.joint_decoding import JointDecoding, Outcome, joinable
from trunk_service.metrics import TrunkMetrics
from trunk_service.registry import OpenSession
from trunk_service.requests import ForwardRequest
from trunk_service.scheduler import Joint
from trunk_service.tracing import span


@dataclass
class JointForward:
    """A forward that may be done together with others."""

    session: OpenSession
    request: ForwardRequest
    nbytes: int
    computed_s: float = 0.0
    """Its share of what was computed together, and what was computed for it alone."""

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.session.owner.tenant

    @property
    def rows(self) -> int:
        """Rows of its batch."""
        return int(self.request.hidden_BTD.shape[0])


def joint_forward(
    session: OpenSession, body: pb.Forward, tensors: Mapping[str, torch.Tensor], max_rows: int
) -> Joint | None:
    """What makes a forward one that may be done together with others; None if it may not."""
    if not max_rows or not body.cache_id or body.keep_graph or body.training:
        return None
    try:
        request = translate.forward_request(body, tensors)
    except TrunklineError:
        return None  # is refused when it is its turn
    if not (joinable(request) and session.state.joins(request)):
        return None
    item = JointForward(session, request, sum(t.nbytes for t in tensors.values()))
    return Joint(item.rows, item) if item.rows <= max_rows else None


class JointForwards:
    """Does forwards of several sessions together, as each would be done alone.

    Args:
        decoding: Computes them.
        metrics: Counts rows.
    """

    def __init__(self, decoding: JointDecoding, metrics: TrunkMetrics) -> None:
        self._decoding, self._metrics = decoding, metrics

    def run(self, items: Sequence[JointForward]) -> list[Callable[[], Answer]]:
        """Computes together what can be; returns what gives each answer, or raises."""
        for _ in items:
            reach("trunk.forward.before")
        started = time.monotonic()
        rows = sum(item.rows for item in items)
        with span("joint_forward", "", tokens=rows):
            outcomes = self._decoding.run([(i.session.state, i.request) for i in items])
        took_s = time.monotonic() - started
        for item in items:
            item.computed_s = took_s * item.rows / rows
        return [partial(self._answer, i, o) for i, o in zip(items, outcomes, strict=True)]

    def _answer(self, item: JointForward, outcome: Outcome) -> Answer:
        started = time.monotonic()
        with span("forward", item.tenant, bytes=item.nbytes):
            answer = forward_answer(outcome.give())
            reach("trunk.forward.after")
        if outcome.joint:
            self._metrics.batched(item.tenant, item.rows)
        item.computed_s += time.monotonic() - started
        return answer
