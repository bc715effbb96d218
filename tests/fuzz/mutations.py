"""Harm to the bytes of frames that were valid: what a broken or a malicious encoder might send."""

from __future__ import annotations

import random
from collections.abc import Callable

MAX_FRAME = 3 * 1024 * 1024
"""The trunk's cap on a frame; beyond it gRPC itself answers."""

_INTERESTING = (
    b"\xff" * 10,  # a varint that does not end within ten bytes
    b"\xff" * 9 + b"\x01",  # the largest varint
    b"\x80" * 10 + b"\x01",  # eleven bytes
    b"\x80\x80\x80\x80\x00",  # zero, in five bytes
    b"\x00",  # field number 0
    b"\x0b\x0c",  # an empty group
    b"\x0b" * 200,  # groups in groups
    b"\x0e\x0f",  # wire types that do not exist
    b"\x7a\xff\xff\xff\xff\x0f",  # data of 4 GiB that is not there
    b"\x7a\x00",  # empty data
    b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a tensor of 2**63 - 1 bytes
    b"\xed\xa0\x80",  # half a surrogate pair
    b"\xf8\x88\x80\x80\x80",  # UTF-8 as it once was
    b"\x80\x01\x07",  # acknowledged
    b"\x80\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # everything is acknowledged
)


def mutate(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """Harms a few frames of a sequence, or their order; the given list is not changed."""
    frames = list(frames)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if rng.random() < 0.25:
            _harm_order(frames, rng)
        else:
            # Mostly not the first: without a session nothing behind it is reached.
            first = 0 if rng.random() < 0.2 or len(frames) < 2 else 1
            index = rng.randrange(first, len(frames))
            frames[index] = harm(frames[index], rng)[:MAX_FRAME]
    return frames


def harm(frame: bytes, rng: random.Random) -> bytes:
    """Harms the bytes of one frame."""
    return rng.choice(_HARMS)(frame, rng)


def _flip_bits(frame: bytes, rng: random.Random) -> bytes:
    harmed = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 8)) if frame else 0):
        harmed[_position(frame, rng)] ^= 1 << rng.randrange(8)
    return bytes(harmed)


def _set_byte(frame: bytes, rng: random.Random) -> bytes:
    harmed = bytearray(frame)
    if frame:
        harmed[_position(frame, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(harmed)


def _truncate(frame: bytes, rng: random.Random) -> bytes:
    return frame[: rng.randrange(len(frame) + 1)]


def _insert(frame: bytes, rng: random.Random) -> bytes:
    at = _position(frame, rng) if frame else 0
    return frame[:at] + rng.choice(_INTERESTING) + frame[at:]


def _append(frame: bytes, rng: random.Random) -> bytes:
    return frame + rng.choice(_INTERESTING)


def _cut_out(frame: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(frame) + 1)
    return frame[:start] + frame[start + rng.randrange(1, 16) :]


def _repeat_piece(frame: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(frame) + 1)
    piece = frame[start : start + rng.randrange(1, 64)]
    return frame[:start] + piece * rng.choice((2, 3, 50)) + frame[start:]


def _overwrite(frame: bytes, rng: random.Random) -> bytes:
    noise = rng.randbytes(rng.randrange(1, 12))
    at = _position(frame, rng) if frame else 0
    return frame[:at] + noise + frame[at + len(noise) :]


def _splice(frame: bytes, rng: random.Random) -> bytes:
    cut, other = rng.randrange(len(frame) + 1), rng.randrange(len(frame) + 1)
    return frame[:cut] + frame[other:]


def _position(frame: bytes, rng: random.Random) -> int:
    # The small fields come first; behind them is data, where a flip only changes a number.
    near = min(len(frame), 160) if rng.random() < 0.8 else len(frame)
    return rng.randrange(near)


def _harm_order(frames: list[bytes], rng: random.Random) -> None:
    index, other = rng.randrange(len(frames)), rng.randrange(len(frames))
    match rng.randrange(5):
        case 0:
            frames.insert(other, frames[index])
        case 1:
            frames[index], frames[other] = frames[other], frames[index]
        case 2 if len(frames) > 1:
            del frames[index]
        case 3:
            # The end of one frame behind the beginning of another.
            cut = rng.randrange(len(frames[index]) + 1)
            frames[index] = (frames[index][:cut] + frames[other][cut:])[:MAX_FRAME]
        case _:
            frames[index] = (frames[index] + frames[other])[:MAX_FRAME]  # which protobuf merges


_HARMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bits,
    _flip_bits,
    _set_byte,
    _truncate,
    _insert,
    _append,
    _cut_out,
    _repeat_piece,
    _overwrite,
    _splice,
)
