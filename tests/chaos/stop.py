"""A trunk that stops without dying, a client that does, and a connection that swallows all bytes.

Each is noticed, counted from the stop to the next line of ``metrics.jsonl`` while the stop lasts,
and the run ends as if nothing had happened. The long form has a bound on the time.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.chaos.metrics import require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import Training, Trunk, wait_until
from tests.chaos.relay import Relay
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.patience import PATIENCE_S

NOTICED_BOUND_S = 30.0
_STOP_AT = 15
# No run gets as far before it is halted.
_HALTED_BEFORE = 40
_STOPPED_CLIENT_S = 40.0
# What the trunk logs when a connection broke.
DETACHED = "session waits for its client"


@dataclass
class Halt:
    """Something that keeps a run from going on, and when that was."""

    training: Training
    act: Callable[[], None]
    until: int = _STOP_AT
    """The step that is waited for: first to act, then to see that the run has gone on."""
    halted_at: float | None = None

    def begin(self) -> None:
        self.act()
        self.halted_at = time.monotonic()
        self.training.metrics.look()
        # What was under way may still have been answered: the step after that was not.
        self.until = self.training.metrics.last_step + 2
        self.training.gate.open()

    def end(self, report: Report) -> None:
        assert self.halted_at is not None
        took, name = time.monotonic() - self.halted_at, self.training.out.name
        report.note(**{f"{name}_noticed_s": round(took, 2)})
        report.require_in_time(
            took <= NOTICED_BOUND_S,
            f"{name}: went on {took:.1f} s after the halt, bound {NOTICED_BOUND_S:g} s",
        )


def run(stage: Stage, options: Options, report: Report) -> None:
    steps = 150 if options.short else 300
    stopping, spare = Trunk(stage, "stopping_trunk"), Trunk(stage, "trunk")
    forgetting = Trunk(stage, "forgetting_trunk", "--resume-window-s", "1")
    trunks = [stopping, spare] + ([] if options.short else [forgetting])
    for trunk in trunks:
        trunk.start()
    for trunk in trunks:
        trunk.running()
    relay = Relay(spare.address)
    stage.exits.callback(relay.close)

    reference = Training(stage, "undisturbed", spare.address, steps)
    frozen_trunk = _training(stage, "frozen_trunk", f"{stopping.address},{spare.address}", steps)
    black_hole = _training(stage, "black_hole", f"{relay.address},{spare.address}", steps)
    for run_ in (frozen_trunk, black_hole):
        run_.gate.close_after(_HALTED_BEFORE)
        run_.start()
    assert stopping.child is not None
    halts = [
        Halt(frozen_trunk, partial(stopping.child.send, signal.SIGSTOP)),
        Halt(black_hole, relay.freeze),
    ]
    reference.start()
    _halt_and_wait(report, halts)
    # What was swallowed arrives after all: nobody may take it for news.
    relay.thaw()
    stopping.child.send(signal.SIGCONT)
    reference.finish(PATIENCE_S)
    for run_ in (frozen_trunk, black_hole):
        run_.finish(PATIENCE_S)
        require_same_run(report, reference.out, run_.out)
    if not options.short:
        for name, trunk in (("frozen_client", spare), ("forgotten_client", forgetting)):
            _stop_client(stage, report, name, trunk, steps)
            require_same_run(report, reference.out, stage.folder / name)
    for trunk in trunks:
        assert trunk.child is not None
        report.require(trunk.child.alive, f"{trunk.log.name}: the daemon died")


def _training(stage: Stage, name: str, trunk: str, steps: int) -> Training:
    return Training(stage, name, trunk, steps, checkpoint_every=10)


def _reach(training: Training, step: int) -> None:
    assert training.child is not None
    wait_until(training.past(step), [training.child], PATIENCE_S, f"step {step}")


def _halt_and_wait(report: Report, halts: list[Halt]) -> None:
    """Halts each run at its step, all of them at a time, and waits until each has gone on."""
    waiting = list(halts)

    def any_moved() -> bool:
        return any(halt.training.past(halt.until)() for halt in waiting)

    while waiting:
        # The others may be done already.
        children = [halt.training.child for halt in waiting if halt.training.child is not None]
        wait_until(any_moved, children, PATIENCE_S, "runs that were halted and go on")
        for halt in [h for h in waiting if h.training.past(h.until)()]:
            if halt.halted_at is None:
                halt.begin()
            else:
                waiting.remove(halt)
                halt.end(report)


def _stop_client(stage: Stage, report: Report, name: str, trunk: Trunk, steps: int) -> None:
    """Stops a client for longer than the trunk waits for its pings."""
    training = _training(stage, name, trunk.address, steps)
    training.gate.close_after(_HALTED_BEFORE)
    training.start()
    _reach(training, _STOP_AT)
    assert training.child is not None and trunk.child is not None
    closed_before = trunk.log.read_text(encoding="utf-8").count(DETACHED)
    training.child.send(signal.SIGSTOP)
    training.gate.open()
    stopped_at = time.monotonic()

    def noticed() -> bool:
        return trunk.log.read_text(encoding="utf-8").count(DETACHED) > closed_before

    took = wait_until(noticed, [trunk.child], PATIENCE_S, f"{name} noticed by the trunk")
    report.note(**{f"{name}_noticed_s": round(took, 2)})
    report.require_in_time(took <= NOTICED_BOUND_S, f"{name}: the trunk noticed after {took:.1f} s")
    # The stop itself lasts a given time: this is no waiting for something that happens.
    time.sleep(max(0.0, _STOPPED_CLIENT_S - (time.monotonic() - stopped_at)))
    training.child.send(signal.SIGCONT)
    training.finish(PATIENCE_S)
