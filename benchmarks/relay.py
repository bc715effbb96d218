"""A slow network: a TCP relay that limits the rate and adds latency, each direction by itself.

A chunk that was read leaves when the link is free, takes its bytes' time on it, and arrives the
one-way latency later. The link holds a bounded number of bytes; then nothing more is read, so that
whoever sends is slowed down as by a real one. All connections share the link.

``python -m benchmarks.relay`` checks how exactly it keeps rate and latency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.report import Claim, Row, Section, Spread

LOG = logging.getLogger("relay")

_CHUNK_BYTES = 16 * 1024
_SOCKET_BYTES = 64 * 1024
_BULK_S, _PINGS = 2.0, 20


@dataclass(frozen=True)
class Link:
    """A network between two places."""

    bits_per_s: float
    round_trip_s: float

    def __str__(self) -> str:
        rate = self.bits_per_s / 1e6
        shown = f"{rate / 1e3:g} Gbit/s" if rate >= 1e3 else f"{rate:g} Mbit/s"
        return f"{shown}, {self.round_trip_s * 1e3:g} ms"

    @property
    def latency_s(self) -> float:
        """One way."""
        return self.round_trip_s / 2

    @property
    def held_bytes(self) -> int:
        """What may be under way in one direction, or wait for its turn."""
        return round(2 * self.bits_per_s / 8 * self.latency_s) + 4 * _SOCKET_BYTES


LINKS = (Link(1e9, 0.002), Link(100e6, 0.020), Link(20e6, 0.060))


class Direction:
    """One direction of a link, which all connections share."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at = self._held = 0.0
        self._changed = threading.Condition()

    def enter(self, count: int) -> float:
        """Takes bytes onto the link, waiting for room; returns when they arrive."""
        link = self._link
        with self._changed:
            self._changed.wait_for(lambda: self._held < link.held_bytes)
            self._held += count
            self._free_at = max(self._free_at, time.monotonic()) + 8 * count / link.bits_per_s
            return self._free_at + link.latency_s

    def leave(self, count: int) -> None:
        """Bytes have arrived."""
        with self._changed:
            self._held -= count
            self._changed.notify()


class _Pipe:
    """Bytes from one socket to another, over a direction of the link."""

    def __init__(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        self._source, self._sink, self._direction = source, sink, direction
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._more = threading.Semaphore(0)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        data = b"-"
        while data:
            try:
                data = self._source.recv(_CHUNK_BYTES)
            except OSError:
                data = b""
            self._under_way.append((self._direction.enter(len(data)), data))
            self._more.release()

    def _write(self) -> None:
        broken = False
        while True:
            self._more.acquire()
            due, data = self._under_way.popleft()
            if (early_s := due - time.monotonic()) > 0:
                time.sleep(early_s)
            try:
                if data and not broken:
                    self._sink.sendall(data)
            except OSError:
                broken = True
                _end(self._source, socket.SHUT_RDWR)
            self._direction.leave(len(data))
            if not data:
                _end(self._sink, socket.SHUT_WR)
                return


def _end(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)


def _small_buffers(sock: socket.socket) -> None:
    # What the kernel would take in by itself is not under way on the link.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)


def serve(target: str, link: Link) -> None:
    """Relays from a free port, which it writes to standard output, until standard input ends."""
    sys.setswitchinterval(0.0005)
    # It stands for a network, which is not slower because the hosts compute.
    with contextlib.suppress(OSError):
        os.nice(-10)
    host, _, port = target.rpartition(":")
    up, down = Direction(link), Direction(link)
    with socket.socket() as listener:
        _small_buffers(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        while True:
            client, _ = listener.accept()
            server = socket.socket()
            _small_buffers(server)
            try:
                server.connect((host, int(port)))
            except OSError as error:
                LOG.warning("%s does not answer: %s", target, error)
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _Pipe(client, server, up)
            _Pipe(server, client, down)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


@contextmanager
def relay(target: str, link: Link) -> Iterator[str]:
    """Starts a relay to ``HOST:PORT`` as a process of its own; yields its address."""
    options = json.dumps([target, link.bits_per_s, link.round_trip_s])
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.relay", "--serve", options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(timeout=10)
        process.stdout.close()


@contextmanager
def _peer(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            sock, _ = listener.accept()
            with sock:
                handle(sock)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(timeout=10)


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def bulk_rate(link: Link) -> float:
    """Bits a second that arrive of a long transfer, from its first byte to its last."""
    count = round(link.bits_per_s / 8 * _BULK_S)
    seen: list[tuple[float, int]] = []

    def drain(sock: socket.socket) -> None:
        while data := sock.recv(_CHUNK_BYTES):
            seen.append((time.monotonic(), len(data)))

    with _peer(drain) as target, relay(target, link) as address, _connect(address) as sock:
        sock.sendall(bytes(count))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    arrived = sum(n for _, n in seen[1:])
    return 8 * arrived / (seen[-1][0] - seen[0][0])


def ping_seconds(link: Link) -> list[float]:
    """Round trips of one byte."""

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(64):
            sock.sendall(data)

    taken = []
    with _peer(echo) as target, relay(target, link) as address, _connect(address) as sock:
        for _ in range(_PINGS):
            started = time.monotonic()
            sock.sendall(b"-")
            sock.recv(1)
            taken.append(time.monotonic() - started)
    return taken


def measure(quick: bool = False) -> list[Section]:
    """How exactly each link's rate and latency are kept."""
    section = Section("relay", "The slow networks: what the relay does of what it should")
    for link in LINKS[1:2] if quick else LINKS:
        rate = Spread.of([bulk_rate(link) for _ in range(1 if quick else 3)])
        ping = Spread.of(ping_seconds(link))
        section.rows.append(_row(link, rate, ping))
        off = abs(rate.median / link.bits_per_s - 1)
        late_ms = abs(ping.median - link.round_trip_s) * 1e3
        section.claims += [
            Claim(f"{link}: rate, off by", off, 0.03),
            Claim(f"{link}: round trip, ms off", late_ms, 2.0),
        ]
    return [section]


def _row(link: Link, rate: Spread, ping: Spread) -> Row:
    scaled = Spread(rate.median / 1e6, rate.least / 1e6, rate.most / 1e6, rate.count)
    ping_ms = Spread(ping.median * 1e3, ping.least * 1e3, ping.most * 1e3, ping.count)
    return {"link": str(link), "Mbit/s": scaled, "round trip ms": ping_ms}


def main() -> None:
    """Relays, or checks the relay."""
    logging.basicConfig(level="INFO", format="%(message)s")
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    arguments.add_argument("--quick", action="store_true", help="less often, to see that it runs")
    given = arguments.parse_args()
    if given.serve:
        target, bits_per_s, round_trip_s = json.loads(given.serve)
        serve(target, Link(bits_per_s, round_trip_s))
    for section in measure(given.quick):
        LOG.info("%s", section.as_markdown())


if __name__ == "__main__":
    main()
