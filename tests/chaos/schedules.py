"""Every schedule of an unfriendly network against a reference that sees each message once.

The trunk's side is real (stream, kept answers, registry, session, a tiny GPT-2 block with LoRA),
and so is the client's journal. What is driven by hand is time: a rule delivers a frame, computes a
queued request, hands an answer over, repeats or loses any of them, breaks the connection, delivers
frames to a connection that was taken over, or makes the trunk forget the session. The reference is
a second session that is given each message exactly once and in order.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from client_service.journal import Journal
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.messages import Inbox, to_frames
from tests.chaos.reference import LIMITS, LOOP, MICROS, OPEN, REFERENCE, TRUNK, messages, name_of
from trunk_service.execution import Execution
from trunk_service.identity import Peer
from trunk_service.registry import SessionRegistry
from trunk_service.stream import SessionStream

_AT_A_TIME = 5000
COUNTS = {"schedules": 0, "steps": 0, "breaks": 0, "lost_sessions": 0, "repeats": 0, "stale": 0}


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


class Network(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        COUNTS["schedules"] += 1
        self.scheduler = ManualScheduler()
        self.registry = SessionRegistry(TRUNK, LIMITS, self.scheduler)  # type: ignore[arg-type]
        self.execution = Execution(self.scheduler, self.registry.metrics)  # type: ignore[arg-type]
        self.journal = Journal(trainable=True)
        self.pending: dict[int, tuple[pb.SessionRequest, dict[str, torch.Tensor]]] = {}
        self.next_id, self.epoch = 2, 1
        self.step, self.stage = 1, 0
        self.old: list[Wire] = []
        self.wire = self.connect(pb.Open.FromString(OPEN.SerializeToString()))

    # The client

    @precondition(lambda self: not self.pending)
    @rule()
    def client_sends(self) -> None:
        """The next messages of the step: both forwards at once, both backwards, then the step."""
        first = MICROS * self.stage
        last = first + MICROS if self.stage < 2 else None
        for message, tensors in messages(self.step)[first:last]:
            self.submit(message, tensors)

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
        for message_id in sorted(self.pending):
            self.put(message_id)

    @rule(now=st.integers(0, 7))
    def trunk_is_lost(self, now: int) -> None:
        """Killed and started again: it knows no session; the client sends its journal."""
        if now:
            return
        COUNTS["lost_sessions"] += 1
        self.drop_all()
        self.registry = SessionRegistry(TRUNK, LIMITS, self.scheduler)  # type: ignore[arg-type]
        self.wire, self.epoch = self.connect(pb.Open.FromString(OPEN.SerializeToString())), 1
        self.next_id = 2
        waiting, self.pending = list(self.pending.values()), {}
        for entry in self.journal.entries():
            message = pb.SessionRequest.FromString(entry.message.SerializeToString())
            message.id, message.acknowledged = self.next_id, self.next_id - 1
            self.next_id += 1
            self.wire.sent.extend(to_frames(message, entry.tensors))
            self.deliver_and_compute_all()
            answer = pb.SessionResponse.FromString(self.wire.answers.pop())
            assert answer.WhichOneof("body") != "error", answer
        for message, tensors in waiting:
            self.submit(message, tensors)

    # The network and the trunk

    @precondition(lambda self: self.wire.sent)
    @rule(which=st.integers(0, 3))
    def frame_arrives(self, which: int) -> None:
        self.wire.frames.put_nowait(self.wire.sent.pop(which % len(self.wire.sent)))
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
            if not self.pending:
                self.client_sends()
            self.deliver_and_compute_all()
            while self.wire.answers:
                self.receive(self.wire.answers.pop(0))

    def teardown(self) -> None:
        """Whatever happened, the step is finished, and everything is as if nothing had."""
        self.put_missing()
        while self.pending or self.stage:
            if not self.pending:
                self.client_sends()
            self.deliver_and_compute_all()
            while self.wire.answers:
                self.receive(self.wire.answers.pop(0))
        (session,) = self.registry.sessions()
        assert session.session_id == self.session_id and session.epoch == self.epoch
        adapter = session.state.adapters.get("")
        assert adapter.committed.committed_step == self.step - 1
        mine, other = adapter.weights(), REFERENCE.weights[self.step - 1]
        assert all(torch.equal(mine[n], other[n]) for n in other)
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

    def submit(self, message: pb.SessionRequest, tensors: dict[str, torch.Tensor]) -> None:
        message.id, self.next_id = self.next_id, self.next_id + 1
        self.pending[message.id] = message, tensors
        message.acknowledged = min(self.pending) - 1
        self.put(message.id)

    def put(self, message_id: int) -> None:
        message, tensors = self.pending[message_id]
        copy = pb.SessionRequest.FromString(message.SerializeToString())
        copy.acknowledged = min(self.pending) - 1
        self.wire.sent.extend(to_frames(copy, tensors))

    def put_missing(self) -> None:
        for message_id in self.pending:
            self.put(message_id)

    def receive(self, raw: bytes) -> None:
        incoming = Inbox(pb.SessionResponse, lambda _: 1 << 20, 1 << 20).feed(raw)
        assert incoming is not None
        answer = incoming.message
        if answer.id not in self.pending:
            return  # answered before
        assert answer.WhichOneof("body") != "error", answer
        message, tensors = self.pending.pop(answer.id)
        self.journal.record(message, tensors)
        self.compare(message, tensors, answer, incoming.tensors)
        if not self.pending:
            self.stage = (self.stage + 1) % 3
            self.step += self.stage == 0

    def compare(self, message: Any, tensors: Any, answer: Any, received: Any) -> None:
        """Each answer is bitwise the reference's, which sees every message once."""
        kind = message.WhichOneof("body")
        expected, wanted = REFERENCE.answers(self.step)[name_of(message)]
        if kind != "backward":  # its norm is of the gradients so far, in the order they came
            assert getattr(answer, kind) == getattr(expected, kind), (answer, expected)
        assert received.keys() == wanted.keys()
        assert all(torch.equal(received[n], wanted[n]) for n in wanted)

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
