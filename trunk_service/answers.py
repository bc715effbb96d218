"""What a session answered, kept until its client says that it has arrived.

A message that comes a second time, on a new connection after the first one broke, is not done a
second time: it is given the answer of the first, or waits for it while that is still computed. So
every message takes effect exactly once while the session lives, whichever side of the answer the
connection broke on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import ProtocolError, UnknownSessionError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.formats import Packed

Answer = tuple[pb.SessionResponse, Mapping[str, Packed]]


@dataclass
class _Kept:
    kind: str
    task: asyncio.Task[Answer]
    answered_at: float = float("inf")

    @property
    def nbytes(self) -> int:
        if not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return 0
        return sum(t.nbytes for t in self.task.result()[1].values())


def _strip(task: asyncio.Task[Answer]) -> None:
    """Leaves of an error its text: its frames would keep the request's tensors."""
    if task.cancelled() or (error := task.exception()) is None:
        return
    error.__traceback__ = error.__cause__ = error.__context__ = None


class KeptAnswers:
    """Answers by message id. Used on the event loop alone.

    Args:
        max_answers: How many are kept for a client that acknowledges none.
        max_bytes: How many bytes of tensors they may have, the newest one aside.
    """

    def __init__(self, max_answers: int, max_bytes: int) -> None:
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._kept: dict[int, _Kept] = {}
        self._floor = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def computing(self) -> bool:
        """Whether a request is under way."""
        return any(not kept.task.done() for kept in self._kept.values())

    def find(self, message_id: int, kind: str) -> asyncio.Task[Answer] | None:
        """Returns the answer of a message that came before; None for a new one.

        Raises:
            ProtocolError: If another kind of message had this id, or its answer was acknowledged.
            UnknownSessionError: If too many answers came after it: it is not kept any more, so
                what the client has missed cannot be told from this session.
        """
        kept = self._kept.get(message_id)
        if kept is not None:
            if kept.kind != kind:
                raise ProtocolError(f"message {message_id} was a {kept.kind} before, not a {kind}")
            return kept.task
        if message_id <= self._floor:
            raise UnknownSessionError(
                f"the answer of message {message_id} is not kept any more; those after "
                f"{self._floor} are"
            )
        return None

    def start(
        self, message_id: int, kind: str, work: Coroutine[Any, Any, Answer]
    ) -> asyncio.Task[Answer]:
        """Begins a message; its answer is kept even if the connection breaks meanwhile."""
        self._bound()
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(_strip)
        kept = self._kept[message_id] = _Kept(kind, task)
        task.add_done_callback(lambda _: setattr(kept, "answered_at", time.monotonic()))
        return task

    def acknowledge(self, up_to: int) -> None:
        """Forgets the answers that have arrived."""
        for message_id in [i for i in self._kept if i <= up_to]:
            if self._kept[message_id].task.done():
                self._forget(message_id)

    def forget_older(self, seconds: float) -> None:
        """Forgets what was answered so long ago: a client that is still idle has it.

        One that has lost it, and has not noticed that for so long, asks again in a new session.
        """
        horizon = time.monotonic() - seconds
        for message_id in [i for i, kept in self._kept.items() if kept.answered_at < horizon]:
            self._forget(message_id)

    def forget_all(self) -> None:
        """Forgets every answer: nobody can come back for them."""
        self._kept.clear()

    def _bound(self) -> None:
        """Forgets the oldest answers of a client that acknowledges too few."""
        done = [i for i, kept in self._kept.items() if kept.task.done()]
        total = sum(self._kept[i].nbytes for i in done)
        for message_id in done:
            if len(self._kept) < self._max_answers and total <= self._max_bytes:
                return
            total -= self._kept[message_id].nbytes
            self._forget(message_id)

    def _forget(self, message_id: int) -> None:
        del self._kept[message_id]
        self._floor = max(self._floor, message_id)
