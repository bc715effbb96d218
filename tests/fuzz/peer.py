"""Plays scripts against a daemon over raw gRPC, and judges how each call was answered."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.fuzz.script import GET_INFO, SESSION_ID, Script, Stream
from tests.patience import PATIENCE_S

BREAK_OFF_AFTER_S = 20.0
"""A stream that is still answered then is left: the trunk reads a client slower that goes on
sending what is over its quota. One that is not answered is waited for until it must be hanging."""
_NO_MESSAGE_S = 2.0

_TYPED = frozenset({
    "OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "ABORTED", "OUT_OF_RANGE",
    "UNAUTHENTICATED", "FAILED_PRECONDITION",
})  # fmt: skip
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]

_GRPC_OWN = re.compile(
    # A unary call with no message, or two: gRPC for Python says so without asking the service.
    r"Missing request|Too many|Cardinality violation|Exceeded maximum.*message"
)


@dataclass
class Outcome:
    """How the calls of a script ended."""

    codes: Counter[str] = field(default_factory=Counter)
    """Answers by kind, errors by code."""
    statuses: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    streams: int = 0
    grpc_own: Counter[str] = field(default_factory=Counter)
    """Statuses that gRPC gives by itself, which the service does not see."""
    faults: list[str] = field(default_factory=list)
    """What must not happen."""


def play(address: str, script: Script) -> Outcome:
    """Makes a script's calls one after the other, over a connection of its own."""
    outcome = Outcome()
    gzip = any(stream.gzip for stream in script.streams)
    compression = grpc.Compression.Gzip if gzip else grpc.Compression.NoCompression
    session_id = SESSION_ID
    with grpc.insecure_channel(address, options=_OPTIONS, compression=compression) as channel:
        for stream in script.streams:
            session_id = _call(channel, stream, session_id, outcome)
    outcome.faults = [f"{script.name}: {fault}" for fault in outcome.faults]
    return outcome


def _call(channel: grpc.Channel, stream: Stream, session_id: str, outcome: Outcome) -> str:
    frames = [f.replace(SESSION_ID.encode(), session_id.encode()) for f in stream.frames]
    outcome.streams += 1
    outcome.frames += len(frames)
    cancelled = slowed_down = False
    deadline_s = _NO_MESSAGE_S if _lacks_its_message(stream) else PATIENCE_S
    call: Any = channel.stream_stream(stream.method)(
        iter(frames), timeout=deadline_s, metadata=stream.metadata or None
    )
    answered, started = 0, time.monotonic()
    try:
        for raw in call:
            session_id = _judge_answer(stream, raw, outcome) or session_id
            answered += 1
            slowed_down = time.monotonic() - started > BREAK_OFF_AFTER_S
            if slowed_down or answered == stream.cancel_after:
                cancelled = call.cancel()
    except grpc.RpcError:
        pass
    name = call.code().name
    if slowed_down and name == "CANCELLED":
        outcome.statuses["SLOWED_DOWN"] += 1
    else:
        _judge_status(stream, name, call.details() or "", cancelled, outcome)
    return session_id


def _lacks_its_message(stream: Stream) -> bool:
    return stream.method == GET_INFO and not stream.frames


def _judge_answer(stream: Stream, raw: bytes, outcome: Outcome) -> str:
    """Counts an answer; returns the id of the session that it opened, if it did."""
    if not stream.method.endswith("/Session"):
        outcome.codes["info"] += 1
        return ""
    try:
        answer = pb.SessionResponse.FromString(raw)
    except DecodeError as error:
        outcome.faults.append(f"an answer that is no message: {error}")
        return ""
    kind = answer.WhichOneof("body") or "more"
    if kind != "error":
        outcome.codes[kind] += 1
        return answer.open.session_id
    code = answer.error.code
    known = code in pb.ErrorCode.values()
    name = pb.ErrorCode.Name(code).removeprefix("ERROR_CODE_") if known else str(code)
    outcome.codes[name] += 1
    if not known or code in (pb.ERROR_CODE_UNSPECIFIED, pb.ERROR_CODE_INTERNAL):
        outcome.faults.append(f"error {name}: {answer.error.message[:200]}")
    if len(answer.error.message) > 100_000:
        outcome.faults.append(f"an error message of {len(answer.error.message)} characters")
    return ""


def _judge_status(
    stream: Stream, name: str, details: str, cancelled: bool, outcome: Outcome
) -> None:
    outcome.statuses[name] += 1
    if name in _TYPED or (cancelled and name == "CANCELLED"):
        return
    if _GRPC_OWN.search(details):
        outcome.grpc_own[f"{name}: {details[:120]}"] += 1
    elif name == "DEADLINE_EXCEEDED" and _lacks_its_message(stream):
        # gRPC for Python waits for the message of a unary call for as long as the client does.
        outcome.grpc_own["DEADLINE_EXCEEDED: a unary call without its message"] += 1
    elif name == "DEADLINE_EXCEEDED":
        outcome.faults.append("hang: no end of the stream before its deadline")
    else:
        outcome.faults.append(f"status {name}: {details[:200]}")
