"""A session that outlives its connections, and its trunk.

A connection that breaks is made anew, and what was not answered is sent again under its old ids:
the trunk does nothing twice. If the session is gone too (the trunk was killed, or drained), a new
one is opened on any trunk with the same weights, where callers find that nothing of theirs is there
and ask for it again (see :mod:`client_service.trunk_function`).
"""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from client_service.connection import (
    CONNECT_TIMEOUT_S,
    Answer,
    SessionConnection,
    Traffic,
    get_info,
    open_channel,
)
from client_service.credentials import Credentials
from shared.errors import (
    InvalidInputError,
    ModelMismatchError,
    ResourceExhaustedError,
    StaleSessionError,
    TrunkInternalError,
    TrunklineError,
    TrunkUnavailableError,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.formats import Packed

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_TIDYING_S = 0.5
"""What ending many sessions may take."""

Check = Callable[[str, pb.GetInfoResponse], None]


@dataclass
class _Pending:
    message: pb.SessionRequest
    tensors: Mapping[str, Packed]
    future: Future[Answer] = field(default_factory=Future)


class SessionLink:
    """Requests of one session, whatever happens to its connections.

    Args:
        addresses: Trunks, tried in turn.
        open_message: What to open a session with, given what the trunk serves.
        check: Refuses a trunk that serves something else.
        request_timeout_s: How long an answer may take on a connection that lives.
        reconnect_timeout_s: How long to look for a trunk when one is lost; 0 gives up at once.
        credentials: What to show a trunk; None takes the environment's.

    Raises:
        TrunkUnavailableError: If no trunk answers within a few seconds.
        TrunklineError: If a trunk refuses the session.
    """

    def __init__(
        self,
        addresses: list[str],
        open_message: Callable[[pb.GetInfoResponse], pb.Open],
        check: Check,
        request_timeout_s: float,
        reconnect_timeout_s: float,
        credentials: Credentials | None = None,
    ) -> None:
        self._addresses, self._open_message, self._check = addresses, open_message, check
        self._timeout_s, self._reconnect_timeout_s = request_timeout_s, reconnect_timeout_s
        self._credentials = credentials
        self.traffic = Traffic()
        self.recoveries = 0
        """How often a connection was lost and made anew."""
        self._changed = threading.Condition(threading.RLock())
        self._pending: dict[int, _Pending] = {}
        self._deadline = 0.0
        self._chance = random.Random()  # the caller's own generator draws for the caller
        self._next_id = 2  # 1 is Open's, on every connection
        self._recovering = self._resumable = self._closed = False
        self._failure: TrunklineError | None = None
        self._process = os.getpid()
        self._open_first()
        info, self._epoch = self.info, self.opened.epoch
        self._weights = info.weight_digest, info.quantization, info.compute_dtype

    def _open_first(self) -> None:
        try:
            self._open_any()
        except ResourceExhaustedError:
            # Models that were dropped and wait for the collector still have sessions.
            gc.collect()
            time.sleep(_TIDYING_S)
            self._open_any()

    def _open_any(self) -> None:
        for last, address in enumerate(self._addresses, 1 - len(self._addresses)):
            try:
                self._connection, self.info, self.opened = self._open_at(address)
            except TrunkUnavailableError:
                if last == 0:
                    raise
            else:
                self.address = address
                break

    def send(
        self, message: pb.SessionRequest, tensors: Mapping[str, Packed] | None = None
    ) -> Future[Answer]:
        """Sends a request; its answer arrives in the future, or the error that it was.

        Raises:
            TrunklineError: If the session is lost for good.
        """
        self.check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._failure or self._closed)
            self._check_alive()
            pending = _Pending(message, tensors or {})
            self._give_id(pending)
            try:
                self._submit(pending)
            except BaseException:
                self._pending.pop(pending.message.id, None)
                raise
            return pending.future

    def ask(
        self, message: pb.SessionRequest, tensors: Mapping[str, Packed] | None = None
    ) -> Answer:
        """Sends a request and waits for its answer, through every recovery.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
            TrunkUnavailableError: If no trunk was found in time or no answer came.
        """
        return self.wait(self.send(message, tensors))

    def wait(self, future: Future[Answer]) -> Answer:
        """Waits for the answer of a request that was sent; raises what :meth:`ask` raises."""
        while True:
            recoveries = self.recoveries
            try:
                return future.result(self._timeout_s)
            except TimeoutError as error:
                if future.done():
                    continue
                if self._recovering or recoveries != self.recoveries:
                    continue  # the time counts from when it was sent last
                failure = TrunkUnavailableError(
                    f"trunk {self.address} gave no answer within {self._timeout_s:g} s"
                )
                self._fail(failure)
                self._connection.abandon()
                raise failure from error

    def close(self) -> None:
        """Ends the session; the trunk frees what it held. A forked process leaves it alone."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            connection = self._connection
        connection.close()

    def check_process(self) -> None:
        """Refuses a process that was forked: its threads and locks are not those of the session.

        Raises:
            InvalidInputError: In such a process.
        """
        if os.getpid() != self._process:
            raise InvalidInputError(
                "this process was forked from the one that opened the session: accepted are calls "
                "there, and models that are opened in a process that was spawned"
            )

    @property
    def _ready(self) -> bool:
        return not self._recovering and len(self._pending) < self.opened.max_requests_in_flight

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise TrunkUnavailableError("the session was closed")

    def _give_id(self, pending: _Pending) -> None:
        pending.message.id = self._next_id
        self._pending[self._next_id] = pending
        self._next_id += 1

    def _submit(self, pending: _Pending) -> None:
        pending.message.acknowledged = min(self._pending) - 1
        connection = self._connection
        answered = connection.send(pending.message, pending.tensors)
        answered.add_done_callback(partial(self._answered, connection, pending.message.id))

    def _answered(
        self, connection: SessionConnection, message_id: int, answered: Future[Answer]
    ) -> None:
        error = answered.exception()
        with self._changed:
            if connection is not self._connection or self._recovering:
                return  # it will be sent again on the next connection, or was
            if isinstance(error, TrunkUnavailableError) and self._begin_recovery(error):
                return
            pending = self._pending.pop(message_id, None)
            if pending is None:
                return
            self._changed.notify_all()
        if error is None:
            pending.future.set_result(answered.result())
        else:
            pending.future.set_exception(error)

    def _ended(self, connection: SessionConnection, failure: TrunklineError) -> None:
        with self._changed:
            if getattr(self, "_connection", None) is not connection or self._closed:
                return
            if not self._begin_recovery(failure):
                self._fail(failure)

    def _begin_recovery(self, failure: TrunklineError) -> bool:
        """Starts to look for the session, or a trunk for a new one; tells whether it does."""
        if self._recovering:
            return True
        hopeless = self._closed or self._failure is not None or not self._reconnect_timeout_s
        if hopeless or not isinstance(failure, TrunkUnavailableError):
            return False
        if isinstance(failure, StaleSessionError):
            return False  # taking it back would shut out whoever has it now
        self._recovering = True
        # Only a plain break leaves the session on the trunk.
        self._resumable = type(failure) is TrunkUnavailableError
        logger.warning("connection to the trunk lost: %s", failure)
        threading.Thread(
            target=self._recover, args=(self._connection,), name="trunk-recovery", daemon=True
        ).start()
        return True

    def _recover(self, lost: SessionConnection) -> None:
        """Looks for a trunk until there is one, or the time is over, or there is no use."""
        if self._resumable:
            lost.abandon()
        else:
            lost.close()
        started, pause_s = time.monotonic(), _FIRST_PAUSE_S
        self._deadline = started + self._reconnect_timeout_s
        while True:
            for address in self._in_turn():
                failure = self._try(address)
                if failure is None:
                    took_s = time.monotonic() - started
                    logger.warning("connection to the trunk is back after %.1f s", took_s)
                    return
                if not self._worth_another_try(failure):
                    self._fail(failure)
                    return
            if self._closed or time.monotonic() > self._deadline:
                assert failure is not None
                self._fail(failure)
                return
            time.sleep(pause_s * self._chance.uniform(0.75, 1.25))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _try(self, address: str) -> TrunklineError | None:
        """Goes on with the session on a trunk; returns why that was not possible."""
        try:
            if self._resumable and address == self.address:
                try:
                    self._resume()
                    return None
                except TrunkUnavailableError as error:
                    if type(error) is TrunkUnavailableError or isinstance(error, StaleSessionError):
                        raise
                    # A trunk that answers and does not know the session will not know it later.
                    self._resumable = False
            self._rebuild(address)
        except TrunklineError as error:
            return error
        except Exception as error:
            logger.exception("recovering the session failed")
            return TrunkInternalError(f"recovering the session failed: {error}")
        return None

    def _worth_another_try(self, failure: TrunklineError) -> bool:
        if isinstance(failure, StaleSessionError):
            return False
        if isinstance(failure, ModelMismatchError):
            return len(self._addresses) > 1
        return isinstance(failure, (TrunkUnavailableError, ResourceExhaustedError))

    def _in_turn(self) -> list[str]:
        """The trunk that had the session first."""
        return [self.address, *(a for a in self._addresses if a != self.address)]

    def _resume(self) -> None:
        """Takes the session up again and sends what was not answered."""
        # Each try has its own: one that took effect may have lost its answer.
        self._epoch += 1
        message = pb.Open(resume_session_id=self.opened.session_id, epoch=self._epoch)
        connection, _, opened = self._open_at(self.address, message)
        with self._changed:
            self.opened = opened
            goes_on = self._go_on(connection)
        if not goes_on:
            connection.close()

    def _rebuild(self, address: str) -> None:
        """Opens a new session; what was not answered is asked there, and found to be missing."""
        connection, info, opened = self._open_at(address)
        if (info.weight_digest, info.quantization, info.compute_dtype) != self._weights:
            connection.close()
            raise ModelMismatchError(
                f"trunk {address} serves other weights than the one that was lost"
            )
        with self._changed:
            self.address, self.info, self.opened = address, info, opened
            self._epoch = opened.epoch
            self._next_id = 2
            waiting, self._pending = list(self._pending.values()), {}
            for pending in waiting:
                self._give_id(pending)
            goes_on = self._go_on(connection)
        if not goes_on:
            connection.close()

    def _go_on(self, connection: SessionConnection) -> bool:
        """Sends on this connection from now on; tells if nobody wants to any more."""
        if self._closed or self._failure is not None:
            return False
        self._connection = connection
        self.recoveries += 1
        self._recovering = False
        for pending in list(self._pending.values()):
            self._submit(pending)
        self._changed.notify_all()
        return True

    def _open_at(
        self, address: str, message: pb.Open | None = None
    ) -> tuple[SessionConnection, pb.GetInfoResponse, pb.OpenResult]:
        # A channel of its own each time: one that failed waits longer and longer by itself.
        channel = open_channel(address, self._credentials)
        connection = None
        try:
            info = get_info(channel, address, CONNECT_TIMEOUT_S)
            self._check(address, info)
            connection = SessionConnection(channel, address, self.traffic, self._ended)
            request = pb.SessionRequest(id=1, open=message or self._open_message(info))
            answer = connection.ask(request, {}, self._timeout_s)
        except BaseException:
            if connection is not None:
                connection.abandon()
            channel.close()
            raise
        return connection, info, answer.message.open

    def _fail(self, failure: TrunklineError) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._recovering = False
            waiting, self._pending = list(self._pending.values()), {}
            self._changed.notify_all()
        for pending in waiting:
            pending.future.set_exception(failure)
