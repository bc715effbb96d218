"""A secret in every form in which it might be written, and the search for it in bytes."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator, Mapping

# Of a secret, this much in a row is a find: less may be chance, more may have been cut apart.
_CHARACTERS, _IDS = 10, 4
_MAX_VARINT_BITS = 7


class Needles:
    """What to look for.

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
            for name, form in _id_forms(ids[start : start + _IDS]):
                forms.setdefault(name, set()).add(form)
        self.forms: Mapping[str, set[bytes]] = forms

    def found_in(self, haystack: bytes | bytearray) -> list[str]:
        """The forms that occur."""
        return [n for n, forms in self.forms.items() if any(f in haystack for f in forms)]


def _text_forms(piece: str) -> Iterator[tuple[str, bytes]]:
    plain = piece.encode()
    yield "UTF-8", plain
    yield "UTF-16", piece.encode("utf-16-le")
    yield "UTF-32", piece.encode("utf-32-le")
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
    while value >> _MAX_VARINT_BITS:
        encoded.append(value & 0x7F | 0x80)
        value >>= _MAX_VARINT_BITS
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
                yield memory.read(end - start)
            except (OSError, OverflowError):
                continue


def search(needles: Needles, places: Iterable[tuple[str, bytes | bytearray]]) -> list[str]:
    """Where which form was found."""
    return [f"{name}: {form}" for name, data in places for form in needles.found_in(data)]
