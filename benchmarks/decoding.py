"""``python -m benchmarks.decoding``: tokens per second of generating, through the split and whole.

GPT-2 small split 2:10, LoRA on every part, greedy. Everything is measured in turn in one run:

* ``generate()`` of the whole model and through the split, for one prompt and for eight, with the
  linear layers of torch and with those of oneDNN (``--onednn``); and of the whole model with its
  head on all threads, as the split has it;
* the trunk alone: streams of cached one-token forwards over loopback whose ends are not computed,
  one and eight at once, each of a tenant with an adapter of its own or none, with and without
  ``--batch-decoding``, with both kinds of linear layers;
* eight whole clients, each a process that computes its own ends on the same cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GPT2LMHeadModel

from benchmarks.gpt2_small import SPLIT, VOCABULARY, WIDTH, adapted, gpt2_small, lora
from benchmarks.processes import cpu_seconds
from benchmarks.report import Claim, Row, Section, Spread
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from client_service.training_client import TrainingClient
from shared.models.onednn import use_onednn

LOG = logging.getLogger("benchmarks")
PROMPT, TOKENS, STREAMS = 16, 64, 8
BATCHING = "--batch-decoding"
KINDS: dict[str, tuple[str, ...]] = {"": (), ", onednn": ("--onednn",)}
"""How linear layers are computed: what it adds to a name, and a trunk's flags."""
WHOLE, SPLIT_MODEL = "whole model", "split"
Figure = Callable[[], float]
"""Generates, and tells the tokens per second."""
Tokens = Mapping[str, tuple[int, Figure]]
"""Figures by name, with the tokens that each generates."""


@dataclass
class Found:
    """One figure, taken several times."""

    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    """User and system time of all processes per token, prompts included: what other work on the
    machine disturbs less."""


def measure(quick: bool = False) -> list[Section]:
    """Measures everything; ``quick`` for a smoke test."""
    tokens, repeats = (8, 1) if quick else (TOKENS, 4)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = gpt2_small(Path(scratch) / "model")
        flags = {"": (), BATCHING: (BATCHING, str(STREAMS))}
        addresses = {
            (kind, batching): stack.enter_context(
                local_trunk(str(folder), SPLIT, flags=(*KINDS[kind], *flags[batching]))
            )
            for kind in KINDS
            for batching in flags
        }
        figures: dict[str, tuple[int, Figure]] = {}
        for kind in KINDS:
            figures |= stack.enter_context(_ends(folder, addresses[kind, ""], tokens, kind))
        for kind in KINDS:
            plain, batched = addresses[kind, ""], addresses[kind, BATCHING]
            figures |= _trunk_figures(stack, plain, batched, tokens, kind)
        found = _in_turn(figures, repeats)
        sections = [_ends_section(found), _trunk_section(found)]
        plain, batched = addresses["", ""], addresses["", BATCHING]
        clients = {
            name: (STREAMS * tokens, partial(_clients, folder, address, tokens))
            for name, address in (
                ("eight client processes", plain),
                (f"eight client processes, {BATCHING}", batched),
            )
        }
        found = _in_turn(clients, 1 if quick else 3, warm=0)
        sections.append(_clients_section(found))
    return sections


def _in_turn(figures: Tokens, repeats: int, warm: int = 1) -> dict[str, Found]:
    """Takes every figure in turn, over and over."""
    found = {name: Found() for name in figures}
    for repeat in range(warm + repeats):
        for name, (tokens, figure) in figures.items():
            before = cpu_seconds()
            rate = figure()
            cpu_ms = 1000 * (cpu_seconds() - before) / tokens
            if repeat >= warm:
                found[name].rates.append(rate)
                found[name].cpu_ms.append(cpu_ms)
        LOG.info("decoding: %d of %d", repeat + 1, warm + repeats)
    return found


@contextmanager
def _ends(folder: Path, address: str, tokens: int, kind: str) -> Iterator[Tokens]:
    plain = GPT2LMHeadModel.from_pretrained(folder)
    if kind:
        use_onednn(plain, plain.dtype, plain.device)
    models = {WHOLE: adapted(plain).eval()}
    split = SplitModelForCausalLM.from_pretrained(
        folder, address, peft_config=lora(), onednn=bool(kind)
    ).eval()
    models[SPLIT_MODEL] = split
    with closing(split.remote_trunk):
        yield {
            _name(name, kind, rows): (rows * tokens, _generate(model, rows, tokens))
            for rows in (1, STREAMS)
            for name, model in models.items()
        }


def _name(model: str, kind: str, rows: int) -> str:
    return f"{model}{kind}, {rows} prompt{'s' * (rows > 1)}"


def _generate(model: Any, rows: int, tokens: int) -> Figure:
    """Tokens per second of a greedy ``generate``."""
    ids = torch.randint(
        0, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(rows)
    )

    def run() -> float:
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return rows * tokens / (time.perf_counter() - started)

    return run


def _trunk_figures(stack: ExitStack, plain: str, batched: str, tokens: int, kind: str) -> Tokens:
    figures: dict[str, tuple[int, Figure]] = {}
    for adapter, config in (("LoRA", lora()), ("frozen", None)):
        for how, address in (("each alone", plain), ("batched", batched)):
            clients = [TrainingClient(address, config, seed=i) for i in range(STREAMS)]
            for client in clients:
                stack.enter_context(client).model.eval()
            for count in (1, STREAMS):
                if how == "each alone" or count > 1:
                    name = _stream_name(adapter + kind, count, how)
                    figures[name] = count * tokens, _streams(clients[:count], tokens)
    return figures


def _stream_name(kind: str, count: int, how: str) -> str:
    return f"{kind}, {count} stream{'s' * (count > 1)}, {how}"


def _streams(clients: Sequence[TrainingClient], tokens: int) -> Figure:
    """Tokens per second of all clients, prompts not counted, their ends not computed."""

    def run() -> float:
        start, end = threading.Barrier(len(clients) + 1), threading.Barrier(len(clients) + 1)
        with ThreadPoolExecutor(len(clients)) as pool:
            done = [pool.submit(_stream, c, tokens, start, end) for c in clients]
            start.wait()
            started = time.perf_counter()
            end.wait()
            seconds = time.perf_counter() - started
            for one in done:
                one.result()
        return len(clients) * tokens / seconds

    return run


@torch.no_grad()
def _stream(
    client: TrainingClient, tokens: int, start: threading.Barrier, end: threading.Barrier
) -> None:
    cache = DynamicCache()
    try:
        total = PROMPT
        _send(client, PROMPT, total, cache)
        start.wait()
        for _ in range(tokens):
            total += 1
            _send(client, 1, total, cache)
        end.wait()
    except BaseException:
        start.abort()
        end.abort()
        raise


def _send(client: TrainingClient, new: int, total: int, cache: DynamicCache) -> None:
    """What a ``generate`` sends: new tokens, the whole mask, and positions."""
    passage = client.model.passage
    passage.remember(torch.ones(1, total, dtype=torch.bool))
    positions = torch.arange(total - new, total)[None]
    passage.through(torch.randn(1, new, WIDTH), positions, cache, False)


def _clients(folder: Path, address: str, tokens: int) -> float:
    """Tokens per second of eight client processes in all."""
    command = [sys.executable, "-m", "benchmarks.decoding", "--client", address]
    command += ["--model", str(folder), "--tokens", str(tokens)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        clients: list[Any] = [
            stack.enter_context(subprocess.Popen([*command, "--seed", str(i)], **pipes))
            for i in range(STREAMS)
        ]
        for client in clients:
            assert client.stdout.readline() == "ready\n"
        started = time.perf_counter()
        for client in clients:
            client.stdin.write("go\n")
            client.stdin.flush()
        for client in clients:
            assert client.stdout.readline() == "done\n"
        return STREAMS * tokens / (time.perf_counter() - started)


def _client(address: str, folder: Path, tokens: int, seed: int) -> None:
    """One client as a process: generates when told to."""
    torch.set_num_threads(1)  # of two cores for nine processes
    split = SplitModelForCausalLM.from_pretrained(folder, address, peft_config=lora(), seed=seed)
    with closing(split.eval().remote_trunk):
        run = _generate(split, 1, tokens)
        _say("ready")
        sys.stdin.readline()
        run()
        _say("done")


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def _rows(found: dict[str, Found], names: Sequence[str], cpu: bool = True) -> list[Row]:
    rows: list[Row] = [{"what": n, "tokens/s": Spread.of(found[n].rates)} for n in names]
    for row in rows if cpu else ():
        row["CPU ms a token"] = Spread.of(found[row["what"]].cpu_ms)
    return rows


def _ratio(found: dict[str, Found], name: str, to: str) -> float:
    """The median of the ratios of figures that were taken one after the other."""
    pairs = zip(found[name].rates, found[to].rates, strict=True)
    return Spread.of([one / other for one, other in pairs]).median


def _cpu_ratio(found: dict[str, Found], name: str, to: str) -> float:
    return Spread.of(found[name].cpu_ms).median / Spread.of(found[to].cpu_ms).median


def _ends_section(found: dict[str, Found]) -> Section:
    section = Section(
        "decoding",
        "Greedy generate, GPT-2 small 2:10, LoRA on every part, trunk over loopback",
        _rows(found, [name for name in found if "prompt" in name]),
    )
    for rows in (1, STREAMS):
        for kind, of in (("", ""), (", onednn", ""), (", onednn", ", onednn")):
            split, whole = _name(SPLIT_MODEL, kind, rows), _name(WHOLE, of, rows)
            ratio = _ratio(found, split, whole)
            section.claims.append(Claim(f"{split} / {whole}", ratio, 0.9, at_most=False))
    return section


def _trunk_section(found: dict[str, Found]) -> Section:
    section = Section(
        "decoding_trunk",
        "The trunk alone: one-token forwards of tenants whose ends are not computed",
        _rows(found, [name for name in found if "stream" in name]),
    )
    for adapter in ("LoRA", "frozen"):
        for kind in (adapter + added for added in KINDS):
            batched = _stream_name(kind, STREAMS, "batched")
            alone = _stream_name(kind, STREAMS, "each alone")
            text = f"{STREAMS} streams batched / one stream, {kind}"
            ratio = _ratio(found, batched, _stream_name(kind, 1, "each alone"))
            section.claims.append(Claim(text, ratio, 3.0, at_most=False))
            section.notes.append(
                f"{kind}: of what eight streams take each alone, {BATCHING} gives "
                f"{_ratio(found, batched, alone):.2f} x the tokens per second for "
                f"{_cpu_ratio(found, batched, alone):.2f} x the CPU"
            )
    return section


def _clients_section(found: dict[str, Found]) -> Section:
    cores = len(os.sched_getaffinity(0))
    return Section(
        "decoding_clients",
        "Eight client processes beside the trunk, each with its own ends",
        _rows(found, list(found), cpu=False),
        notes=[f"nine processes on {cores} cores: the eight heads are most of the work"],
    )


def main() -> None:
    """Runs the benchmark, or one of its clients."""
    logging.basicConfig(level="INFO", format="%(message)s")
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--client", default="", help="address; used by the benchmark itself")
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--tokens", type=int, default=TOKENS)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    if given.client:
        _client(given.client, given.model, given.tokens, given.seed)
        return
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for section in measure(given.quick):
        LOG.info("%s", section.as_markdown())


if __name__ == "__main__":
    main()
