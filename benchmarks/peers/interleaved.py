"""Several systems in one run: each steps in turn, so that whatever slows the machine slows all."""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM

from benchmarks.gpt2_small import adapted, gpt2_small
from benchmarks.peers.running import Running, Sample, System, SystemFailedError

LOG = logging.getLogger("benchmarks")
WARM_UP = 1

Entry = System | Callable[[], System]


@dataclass
class Measured:
    """What one system did; after a failure its samples do not count."""

    name: str
    samples: list[Sample] = field(default_factory=list)
    warm_up: list[Sample] = field(default_factory=list)
    failure: str = ""

    def seconds(self) -> list[float]:
        return [s.seconds for s in self.samples]

    def cpu(self) -> list[float]:
        return [s.cpu_s for s in self.samples]

    def wire_bytes(self) -> int:
        """Of the step with the fewest: whatever else the machine does adds to it."""
        return min(s.wire_bytes for s in self.samples)

    def idle_cpu(self) -> float:
        return statistics.median(s.idle_cpu for s in self.samples)

    def loss_difference(self, other: Measured) -> float:
        """The largest of any step, warm-up included: every step builds on those before."""
        mine, theirs = (m.warm_up + m.samples for m in (self, other))
        return max(abs(a.loss - b.loss) for a, b in zip(mine, theirs, strict=True))


def interleave(named: Sequence[tuple[str, Entry]], pairs: int) -> dict[str, Measured]:
    """Lets every system step once a pair, in an order that rotates.

    Args:
        named: Systems, or what makes them, by name.
        pairs: How often, after a round of warming up. Every turn is two steps, of which the second
            counts: training is step after step, and after a pause as long as all the other
            systems' turns caches are cold and freed memory has gone back to the system.

    Raises:
        SystemFailedError: If a required system fails; another's failure is noted in what it
            measured.
    """
    found = {name: Measured(name) for name, _ in named}
    with _checkpoint() as (model, adapter), contextlib.ExitStack() as stack:
        running: dict[str, Running] = {}
        for name, entry in named:
            with _failure_of(found[name], _required(entry)):
                LOG.info("starting %s", name)
                system = entry if isinstance(entry, System) else entry()
                running[name] = Running(system, model, adapter)
                stack.callback(running[name].stop)
        entries = dict(named)
        for pair in range(pairs + WARM_UP):
            for name in _rotated(list(running), pair):
                measured = found[name]
                with _failure_of(measured, _required(entries[name])):
                    measured.warm_up.append(running[name].step(2 * pair))
                    sample = running[name].step(2 * pair + 1)
                    (measured.warm_up if pair < WARM_UP else measured.samples).append(sample)
                    LOG.info("%d %s: %.2f s, CPU %.2f s", pair, name, sample.seconds, sample.cpu_s)
                if measured.failure:
                    running.pop(name).stop()
    return found


@contextmanager
def _checkpoint() -> Iterator[tuple[Path, Path]]:
    """The weights and the adapter that all systems start from."""
    with tempfile.TemporaryDirectory() as scratch:
        model = gpt2_small(Path(scratch) / "model")
        adapter = Path(scratch) / "adapter"
        whole = AutoModelForCausalLM.from_pretrained(model)
        adapted(whole).save_pretrained(adapter)
        yield model, adapter


@contextmanager
def _failure_of(measured: Measured, fatal: bool) -> Iterator[None]:
    try:
        yield
    except SystemFailedError as error:
        if fatal:
            raise
        LOG.warning("%s: %s", measured.name, error)
        measured.failure = str(error)


def _required(entry: Entry) -> bool:
    return isinstance(entry, System) and entry.required


def _rotated(names: list[str], pair: int) -> list[str]:
    turn = pair % len(names)
    return names[turn:] + names[:turn]
