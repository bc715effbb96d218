"""How fast a tensor crosses from one process to another: ours, bare gRPC, protobuf, a socket.

One way over loopback, from the beginning of encoding to the decoded tensor on the other side, of
which a tiny message tells; nothing is subtracted, all ways take turns. One more way carries
bytes that are there already and are thrown away: what gRPC alone takes, whatever is done with it.

``python -m benchmarks.wire [--quick]``
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import grpc
import torch

from benchmarks.report import Claim, Row, Section, Spread, run_alone
from benchmarks.wire_receiver import (
    ACKNOWLEDGED,
    LENGTH,
    like_one_that_computes,
    receive,
    unlimited,
)
from client_service.connection import (
    CHANNEL_OPTIONS,
    SERVICE,
    SessionConnection,
    Traffic,
    open_channel,
)
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.tensor_bytes import as_bytes

LOG = logging.getLogger("benchmarks")

SIZES = (100_000, 1_500_000, 12_582_912, 26_000_000)
CLAIMED = 12_582_912  # the hidden states [8, 512, 768] in float32
BARE_BOUND, PROTOBUF_BOUND = 0.9, 2.5
WARM_UP = 3

OURS, BACK = "trunkline", "trunkline, trunk to client"
BARE, ALONE = "gRPC, bytes in and out", "gRPC alone, nothing encoded or decoded"
PROTOBUF, SOCKET = "gRPC, protobuf bytes field", "TCP socket"

_BARE_CHUNKS = (1024**2, 2 * 1024**2, 4 * 1024**2)

Way = Callable[[torch.Tensor], None]
"""Sends a tensor, returns when the other side has it."""


def measure(quick: bool = False) -> list[Section]:
    """Measures every way at every size.

    Args:
        quick: Few rounds.
    """
    rounds = 10 if quick else 60
    section = Section("wire", "One way over loopback, float32, tensor to tensor (GB/s)")
    with _ways() as ways:
        for size in SIZES:
            found = _rates(ways, torch.randn(size // 4), rounds)
            for way in (BARE, ALONE):  # each with the size of messages that suits it best
                sizes = [found.pop(_chunked(way, chunk)) for chunk in _BARE_CHUNKS]
                found[way] = max(sizes, key=lambda rate: rate.median)
            section.rows += [_row(size, way, found) for way in _SHOWN]
            if size == CLAIMED:
                section.claims = _claims(found)
    return [section]


_SHOWN = (OURS, BACK, BARE, ALONE, PROTOBUF, SOCKET)


def _row(size: int, way: str, found: dict[str, Spread]) -> Row:
    ratio = found[way].median / found[BARE].median
    return {"bytes": size, "way": way, "GB/s": found[way], "of gRPC with bytes": ratio}


def _claims(found: dict[str, Spread]) -> list[Claim]:
    ours, at = found[OURS].median, f"at {CLAIMED / 1e6:.1f} MB, ours over"
    return [
        Claim(f"{at} gRPC with bytes", ours / found[BARE].median, BARE_BOUND, at_most=False),
        Claim(f"{at} a protobuf field", ours / found[PROTOBUF].median, PROTOBUF_BOUND, False),
    ]


def _rates(ways: dict[str, Way], tensor: torch.Tensor, rounds: int) -> dict[str, Spread]:
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(WARM_UP + rounds):
        # In another order each time: a way that follows itself, or its like, is served warm.
        for name in random.Random(turn).sample(list(ways), len(ways)):
            began = time.perf_counter()
            ways[name](tensor)
            if turn >= WARM_UP:
                rates[name].append(tensor.nbytes / (time.perf_counter() - began) / 1e9)
    return {name: Spread.of(values) for name, values in rates.items()}


@contextmanager
def _ways() -> Iterator[dict[str, Way]]:
    """Starts the receiving process and connects to it in every way."""
    like_one_that_computes()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs,), daemon=True)
    process.start()
    our_port, their_port, socket_port = ours.recv()
    address = f"127.0.0.1:{our_port}"
    channel = grpc.insecure_channel(f"127.0.0.1:{their_port}", options=unlimited(CHANNEL_OPTIONS))
    connection = SessionConnection(open_channel(address), address, Traffic(), lambda *_: None)
    with (
        closing(connection),
        socket.create_connection(("127.0.0.1", socket_port)) as raw,
        closing(_Stream(channel.stream_stream(f"{SERVICE}/PutTogether"))) as bare,
        closing(_Stream(channel.stream_stream(f"{SERVICE}/Bare"))) as alone,
        closing(_Stream(_protobuf_method(channel))) as protobuf,
    ):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        numbers = itertools.count(1)
        yield {
            OURS: lambda tensor: _send_ours(connection, numbers, tensor),
            **{_chunked(BARE, c): partial(_send_bare, bare, c) for c in _BARE_CHUNKS},
            **{_chunked(ALONE, c): partial(_send_made, alone, c) for c in _BARE_CHUNKS},
            PROTOBUF: lambda tensor: _send_protobuf(protobuf, tensor),
            SOCKET: lambda tensor: _send_raw(raw, tensor),
            BACK: lambda tensor: _fetch_ours(connection, numbers, tensor),
        }
    channel.close()
    ours.send(None)
    process.join(10)


def _chunked(way: str, chunk: int) -> str:
    return f"{way} ({chunk})"


def _protobuf_method(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        f"{SERVICE}/Protobuf",
        request_serializer=pb.SessionRequest.SerializeToString,
        response_deserializer=pb.SessionResponse.FromString,
    )


class _Stream:
    """A stream as :class:`SessionConnection` makes it: a queue to write, a thread that reads."""

    def __init__(self, method: Any) -> None:
        self.outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = method(iter(self.outgoing.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for answer in self._call:
                self.answers.put(answer)
            self.answers.put(None)
        except grpc.RpcError as error:
            self.answers.put(error)

    def answer(self) -> Any:
        answer = self.answers.get()
        if isinstance(answer, grpc.RpcError):
            raise answer
        return answer

    def close(self) -> None:
        self.outgoing.put(None)
        self.answers.get()  # that of _read, at the end


def _send_ours(connection: SessionConnection, numbers: Iterator[int], tensor: torch.Tensor) -> None:
    request = pb.SessionRequest(id=next(numbers), forward=pb.Forward())
    connection.send(request, {"hidden": tensor}).result()


def _fetch_ours(
    connection: SessionConnection, numbers: Iterator[int], tensor: torch.Tensor
) -> None:
    """The tiny message goes first here: it asks for a tensor of the same size."""
    wanted = pb.Forward(request_id=str(tensor.nbytes))
    answer = connection.send(pb.SessionRequest(id=next(numbers), forward=wanted), {}).result()
    assert answer.tensors["hidden"].nbytes == tensor.nbytes


def _send_bare(stream: _Stream, chunk: int, tensor: torch.Tensor) -> None:
    stream.outgoing.put(LENGTH.pack(tensor.nbytes))
    for piece in _pieces(tensor, chunk):
        stream.outgoing.put(piece)
    assert stream.answer() == ACKNOWLEDGED


_made: dict[tuple[int, int], list[bytes]] = {}


def _send_made(stream: _Stream, chunk: int, tensor: torch.Tensor) -> None:
    made = _made.get((tensor.nbytes, chunk))
    if made is None:
        made = _made[tensor.nbytes, chunk] = list(_pieces(tensor, chunk))
    stream.outgoing.put(LENGTH.pack(tensor.nbytes))
    for piece in made:
        stream.outgoing.put(piece)
    assert stream.answer() == ACKNOWLEDGED


def _pieces(tensor: torch.Tensor, chunk: int) -> Iterator[bytes]:
    view = as_bytes(tensor)
    return (bytes(view[i : i + chunk]) for i in range(0, view.nbytes, chunk))


def _send_protobuf(stream: _Stream, tensor: torch.Tensor) -> None:
    stream.outgoing.put(pb.SessionRequest(id=1, data=tensor.numpy().tobytes()))
    assert stream.answer().id == 1


def _send_raw(connection: socket.socket, tensor: torch.Tensor) -> None:
    connection.sendall(LENGTH.pack(tensor.nbytes))
    connection.sendall(as_bytes(tensor))
    assert connection.recv(1) == ACKNOWLEDGED


if __name__ == "__main__":
    run_alone(measure, __doc__)
