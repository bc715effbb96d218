"""The instruments of the experiments measure what they are said to."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from tests.chaos.metrics import MetricsTail
from tests.chaos.needles import Needles, readable_memory
from tests.chaos.relay import Relay
from tests.chaos.report import percentile
from tests.patience import PATIENCE_S

LETTERS, IDS = "QX7PM2ZK9WTB4", [964, 308, 1391, 747, 1297]


@pytest.mark.parametrize(
    ("hidden", "form"),
    [
        (LETTERS[1:12].encode(), "UTF-8"),
        (f"say {LETTERS}".encode("utf-16-le"), "UTF-16"),
        (struct.pack("<4q", *IDS[:4]), "int64"),
        (struct.pack("<4i", *IDS[1:]), "int32"),
        (json.dumps({"ids": IDS}).encode(), "JSON"),
        (bytes([0xC4, 0x07, 0xB4, 0x02, 0xEF, 0x0A, 0xEB, 0x05]), "varints"),
    ],
)
def test_a_secret_is_found_across_the_pieces_that_are_searched(hidden: bytes, form: str) -> None:
    needles = Needles(LETTERS, IDS)
    for before in (0, 5, (1 << 22) - 7):
        assert needles.found_in(bytes(before) + hidden + bytes(9)) == {form}
    assert not needles.found_in(os.urandom(1 << 20))


def test_memory_of_a_process_is_read() -> None:
    secret = os.urandom(32)
    assert any(secret in data for data in readable_memory(os.getpid()))


def test_lines_that_a_resumed_run_writes_again_are_new(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.look() == []
    path.write_text('{"step": 1, "at": 0}\n{"step": 2, "at": 0}\n{"step": 3, "a')
    assert [line["step"] for line in tail.look()] == [1, 2]
    path.write_text('{"step": 1, "at": 0}\n{"step": 2, "at": 1}\n{"step": 3, "at": 1}\n')
    assert [line["step"] for line in tail.look()] == [2, 3]
    assert (tail.last_step, tail.written) == (3, 4)


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (percentile(values, 0.95), percentile(values, 0.5), percentile([7.0], 0.95)) == (
        95.0,
        50.0,
        7.0,
    )


def test_a_relay_goes_silent_goes_on_and_cuts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", record=True)
        host, _, port = relay.address.rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"heard")
                assert accepted.recv(5) == b"heard"
                relay.freeze()
                client.sendall(b"late")
                pause = threading.Event()
                while b"heardlate" not in map(bytes, relay.recorded):
                    pause.wait(0.01)
                relay.freeze()  # once more: what the relay began with those bytes has come to rest
                accepted.setblocking(False)
                with pytest.raises(BlockingIOError):
                    accepted.recv(4)
                relay.thaw()
                accepted.settimeout(PATIENCE_S)
                assert accepted.recv(4) == b"late"
                relay.cut()
                for end in (client, accepted):
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)
        relay.close()
        assert b"heardlate" in [bytes(stream) for stream in relay.recorded]
    assert "relay" not in {thread.name for thread in threading.enumerate()}
