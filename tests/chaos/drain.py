"""SIGTERM under two training clients: the daemon ends in time with status 0, and no step is lost.

The clients go on with the other trunk they know, then with the first one started again on its
port; in the long form also with one trunk alone that is drained and started again. A daemon that
waits for more than the open steps never ends: it may wait longer than the experiment does.

Nobody gets further than a leg of the run before the drain that belongs to it, however late that is.
"""

from __future__ import annotations

import signal
import time

from tests.chaos.metrics import require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import Training, Trunk, wait_until
from tests.chaos.report import Report
from tests.chaos.stage import Stage
from tests.patience import PATIENCE_S

EXIT_BOUND_S = 30.0
CLIENTS = 2
_STEPS_BETWEEN, _LEG = 15, 30
_DRAIN_TIMEOUT = ("--drain-timeout-s", str(4 * PATIENCE_S))


def run(stage: Stage, options: Options, report: Report) -> None:
    steps = 4 * _LEG if options.short else 400
    first, second = (Trunk(stage, f"{name}_trunk", *_DRAIN_TIMEOUT) for name in ("first", "second"))
    for trunk in (first, second):
        trunk.start()
    for trunk in (first, second):
        trunk.running()
    references = [_training(stage, "undisturbed", n, second.address, steps) for n in range(CLIENTS)]
    _start(references)
    _finish(references)

    both = f"{first.address},{second.address}"
    moved = [_training(stage, "moved", n, both, steps) for n in range(CLIENTS)]
    _start(moved)
    to_second = _drain_on_the_way(report, first, moved, 0)
    # Steps of the next leg can only be done with the other trunk; they wait at its end.
    _allow(moved, 2 * _LEG)
    _reach(moved, 2 * _LEG)
    first.running()
    back_to_first = _drain_on_the_way(report, second, moved, 2 * _LEG)
    _finish(moved)
    report.note(drained_s=to_second, drained_back_s=back_to_first, clients=CLIENTS, steps=steps)
    _require_nothing_lost(report, references, moved)

    if not options.short:
        waiting = [_training(stage, "waited", n, first.address, steps) for n in range(CLIENTS)]
        _start(waiting)
        report.note(drained_alone_s=_drain_on_the_way(report, first, waiting, 0))
        first.running()
        _finish(waiting)
        _require_nothing_lost(report, references, waiting)


def _training(stage: Stage, name: str, number: int, trunk: str, steps: int) -> Training:
    every = 0 if name == "undisturbed" else 10
    return Training(stage, f"{name}_{number}", trunk, steps, seed=number, checkpoint_every=every)


def _start(trainings: list[Training]) -> None:
    for training in trainings:
        training.start()


def _allow(trainings: list[Training], step: int) -> None:
    for training in trainings:
        training.gate.close_after(step)


def _reach(trainings: list[Training], step: int) -> None:
    for training in trainings:
        assert training.child is not None
        what = f"{training.out.name}'s step {step}"
        wait_until(training.past(min(step, training.steps)), [training.child], PATIENCE_S, what)


def _finish(trainings: list[Training]) -> None:
    for training in trainings:
        training.gate.open()
    for training in trainings:
        training.finish(PATIENCE_S)


def _drain_on_the_way(report: Report, trunk: Trunk, trainings: list[Training], step: int) -> float:
    """Drains while all are in the leg that begins after a step, most likely within one."""
    _allow(trainings, step + _LEG)
    _reach(trainings, step + _STEPS_BETWEEN)
    return _drain(report, trunk)


def _drain(report: Report, trunk: Trunk) -> float:
    """Tells the daemon to end; returns the seconds it took."""
    assert trunk.child is not None
    started = time.monotonic()
    trunk.child.send(signal.SIGTERM)
    status = trunk.child.wait(PATIENCE_S, trunk.log.name)
    took = time.monotonic() - started
    report.require(status == 0, f"{trunk.log.name}: status {status}: {trunk.child.said()}")
    report.require_in_time(took <= EXIT_BOUND_S, f"{trunk.log.name}: ended after {took:.1f} s")
    sessions = trunk.logged("draining")[-1]["sessions"]
    # Else nothing was shown.
    report.require(sessions == CLIENTS, f"{trunk.log.name}: drained {sessions} sessions")
    return round(took, 2)


def _require_nothing_lost(
    report: Report, references: list[Training], found: list[Training]
) -> None:
    for reference, training in zip(references, found, strict=True):
        require_same_run(report, reference.out, training.out)
        repeated = training.metrics.written - training.steps
        report.require(repeated == 0, f"{training.out.name}: {repeated} steps were done twice")
