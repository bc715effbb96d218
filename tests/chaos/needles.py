"""A secret in every form in which it might be written, and the search for it in bytes."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

# Of a secret, this much in a row is a find: less may be chance, more may have been cut apart.
_CHARACTERS, _IDS = 10, 4
# Smaller ids are mostly zeros in most forms, as much else is.
SMALLEST_ID = 256
_VARINT_BITS = 7
_CHUNK_BYTES = 1 << 22


class Needles:
    """What to look for: every piece of the secret in every form, all in one pass over the bytes.

    Args:
        text: The secret, of characters that JSON does not escape.
        ids: Its token ids.
    """

    def __init__(self, text: str, ids: list[int]) -> None:
        forms: dict[str, set[bytes]] = {}
        for start in range(len(text) - _CHARACTERS + 1):
            for name, form in _text_forms(text[start : start + _CHARACTERS]):
                forms.setdefault(name, set()).add(form)
        for start in range(len(ids) - _IDS + 1):
            if min(ids[start : start + _IDS]) < SMALLEST_ID:
                continue
            for name, form in _id_forms(ids[start : start + _IDS]):
                forms.setdefault(name, set()).add(form)
        self.forms: Mapping[str, set[bytes]] = forms
        # Four bytes of each needle are its key; two of them are looked up in a table first.
        self._by_key: dict[int, list[tuple[str, bytes, int]]] = {}
        self._likely = np.zeros(1 << 16, dtype=bool)
        for name, needle in ((n, f) for n, found in forms.items() for f in found):
            offset = _telling_offset(needle)
            key = int.from_bytes(needle[offset : offset + 4], "little")
            self._by_key.setdefault(key, []).append((name, needle, offset))
            self._likely[key & 0xFFFF] = True
        self._keys = np.array(sorted(self._by_key), dtype=np.uint32)
        self._longest = max(len(form) for found in forms.values() for form in found)

    def found_in(self, haystack: bytes | bytearray) -> set[str]:
        """The forms that occur."""
        found: set[str] = set()
        for start in range(0, len(haystack), _CHUNK_BYTES):
            # A needle may begin in one chunk and end in the next.
            found |= self._found_in_chunk(
                bytes(haystack[max(0, start - self._longest) : start + _CHUNK_BYTES])
            )
        return found

    def _found_in_chunk(self, chunk: bytes) -> set[str]:
        values = np.frombuffer(chunk, dtype=np.uint8)
        found: set[str] = set()
        for parity in (0, 1):
            pairs = values[parity : parity + (len(values) - parity) // 2 * 2].view("<u2")
            places = np.flatnonzero(self._likely[pairs]) * 2 + parity
            places = places[places + 4 <= len(values)]
            quads = sum(values[places + i].astype(np.uint32) << (8 * i) for i in range(4))
            for place in places[np.isin(quads, self._keys)]:
                key = int.from_bytes(chunk[place : place + 4], "little")
                for name, needle, offset in self._by_key[key]:
                    begin = int(place) - offset
                    if begin >= 0 and chunk[begin : begin + len(needle)] == needle:
                        found.add(name)
        return found


def _telling_offset(needle: bytes) -> int:
    """Where two bytes in a row are not zero, which memory is full of."""
    offsets = range(len(needle) - 3)
    return next((o for o in offsets if needle[o] and needle[o + 1]), 0)


def _text_forms(piece: str) -> Iterator[tuple[str, bytes]]:
    plain = piece.encode()
    yield "UTF-8", plain
    yield "UTF-16", piece.encode("utf-16-le")
    yield "hexadecimal", plain.hex().encode()
    for skipped in range(3):
        # What of base64 does not depend on the bytes around.
        whole = (len(plain) - skipped) // 3 * 3
        yield "base64", base64.b64encode(plain[skipped : skipped + whole])


def _id_forms(ids: list[int]) -> Iterator[tuple[str, bytes]]:
    for name, code in (("int64", "q"), ("int32", "i"), ("int16", "h"), ("float32", "f")):
        yield name, struct.pack(f"<{len(ids)}{code}", *ids)
        yield f"{name} big-endian", struct.pack(f">{len(ids)}{code}", *ids)
    yield "varints", b"".join(_varint(i) for i in ids)
    yield "JSON", json.dumps(ids)[1:-1].encode()
    yield "JSON without spaces", json.dumps(ids, separators=(",", ":"))[1:-1].encode()
    yield "lines", "\n".join(map(str, ids)).encode()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >> _VARINT_BITS:
        encoded.append(value & 0x7F | 0x80)
        value >>= _VARINT_BITS
    encoded.append(value)
    return bytes(encoded)


def readable_memory(pid: int) -> Iterator[bytes]:
    """The memory of a process, by mapping; what the kernel does not give is left out."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
        ranges = [line.split() for line in maps]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for fields in ranges:
            if not fields[1].startswith("rw"):
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except (OSError, OverflowError):
                continue
            if data.count(0) < len(data):  # arenas that were never touched
                yield data


def search(needles: Needles, places: Iterable[tuple[str, bytes | bytearray]]) -> list[str]:
    """Where which form was found."""
    return [f"{name}: {form}" for name, data in places for form in sorted(needles.found_in(data))]
