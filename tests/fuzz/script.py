"""What one fuzzed peer does: streams of frames, as data that can be written down and replayed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SESSION = "/trunkline.v1.TrunkService/Session"
GET_INFO = "/trunkline.v1.TrunkService/GetInfo"

SESSION_ID = "f" * 31 + "0"
"""Stands in frames for the id of the session that an earlier stream of the script opened.

As long as a real one, so that putting that one in leaves every length in the frame right.
"""


@dataclass
class Stream:
    """One gRPC call."""

    frames: list[bytes]
    method: str = SESSION
    cancel_after: int | None = None
    """Breaks off after so many answers, where others end the stream and wait for the rest."""
    gzip: bool = False
    """Lets gRPC compress the frames: a small one may be a vast one."""
    metadata: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Script:
    """The calls of one peer, one after the other."""

    name: str
    streams: list[Stream]


def write_scripts(path: Path, facts: dict[str, Any], scripts: Iterable[Script]) -> None:
    """Writes scripts with what was found, for ``--replay``."""
    packed = [asdict(script) for script in scripts]
    for script in packed:
        for stream in script["streams"]:
            stream["frames"] = [_pack(frame) for frame in stream["frames"]]
    path.write_text(json.dumps({**facts, "scripts": packed}, indent=1), encoding="utf-8")


def read_scripts(path: Path) -> list[Script]:
    """Reads what :func:`write_scripts` wrote."""
    found = []
    for script in json.loads(path.read_text(encoding="utf-8"))["scripts"]:
        streams = []
        for stream in script["streams"]:
            stream["frames"] = [_unpack(frame) for frame in stream["frames"]]
            stream["metadata"] = [(key, value) for key, value in stream["metadata"]]
            streams.append(Stream(**stream))
        found.append(Script(script["name"], streams))
    return found


def _pack(frame: bytes) -> str:
    return base64.b64encode(zlib.compress(frame)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
