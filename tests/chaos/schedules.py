"""Every schedule of an unfriendly network against a reference that is asked each thing once.

The trunk's side is real (stream, kept answers, registry, session, a tiny GPT-2 block with LoRA),
and so is the client's (its autograd function, caches, note of what was sent, and session), all but
the link. That is driven by hand, as time is: a rule delivers a frame, computes a queued request,
hands an answer over, repeats or loses any of them, breaks the connection, delivers frames to a
connection that was taken over, or makes the trunk forget the session. The client's threads run in
turns, each until it waits for an answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from transformers.cache_utils import DynamicLayer

from client_service.calls import ForwardCall, SessionTerms
from client_service.remote_cache import RemoteCacheLayer
from client_service.session import TrunkSession
from client_service.trunk_function import TrunkFunction
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.error_codes import to_exception
from shared.wire.messages import Inbox, to_frames
from tests.chaos.reference import (
    LIMITS,
    LOOP,
    MICROS,
    OPEN,
    REFERENCE,
    TRUNK,
    fresh_adapters,
    hidden_states,
    take_step,
    tokens,
)
from trunk_service.execution import Execution
from trunk_service.identity import Peer
from trunk_service.registry import SessionRegistry
from trunk_service.stream import SessionStream

_AT_A_TIME = 5000
# A client asks a trunk again that has lost its state, and not for ever.
_LOSSES_OF_A_STAGE = 2
_LOST = (pb.ERROR_CODE_STALE_STATE, pb.ERROR_CODE_UNKNOWN_REQUEST)
COUNTS = {
    "schedules": 0,
    "steps": 0,
    "breaks": 0,
    "lost_sessions": 0,
    "repeats": 0,
    "stale": 0,
    "asked_again": 0,
}


class ManualScheduler:
    """Computes a request when the schedule says so, in the order they were queued."""

    def __init__(self) -> None:
        self.queue: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.completed, self.idle, self.max_joint_rows = 0, True, 0

    def submit(
        self, tenant: str, session: str, work: Any, over_limit: bool = False, joint: Any = None
    ) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.append((work, future))
        return future

    def compute(self) -> None:
        work, future = self.queue.pop(0)
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)


@dataclass
class Wire:
    """One connection: what the client sent and is not delivered yet, and what was answered."""

    stream: SessionStream
    task: asyncio.Task[None]
    frames: asyncio.Queue[bytes | None]
    sent: list[bytes] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)


class Caller:
    """A thread of the client that runs only while it is let to: until it waits for an answer."""

    here = threading.local()

    def __init__(self, work: Callable[[], list[torch.Tensor]]) -> None:
        self._work = work
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.found: list[torch.Tensor] | None = None
        self.failure: BaseException | None = None
        self._answer: Future[Any] | None = None
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def may_go_on(self) -> bool:
        return self._answer is not None and self._answer.done()

    def go_on(self) -> None:
        self._go.release()
        self._waits.acquire()

    def wait(self, answer: Future[Any]) -> Any:
        while not answer.done():
            self._answer = answer
            self._waits.release()
            self._go.acquire()
        self._answer = None
        return answer.result()

    def _run(self) -> None:
        self._go.acquire()
        self.here.caller = self
        try:
            self.found = self._work()
        except BaseException as error:
            self.failure = error
        self._waits.release()


@dataclass
class _Pending:
    message: pb.SessionRequest
    tensors: Mapping[str, Any]
    future: Future[Any] = field(default_factory=Future)


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        COUNTS["schedules"] += 1
        self.scheduler = ManualScheduler()
        self.registry = SessionRegistry(TRUNK, LIMITS, self.scheduler)  # type: ignore[arg-type]
        self.execution = Execution(self.scheduler, self.registry.metrics)  # type: ignore[arg-type]
        self.pending: dict[int, _Pending] = {}
        self.next_id, self.epoch = 2, 1
        self.step, self.stage, self.losses, self.losses_of_stage = 1, 0, 0, 0
        self.broken = False
        self.old: list[Wire] = []
        self.wire = self.connect(pb.Open.FromString(OPEN.SerializeToString()))
        with patch("client_service.session.SessionLink", lambda *given: self):
            session = TrunkSession("trunk:1", SessionTerms())
        self.function = TrunkFunction(session, {}, torch.float32)
        self.function._end.detach()
        self.adapters = fresh_adapters()
        self.callers: list[Caller] = []
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.found: list[torch.Tensor] = []

    # What a session asks of its link

    def check_process(self) -> None:
        """All of this is one process."""

    # The client

    @precondition(lambda self: not self.callers)
    @rule()
    def client_goes_on(self) -> None:
        """The next stage of the step: both forwards, both backwards, or a prompt and tokens."""
        if self.stage == 0:
            take_step(self.adapters, self.step)
            self.inputs = [hidden_states(self.step, m).clone() for m in range(MICROS)]
        work: list[Callable[[], list[torch.Tensor]]] = [
            *([] if self.stage else [lambda m=m: self.forward(m) for m in range(MICROS)]),  # type: ignore[misc]
            *([lambda m=m: self.backward(m) for m in range(MICROS)] if self.stage == 1 else []),  # type: ignore[misc]
            *([self.decode] if self.stage == 2 else []),
        ]
        self.callers = [Caller(each) for each in work]
        for caller in self.callers:
            self.let(caller)

    def let(self, caller: Caller) -> None:
        caller.go_on()
        if caller.failure is not None:
            self.broken = True
            raise caller.failure

    def forward(self, micro: int) -> list[torch.Tensor]:
        hidden = self.inputs[micro].requires_grad_(True)
        return [self.function(hidden, ForwardCall(training=True), self.adapters)]

    def backward(self, micro: int) -> list[torch.Tensor]:
        inputs = [self.inputs[micro], *(tensor for _, tensor in self.adapters[1])]
        gradient = hidden_states(self.step, micro) + 1
        return list(torch.autograd.grad(self.outputs[micro], inputs, gradient))

    @torch.no_grad()
    def decode(self) -> list[torch.Tensor]:
        cache, found = RemoteCacheLayer(self.function, DynamicLayer()), []
        forward = self.function.forward_cached
        for hidden in tokens(self.step):
            cached = cache.get_seq_length()
            edits = cache.take_edits(hidden.shape[1])
            call = ForwardCall(cache_edits=edits, cached_tokens=cached)
            found.append(forward(hidden, call, lambda: self.adapters, cache, bool(cached)))
        return found

    def let_go_on(self) -> None:
        """Lets every thread go on that has its answer; begins the next stage after all."""
        while ready := [caller for caller in self.callers if caller.may_go_on]:
            self.let(ready[0])
        if self.callers and all(caller.found is not None for caller in self.callers):
            found = [tensor for caller in self.callers for tensor in caller.found or ()]
            self.callers = []
            self.outputs = found if self.stage == 0 else self.outputs
            self.found += [tensor.detach() for tensor in found]
            self.stage, self.losses_of_stage = (self.stage + 1) % 3, 0
            if self.stage == 0:
                self.compare()

    def compare(self) -> None:
        """All that a step found is bitwise the reference's."""
        wanted = REFERENCE.found(self.step)
        assert len(self.found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(self.found, wanted, strict=True))
        self.found = []
        self.step += 1

    @precondition(lambda self: self.wire.answers)
    @rule(which=st.integers(0, 3))
    def client_receives(self, which: int) -> None:
        answers = self.wire.answers
        self.receive(answers.pop(which % len(answers)))

    @rule(now=st.integers(0, 3))
    def connection_breaks(self, now: int) -> None:
        """What was under way is lost; the trunk may not have noticed yet."""
        if now:
            return
        COUNTS["breaks"] += 1
        self.old.append(self.wire)
        del self.old[:-2]
        self.epoch += 1
        resume = pb.Open(resume_session_id=self.session_id, epoch=self.epoch)
        self.wire = self.connect(resume)
        self.put_missing()

    @precondition(lambda self: self.losses_of_stage < _LOSSES_OF_A_STAGE)
    @rule(now=st.integers(0, 7))
    def trunk_is_lost(self, now: int) -> None:
        """Killed and started again: it knows no session; what was not answered is asked there."""
        if now:
            return
        COUNTS["lost_sessions"] += 1
        self.losses, self.losses_of_stage = self.losses + 1, self.losses_of_stage + 1
        self.drop_all()
        self.registry = SessionRegistry(TRUNK, LIMITS, self.scheduler)  # type: ignore[arg-type]
        self.wire, self.epoch = self.connect(pb.Open.FromString(OPEN.SerializeToString())), 1
        self.next_id = 2
        waiting, self.pending = list(self.pending.values()), {}
        for pending in waiting:
            self.give_id(pending)
        self.put_missing()

    # The network and the trunk

    @precondition(lambda self: self.wire.sent)
    @rule()
    def frame_arrives(self) -> None:
        """The first: a stream keeps their order."""
        self.wire.frames.put_nowait(self.wire.sent.pop(0))
        self.settle()

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 3))
    def frame_is_repeated(self, which: int) -> None:
        COUNTS["repeats"] += 1
        self.put(sorted(self.pending)[which % len(self.pending)])

    @precondition(lambda self: any(wire.sent for wire in self.old))
    @rule()
    def frame_arrives_late(self) -> None:
        """On a connection that was taken over: it may change nothing."""
        COUNTS["stale"] += 1
        wire = next(wire for wire in self.old if wire.sent)
        wire.frames.put_nowait(wire.sent.pop(0))
        self.settle()

    @precondition(lambda self: self.scheduler.queue)
    @rule()
    def trunk_computes(self) -> None:
        self.scheduler.compute()
        self.settle()

    @rule(ops=st.integers(1, 3))
    def all_goes_well(self, ops: int) -> None:
        """For a while: so that schedules get beyond their first step."""
        for _ in range(ops):
            self.go_on_well()

    def go_on_well(self) -> None:
        if not self.callers:
            self.client_goes_on()
        self.deliver_and_compute_all()
        while self.wire.answers:
            self.receive(self.wire.answers.pop(0))

    def teardown(self) -> None:
        """Whatever happened, the step is finished, and nothing is left of what it held."""
        if self.broken:
            return  # and has said so
        self.put_missing()
        while self.callers or self.stage:
            self.go_on_well()
        (session,) = self.registry.sessions()
        assert session.session_id == self.session_id and session.epoch == self.epoch
        assert not len(session.state.held)
        COUNTS["steps"] += self.step - 1
        self.drop_all()

    # How it is done

    def connect(self, message: pb.Open) -> Wire:
        frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        answers: list[bytes] = []

        async def incoming() -> AsyncIterator[bytes]:
            while (frame := await frames.get()) is not None:
                yield frame

        async def send(frame: bytes) -> None:
            answers.append(frame)

        def disconnect(stream: SessionStream) -> None:
            stream.give_up()
            stream.keeps_session = False
            next(w.task for w in self.old if w.stream is stream).cancel()

        peer = Peer("tenant", lambda: None)
        stream = SessionStream(self.registry, self.execution, peer, send, disconnect)
        wire = Wire(stream, LOOP.create_task(stream.serve(incoming())), frames, [], answers)
        frames.put_nowait(pb.SessionRequest(id=1, open=message).SerializeToString())
        self.settle()
        while not answers:
            self.scheduler.compute()
            self.settle()
        opened = pb.SessionResponse.FromString(answers.pop()).open
        assert opened.session_id, "the session is there"
        self.session_id = opened.session_id
        return wire

    def send(
        self, message: pb.SessionRequest, tensors: Mapping[str, Any] | None = None
    ) -> Future[Any]:
        """The link's: sends a request; its answer arrives in the future."""
        pending = _Pending(message, tensors or {})
        self.give_id(pending)
        self.put(message.id)
        return pending.future

    def wait(self, future: Future[Any]) -> Any:
        """The link's, in a thread of the client's."""
        return Caller.here.caller.wait(future)

    def ask(self, message: pb.SessionRequest, tensors: Mapping[str, Any]) -> Any:
        return self.wait(self.send(message, tensors))

    def give_id(self, pending: _Pending) -> None:
        pending.message.id, self.next_id = self.next_id, self.next_id + 1
        self.pending[pending.message.id] = pending

    def put(self, message_id: int) -> None:
        pending = self.pending[message_id]
        copy = pb.SessionRequest.FromString(pending.message.SerializeToString())
        copy.acknowledged = min(self.pending) - 1
        self.wire.sent.extend(to_frames(copy, pending.tensors))

    def put_missing(self) -> None:
        for message_id in sorted(self.pending):
            self.put(message_id)

    def receive(self, raw: bytes) -> None:
        incoming = Inbox(pb.SessionResponse, lambda _: 1 << 20, 1 << 20).feed(raw)
        assert incoming is not None
        answer = incoming.message
        if answer.id not in self.pending:
            return  # answered before
        pending = self.pending.pop(answer.id)
        if answer.WhichOneof("body") == "error":
            self.broken = not self.losses or answer.error.code not in _LOST
            assert not self.broken, answer
            COUNTS["asked_again"] += 1
            pending.future.set_exception(to_exception(answer.error))
        else:
            pending.future.set_result(incoming)
        self.let_go_on()

    def deliver_and_compute_all(self) -> None:
        for frame in self.wire.sent:
            self.wire.frames.put_nowait(frame)
        self.wire.sent.clear()
        self.settle()
        while self.scheduler.queue:
            self.scheduler.compute()
            self.settle()

    def drop_all(self) -> None:
        for wire in [*self.old, self.wire]:
            wire.task.cancel()
        self.settle()
        self.old.clear()
        while self.scheduler.queue:  # nobody waits for it any more
            self.scheduler.compute()
        self.settle()
        for session in self.registry.sessions():
            session.state.close()

    def settle(self) -> None:
        """Lets the event loop run until nothing happens any more."""
        LOOP.run_until_complete(_idle())


async def _idle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run(schedules: int) -> dict[str, float]:
    """Runs at least that many schedules; raises on the first that lost or doubled anything."""
    started = time.monotonic()
    while COUNTS["schedules"] < schedules:
        chosen = settings(
            max_examples=min(_AT_A_TIME, schedules),
            stateful_step_count=12,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(Network, settings=chosen)
        found = {**COUNTS, "seconds": round(time.monotonic() - started, 1)}
        sys.stderr.write(json.dumps(found) + "\n")
    LOOP.run_until_complete(LOOP.shutdown_asyncgens())
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)) + "\n")
