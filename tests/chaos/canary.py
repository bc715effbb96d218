"""A secret in the training text is nowhere on the trunk's side, nor on the wire.

Looked through: every byte both ways, the trunk's log, what it wrote to disk, its metrics, its
memory. The same search finds the secret where it is known to be (its ids in the client's memory,
its letters in the client's text), or the experiment is broken: a search that finds nothing
anywhere shows nothing.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from tests.chaos.needles import SMALLEST_ID, Needles, readable_memory, search
from tests.chaos.options import Options
from tests.chaos.processes import Training, Trunk, wait_until
from tests.chaos.relay import Relay
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.patience import PATIENCE_S

_ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
_CHARACTERS, _WORDS = 40, 16
_REPEATS = 200


def run(stage: Stage, options: Options, report: Report) -> None:
    steps = 60 if options.short else 400
    letters, words, ids = _secret(stage, options.seed)
    # The words are looked for as ids alone: pieces of their text may be in any docstring.
    needles = Needles(letters, ids)
    text = stage.folder / "secret.txt"
    text.write_text(f"{letters}{words}\n" * _REPEATS, encoding="utf-8")

    own = stage.folder / "trunk_files"
    own.mkdir()
    before = _files_of(Path(tempfile.gettempdir()))
    trunk = Trunk(
        stage,
        "trunk",
        "--log-level",
        "debug",
        "--metrics",
        "127.0.0.1:0",
        environment={"TMPDIR": str(own), "HOME": str(own)},
    )
    child = trunk.running()
    relay = Relay(trunk.address, record=True)
    stage.exits.callback(relay.close)
    training = Training(stage, "canary", relay.address, steps, checkpoint_every=10, text=text)
    training.gate.close_after(steps // 2 + 10)  # it may not be over before it is looked at
    client = training.start()
    wait_until(training.past(steps // 2), [client, child], PATIENCE_S, "half of the run")
    client.send(signal.SIGSTOP)
    # While it is in the middle of a step, on both sides.
    memories = list(_memory("trunk's memory", child.pid))
    where_it_is = search(needles, _memory("client's memory", client.pid))
    training.gate.open()
    client.send(signal.SIGCONT)
    training.finish(PATIENCE_S)
    metrics = f"http://{trunk.metrics_address}/metrics"
    with urllib.request.urlopen(metrics, timeout=PATIENCE_S) as answer:
        shown = answer.read()
    memories += _memory("trunk's memory afterwards", child.pid)
    child.send(signal.SIGTERM)
    child.wait(PATIENCE_S, "the trunk")

    new = _files_of(Path(tempfile.gettempdir())) - before
    ours = stage.folder.resolve()
    written = [p for p in new if ours not in p.resolve().parents] + list(_files_of(own))
    places = [
        *(("wire", stream) for stream in relay.recorded),
        ("log", trunk.log.read_bytes()),
        ("metrics", shown),
        *((str(path), _read(path)) for path in written if path.is_file()),
    ]
    found = search(needles, [*places, *memories])
    report.note(
        secret_ids=len(ids),
        forms=sorted(needles.forms),
        wire_bytes=sum(len(stream) for stream in relay.recorded),
        log_bytes=trunk.log.stat().st_size,
        metrics_bytes=len(shown),
        files=len(written),
        memory_bytes=sum(len(data) for _, data in memories),
        found=found,
        found_in_client=sorted(set(where_it_is)),
    )
    report.require(not found, f"the secret is on the trunk's side: {found}")
    # The text itself the client may have given back to the system once it has the ids.
    where_it_is += search(needles, [("client's text", text.read_bytes())])
    missing = {"client's memory: int64", "client's text: UTF-8"} - set(where_it_is)
    report.require(not missing, f"the search did not find {missing}, only {where_it_is}")
    planted = b"".join(next(iter(forms)) for forms in needles.forms.values())
    missed = needles.forms.keys() - needles.found_in(planted)
    report.require(not missed, f"the search does not see {missed}")


def _secret(stage: Stage, seed: int) -> tuple[str, str, list[int]]:
    """Random letters, words in no order of any language, and the ids of both together."""
    tokenizer = AutoTokenizer.from_pretrained(stage.model)
    chance = random.Random(f"canary {seed}")
    letters = "".join(chance.choices(_ALPHABET, k=_CHARACTERS))
    unusual = [i for i in range(SMALLEST_ID, len(tokenizer)) if _is_word(tokenizer, i)]
    words = tokenizer.decode(chance.sample(unusual, _WORDS))
    ids: list[int] = tokenizer(f"{letters}{words}\n", add_special_tokens=False)["input_ids"]
    return letters, words, ids


def _is_word(tokenizer: object, token: int) -> bool:
    text = tokenizer.decode([token])  # type: ignore[attr-defined]
    return text.startswith(" ") and text[1:].isascii() and text[1:].isalpha()


def _memory(name: str, pid: int) -> Iterator[tuple[str, bytes]]:
    return ((name, data) for data in readable_memory(pid))


def _files_of(folder: Path) -> set[Path]:
    """All that is there; what others remove meanwhile is not."""
    return {Path(place) / name for place, _, names in os.walk(folder) for name in names}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""  # others' work in the same folder
