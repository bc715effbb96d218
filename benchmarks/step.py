"""One training step of GPT-2 small's size: ours, the whole model, and other ways to split it.

``python -m benchmarks.step [--pairs N] [--no-peers]``
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from benchmarks.peers.environments import python_of
from benchmarks.peers.interleaved import Entry, Measured, interleave
from benchmarks.peers.running import System
from benchmarks.report import Claim, Row, Section, Spread

LOG = logging.getLogger("benchmarks")
LOSS_BOUND, PEER_LOSS_BOUND = 1e-5, 1e-4
IDLE_BOUND = 0.02
WHAT = "GPT-2 small's size, split 2:10, LoRA r=8, batch 4x128, float32, 2 cores"
ONE_CORE_BOUND = 0.65
ONE_CORE_PAIRS = 7

WHOLE, OURS, FUSED = "whole model", "trunkline", "trunkline, fused loss"
WHOLE_ONEDNN, ONEDNN = "whole model, onednn", "trunkline, fused loss, onednn"
FASTEST = ("--fused", "1", "--onednn", "1")
KEEP = ("--keep", "1")
SOCKET, RPC = "bare TCP socket", "PyTorch RPC over TCP"
KEPT = ", freed memory kept"
PEERS = {
    "torchslicer 0.2.0 over gRPC": "torchslicer",
    "hivemind 1.1.12": "hivemind",
    "NVFlare 2.9.0 collab simulator": "nvflare",
}


def measure(peers: bool = True, pairs: int = 15) -> list[Section]:
    """Measures a step beside other libraries' ways to split it.

    Args:
        peers: Install them into environments of their own; without, nothing is beside.
        pairs: How many steps of each count.
    """
    title = "A training step beside other libraries"
    named = [(name, _peer(library)) for name, library in PEERS.items()]
    return [_systems("step", title, named if peers else [], pairs)]


def measure_faster(pairs: int = 15) -> list[Section]:
    """Measures the same step with what is switched on by name, and two sides with a core each."""
    return [_faster(pairs), _one_core_sides(min(pairs, ONE_CORE_PAIRS))]


def measure_installed(pairs: int = 15) -> list[Section]:
    """Measures a step beside other ways to split it that torch and a socket bring along."""
    # It computes on 16 threads in turn; each would keep a step's memory in an arena of its own.
    one_arena = {"MALLOC_ARENA_MAX": "1"}
    named: list[tuple[str, Entry]] = [
        (FUSED, System("benchmarks.peers.trunkline", ("--fused", "1"), required=True)),
        (SOCKET, System("benchmarks.peers.bare_tcp")),
        (RPC, System("benchmarks.peers.torch_rpc", environment=one_arena)),
    ]
    kept: list[tuple[str, Entry]] = [
        (WHOLE + KEPT, System("benchmarks.peers.whole", KEEP)),
        (SOCKET + KEPT, System("benchmarks.peers.bare_tcp", KEEP)),
        (RPC + KEPT, System("benchmarks.peers.torch_rpc", KEEP, environment=one_arena)),
    ]
    title = "A training step beside a bare socket and torch's own RPC"
    return [
        _systems("step_installed", title, named, pairs),
        _systems("step_kept", f"{title}, like for like: all keep freed memory", kept, pairs),
    ]


def _systems(name: str, title: str, others: list[tuple[str, Entry]], pairs: int) -> Section:
    """Few at a time: where memory is short, a trunk that gives it back while idle pays for it."""
    named: list[tuple[str, Entry]] = [
        (WHOLE, System("benchmarks.peers.whole", required=True)),
        (OURS, System("benchmarks.peers.trunkline", required=True)),
        *others,
    ]
    found = interleave(named, pairs)
    section = Section(name, f"{title}: {WHAT}", [_row(m, found[WHOLE]) for m in found.values()])
    ours = [found[name] for name in (OURS, FUSED) if name in found]
    for other in found.values():
        if other is found[WHOLE] or other in ours or other.failure:
            continue
        for one in ours:
            for what, of in (("step", Measured.seconds), ("CPU", Measured.cpu)):
                ratio = _ratio(one, other, of).median
                section.claims.append(
                    Claim(f"{one.name}: {what} ÷ that of {other.name}", ratio, 1.0)
                )
    _claim_loss(section, ours, found[WHOLE])
    section.notes += [
        "Systems take turns of two steps within one run, of which the second counts; ratios are of "
        "the same turn; "
        f"median (least to most, n={pairs}).",
        f"{OURS} keeps the memory that a step frees, as `trunkline train` does; the others free "
        f"and take it as torch does by itself, but for those named{KEPT}.",
        "CPU is user and system time of all processes of a system; bytes are what passed over the "
        "loopback interface in the step with the fewest, both ways, headers included.",
    ]
    section.notes += _odd(found)
    return section


def _faster(pairs: int) -> Section:
    """What the same step takes with what is switched on by name."""
    found = interleave(
        [
            (WHOLE, System("benchmarks.peers.whole", required=True)),
            (WHOLE + KEPT, System("benchmarks.peers.whole", KEEP, required=True)),
            (OURS, System("benchmarks.peers.trunkline", required=True)),
            (FUSED, System("benchmarks.peers.trunkline", ("--fused", "1"), required=True)),
            (
                WHOLE_ONEDNN,
                System("benchmarks.peers.whole", ("--onednn", "1", *KEEP), required=True),
            ),
            (ONEDNN, System("benchmarks.peers.trunkline", FASTEST, required=True)),
        ],
        pairs,
    )
    section = Section(
        "step_faster",
        "The same step with a fused loss, and with linear layers by oneDNN",
        [_row(measured, found[WHOLE]) for measured in found.values()],
    )
    beside = ((FUSED, WHOLE), (FUSED, WHOLE + KEPT), (ONEDNN, WHOLE), (ONEDNN, WHOLE_ONEDNN))
    for name, of in beside:
        ratio = _ratio(found[name], found[of], Measured.seconds).median
        section.claims.append(Claim(f"{name}: step ÷ that of the {of}", ratio, 1.0))
    _claim_loss(section, [found[n] for n in (OURS, FUSED, ONEDNN)], found[WHOLE])
    section.notes = [
        f"{ONEDNN} is faster than the {WHOLE} by another library's matrix products, which that "
        f"can have as well ({WHOLE_ONEDNN}), and {FUSED} by a loss that works on any model "
        "(`fused_linear_cross_entropy`); neither by being split.",
        f"{OURS} keeps the memory that a step frees, as `trunkline train` does; so do "
        f"{WHOLE + KEPT} and {WHOLE_ONEDNN}.",
    ]
    return section


def _claim_loss(section: Section, systems: list[Measured], whole: Measured) -> None:
    for measured in systems:
        text = f"largest loss difference of {measured.name} to the whole model"
        section.claims.append(Claim(text, measured.loss_difference(whole), LOSS_BOUND))


def _one_core_sides(pairs: int) -> Section:
    """A client and a trunk that do not share cores, as on two machines."""
    section = Section(
        "step_one_core",
        "Two one-core sides: client and trunk on a core and a thread each, and the whole model "
        "on one core",
    )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        section.notes.append("Needs two cores.")
        return section
    pinned = ("--core", str(cores[0]))
    split = (*pinned, "--trunk-core", str(cores[1]), "--fused", "1")
    in_flight = {n: ("--micro", f"{n}", "--in-flight", f"{n}") for n in (2, 4)}
    options: dict[str, tuple[str, ...]] = {"trunkline, one batch": split}
    options |= {_micro(n): (*split, *flags) for n, flags in in_flight.items()}
    options[_micro(4, ", onednn")] = (*split, *in_flight[4], "--onednn", "1")
    named: list[tuple[str, Entry]] = [
        (
            f"{name}, one core",
            System("benchmarks.peers.whole", (*pinned, *flags), threads=1, required=True),
        )
        for name, flags in ((WHOLE, ()), (WHOLE + KEPT, KEEP), (WHOLE_ONEDNN, ("--onednn", "1")))
    ]
    for name, flags in options.items():
        ours = System("benchmarks.peers.trunkline", flags, threads=1, required=True)
        named.append((name, ours))
    found = interleave(named, pairs)
    whole, whole_kept, whole_onednn = (found[name] for name, _ in named[:3])
    section.rows = [_row(measured, whole) for measured in found.values()]
    best, fastest = found[_micro(4)], found[_micro(4, ", onednn")]
    beside = ((best, whole), (best, whole_kept), (fastest, whole), (fastest, whole_onednn))
    for one, other in beside:
        ratio = _ratio(one, other, Measured.seconds).median
        text = f"{one.name}: step ÷ that of the {other.name}"
        section.claims.append(Claim(text, ratio, ONE_CORE_BOUND))
    _claim_loss(section, [best, fastest], whole)
    section.notes.append("trunkline with fused loss; micro-batches are rows of the same batch.")
    section.notes += _odd(found)
    return section


def _micro(count: int, more: str = "") -> str:
    return f"trunkline, {count} micro-batches in flight{more}"


def _row(measured: Measured, whole: Measured) -> Row:
    columns = ("step s", "÷ whole", "CPU s", "÷ whole CPU", "loss difference", "bytes a step")
    if measured.failure:
        return {"system": f"{measured.name}: {measured.failure}", **dict.fromkeys(columns, "-")}
    alone = measured is whole
    values = (
        Spread.of(measured.seconds()),
        _ratio(measured, whole, Measured.seconds),
        Spread.of(measured.cpu()),
        _ratio(measured, whole, Measured.cpu),
        f"{measured.loss_difference(whole):.1e}",
        "-" if alone else f"{measured.wire_bytes():,}",
    )
    return {"system": measured.name, **dict(zip(columns, values, strict=True))}


def _ratio(measured: Measured, other: Measured, of: Callable[[Measured], list[float]]) -> Spread:
    return Spread.of([a / b for a, b in zip(of(measured), of(other), strict=True)])


def _odd(found: dict[str, Measured]) -> list[str]:
    """What a reader has to know of single systems."""
    notes = []
    whole = next(iter(found.values()))
    for name, measured in found.items():
        if measured.failure:
            continue
        if (difference := measured.loss_difference(whole)) > PEER_LOSS_BOUND:
            notes.append(f"{name}: its losses differ from the whole model's by {difference:.1e}.")
        if (idle := measured.idle_cpu()) > IDLE_BOUND:
            notes.append(f"{name}: uses {idle:.0%} of a core while others step.")
    return notes


def _peer(library: str) -> Callable[[], System]:
    return lambda: System(f"benchmarks.peers.{library}_peer", python=python_of(library))


def main() -> None:
    """Prints what was found, as Markdown."""
    logging.basicConfig(level="INFO", format="%(message)s")
    # As an interrupt does: unwinds, and so ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=15)
    arguments.add_argument("--no-peers", action="store_true")
    given = arguments.parse_args()
    for section in measure(not given.no_peers, given.pairs):
        LOG.info("\n%s", section.as_markdown())


if __name__ == "__main__":
    main()
