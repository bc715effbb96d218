"""Training text as blocks of token ids, in an order that a seed fixes.

Dimension letters: B batch, T tokens, N blocks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shared.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl")


def read_texts(path: str | Path) -> list[str]:
    """Reads documents: a text file is one, a JSON line is one, a folder is all of its files'.

    A JSON line has ``text``, or ``prompt`` and ``completion``.

    Raises:
        DataError: If nothing is there, a file is not text, or a line is not as described.
    """
    path = Path(path)
    if os.path.isdir(path):
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path}: no {' or '.join(SUFFIXES)} files in this folder")
        return [text for file in files for text in read_texts(file)]
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: accepted are {', '.join(SUFFIXES)} and folders of them")
    texts = _documents(path, _decode(path))
    if not any(text.strip() for text in texts):
        raise DataError(f"{path}: is empty")
    return texts


def token_blocks(texts: list[str], tokenizer: Any, seq_len: int) -> torch.Tensor:
    """Joins documents by the end-of-text token and cuts them into blocks.

    Args:
        texts: Documents.
        tokenizer: A Hugging Face tokenizer.
        seq_len: Tokens of a block.

    Returns:
        Token ids [N, T]; the rest that fills no block is left out.

    Raises:
        DataError: If there are fewer tokens than one block.
    """
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    count = len(ids) // seq_len
    if count == 0:
        raise DataError(f"{len(ids)} tokens of text are fewer than one block of {seq_len}")
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def batches(
    blocks_NT: torch.Tensor, batch_size: int, seed: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Yields batches [B, T] without end; every pass over the blocks in a new seeded order.

    Args:
        blocks_NT: Token ids.
        batch_size: Blocks of a batch; at most all of them.
        seed: Fixes the order.
        start: Batches to leave out, as taken before.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(blocks_NT))
    passes, taken = divmod(start, len(blocks_NT) // batch_size)
    for _ in range(passes):
        torch.randperm(len(blocks_NT), generator=generator)
    while True:
        order = torch.randperm(len(blocks_NT), generator=generator)
        for first in range(taken * batch_size, len(order) - batch_size + 1, batch_size):
            yield blocks_NT[order[first : first + batch_size]]
        taken = 0


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if b"\0" in raw:
        raise DataError(f"{path}: holds zero bytes, so it is not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _documents(path: Path, content: str) -> list[str]:
    if path.suffix == ".txt":
        return [content]
    lines = ((n, line) for n, line in enumerate(content.splitlines(), 1) if line.strip())
    return [_json_document(path, number, line) for number, line in lines]


def _json_document(path: Path, number: int, line: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not JSON ({error})") from error
    if isinstance(entry, dict):
        pair = entry.get("prompt"), entry.get("completion")
        parts: tuple[Any, ...] = (entry["text"],) if isinstance(entry.get("text"), str) else pair
        if all(isinstance(part, str) for part in parts):
            return _checked(path, number, "".join(parts))
    raise DataError(f'{path}:{number}: accepted is {{"text"}} or {{"prompt", "completion"}}')


def _checked(path: Path, number: int, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}:{number}: half a surrogate pair is not text") from error
    return text
