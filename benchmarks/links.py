"""A training step over slow networks, by wire format and micro-batches in flight.

Every step over a link has one over plain loopback beside it, with the same format and count: what
the network added is the difference. The relay that stands for the network runs on the same cores.
"""

from __future__ import annotations

import logging
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpt2_small import SPLIT, VOCABULARY, gpt2_small, lora
from benchmarks.processes import MIB
from benchmarks.relay import LINKS, Link, relay
from benchmarks.report import Claim, Row, Section, run_alone
from client_service.local_trunk import local_trunk
from client_service.pipeline import accumulate, cut_batch
from client_service.split_model import SplitModelForCausalLM
from shared.skeleton import RemoteTensor

LOG = logging.getLogger("links")

BATCH, TOKENS = 4, 128
FORMATS, COUNTS, STEPS = ("float32", "bfloat16", "int8"), (1, 2, 4), 5
BYTES_BOUNDS = {"float32": 12_400, "bfloat16": 6_250, "int8": 3_250}
"""A token, of hidden states and gradients: all four hops."""
ADAPTER_BYTES = 4
"""Of a parameter in the trunk's blocks: up once a step, its gradient down in every backward."""
HOPS, BOUND = 4, 1.15
LOOPBACK = "loopback"


@dataclass
class Side:
    """A client whose trunk is behind one network."""

    model: Any
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    @classmethod
    def connect(cls, model: Path, address: str, wire_format: str) -> Side:
        split = SplitModelForCausalLM.from_pretrained(
            model, address, peft_config=lora(), wire_format=wire_format, fused_loss=True
        ).train()
        trained = [p for p in split.parameters() if p.requires_grad]
        return cls(split, torch.optim.AdamW(trained, lr=1e-4))

    def on_trunk(self) -> int:
        """How many parameters the adapter has in the trunk's blocks."""
        blocks = dict(self.model.passage.blocks()).values()
        return sum(p.numel() for block in blocks for p in block.parameters() if p.requires_grad)

    def share_weights(self, other: Side) -> None:
        """Takes the other's frozen weights in the place of its own, which are the same."""
        weights = dict(other.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            if not (parameter.requires_grad or isinstance(parameter, RemoteTensor)):
                parameter.data = weights[name].data

    def step(self, ids_BT: torch.Tensor, count: int) -> None:
        """One step with so many micro-batches in flight."""
        traffic = self.model.remote_trunk.session.traffic
        sent, received = traffic.bytes_sent, traffic.bytes_received
        pieces = cut_batch({"input_ids": ids_BT, "labels": ids_BT}, count)
        started = time.perf_counter()
        accumulate(self.model, pieces, in_flight=count)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - started)
        self.sent.append(traffic.bytes_sent - sent)
        self.received.append(traffic.bytes_received - received)

    def forget(self) -> None:
        """Begins to measure anew."""
        for measured in (self.seconds, self.sent, self.received):
            measured.clear()


@dataclass(frozen=True)
class Found:
    """The steps of one combination over one network."""

    link: Link | None
    wire_format: str
    count: int
    step_s: float
    compute_s: float
    """The same over loopback."""
    sent: float
    received: float
    """Bytes of a step."""
    adapter: int
    """Of these, those of the adapter, by what it has on the trunk."""

    @property
    def floor_s(self) -> float:
        """What no step can be faster than by much: computing, or the bytes of all hops in turn."""
        if self.link is None:
            return self.compute_s
        bits = 8 * (self.sent + self.received)
        wire_s = bits / self.link.bits_per_s + HOPS * self.link.round_trip_s
        return max(self.compute_s, wire_s)


def measure(quick: bool = False) -> list[Section]:
    """Every format and count over every link."""
    links = LINKS[1:2] if quick else LINKS
    formats, counts = (("int8",), (1, 2)) if quick else (FORMATS, COUNTS)
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = gpt2_small(Path(scratch))
        with local_trunk(str(model), SPLIT) as address, ExitStack() as stack:
            networks = {link: stack.enter_context(relay(address, link)) for link in links}
            for wire_format in formats:
                found += _of_format(model, address, networks, wire_format, counts, quick)
    return [_steps(found, links), _bytes(found, formats)]


def _of_format(
    model: Path,
    address: str,
    networks: dict[Link, str],
    wire_format: str,
    counts: tuple[int, ...],
    quick: bool,
) -> list[Found]:
    generator = torch.Generator().manual_seed(0)
    found = []
    with ExitStack() as stack:
        sides: dict[Link | None, Side] = {}
        for link, where in [(None, address), *networks.items()]:
            side = sides[link] = Side.connect(model, where, wire_format)
            stack.callback(side.model.remote_trunk.close)
            side.share_weights(sides[None])
        for count in counts:
            for number in range(1 + (2 if quick else STEPS)):
                ids_BT = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)
                for side in sides.values():
                    if number == 1:
                        side.forget()  # the first was to warm up
                    side.step(ids_BT, count)
            compute_s = median(sides[None].seconds)
            for link, side in sides.items():
                step_s, traffic = median(side.seconds), (median(side.sent), median(side.received))
                adapter = side.on_trunk() * ADAPTER_BYTES * (1 + count)
                one = Found(link, wire_format, count, step_s, compute_s, *traffic, adapter)
                LOG.info("%s, %s, %d: %.2f s", link or LOOPBACK, wire_format, count, step_s)
                found.append(one)
                side.forget()
    return found


def _steps(found: list[Found], links: tuple[Link, ...]) -> Section:
    section = Section("links", "A step over slow networks")
    section.rows = [_row(one) for one in found if one.link is not None]
    for link in links:
        best = min((one for one in found if one.link == link), key=lambda one: one.step_s)
        over = best.step_s / best.floor_s
        text = (
            f"{link}: best step ({best.wire_format}, {best.count} in flight, {best.step_s:.2f} s)"
        )
        section.claims.append(Claim(f"{text} of its floor", over, BOUND))
    section.notes = [
        f"GPT-2 small's size, split {SPLIT}, LoRA r=8, {BATCH}x{TOKENS} tokens, fused loss; "
        "a link's latency is its round trip. Compute: the same over loopback, in turn with it.",
        f"Floor: the larger of compute and all bytes at the link's rate plus {HOPS} round trips.",
    ]
    return section


def _row(one: Found) -> Row:
    return {
        "link": str(one.link),
        "format": one.wire_format,
        "in flight": one.count,
        "step s": one.step_s,
        "compute s": one.compute_s,
        "floor s": one.floor_s,
        "step of floor": one.step_s / one.floor_s,
        "step of compute": one.step_s / one.compute_s,
    }


def _bytes(found: list[Found], formats: tuple[str, ...]) -> Section:
    section = Section("wire_bytes", "Bytes of a step")
    for name in formats:
        one = next(f for f in found if f.wire_format == name and f.link is None)
        each = (one.sent + one.received - one.adapter) / (BATCH * TOKENS)
        row: Row = {"format": name, "sent MiB": one.sent / MIB, "received MiB": one.received / MIB}
        row["of the adapter MiB"] = one.adapter / MIB
        section.rows.append(row | {"the others, bytes a token": each})
        text = f"{name}: bytes a token, without the adapter's"
        section.claims.append(Claim(text, each, BYTES_BOUNDS[name]))
    section.notes = [
        "One batch, as gRPC is given it: four hops of hidden states and gradients, and in float32 "
        "the adapter of the trunk's blocks up and its gradient down."
    ]
    return section


if __name__ == "__main__":
    run_alone(measure, __doc__)
