"""SIGTERM under two training clients: the daemon ends in time with status 0, and no step is lost.

The clients go on with the other trunk they know, then with the first one started again on its
port; in the long form also with one trunk alone that is drained and started again.
"""

from __future__ import annotations

import json
import signal
import time

from tests.chaos.metrics import require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import START_TIMEOUT_S, Training, Trunk, wait_until
from tests.chaos.report import Report
from tests.chaos.stage import Stage

EXIT_BOUND_S = 30.0
CLIENTS = 2
_STEPS_BETWEEN = 15


def run(stage: Stage, options: Options, report: Report) -> None:
    steps = 80 if options.short else 400
    first, second = Trunk(stage, "first_trunk"), Trunk(stage, "second_trunk")
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
    _reach(moved, _STEPS_BETWEEN)
    to_second = _drain(report, first)
    _reach(moved, _last(moved) + _STEPS_BETWEEN)
    # They wait, or would be done before the first trunk is back.
    _tell(moved, signal.SIGSTOP)
    first.running()
    _tell(moved, signal.SIGCONT)
    back_to_first = _drain(report, second)
    _finish(moved)
    report.note(drained_s=to_second, drained_back_s=back_to_first, clients=CLIENTS, steps=steps)
    _require_nothing_lost(report, references, moved)

    if not options.short:
        waiting = [_training(stage, "waited", n, first.address, steps) for n in range(CLIENTS)]
        _start(waiting)
        _reach(waiting, _STEPS_BETWEEN)
        report.note(drained_alone_s=_drain(report, first))
        first.running()
        _finish(waiting)
        _require_nothing_lost(report, references, waiting)


def _training(stage: Stage, name: str, number: int, trunk: str, steps: int) -> Training:
    every = 0 if name == "undisturbed" else 10
    return Training(stage, f"{name}_{number}", trunk, steps, seed=number, checkpoint_every=every)


def _start(trainings: list[Training]) -> None:
    for training in trainings:
        training.start()


def _tell(trainings: list[Training], number: signal.Signals) -> None:
    for training in trainings:
        assert training.child is not None
        training.child.send(number)


def _reach(trainings: list[Training], step: int) -> None:
    for training in trainings:
        assert training.child is not None
        what = f"{training.out.name}'s step {step}"
        wait_until(
            training.past(min(step, training.steps)), [training.child], START_TIMEOUT_S, what
        )


def _last(trainings: list[Training]) -> int:
    return max(training.metrics.last_step for training in trainings)


def _finish(trainings: list[Training]) -> None:
    for training in trainings:
        training.finish(START_TIMEOUT_S)


def _drain(report: Report, trunk: Trunk) -> float:
    """Tells the daemon to end; returns the seconds it took."""
    assert trunk.child is not None
    started = time.monotonic()
    trunk.child.send(signal.SIGTERM)
    status = trunk.child.wait(2 * EXIT_BOUND_S, trunk.log.name)
    took = time.monotonic() - started
    report.require(status == 0, f"{trunk.log.name}: status {status}: {trunk.child.said()}")
    report.require(took <= EXIT_BOUND_S, f"{trunk.log.name}: ended after {took:.1f} s")
    entries = [json.loads(line) for line in trunk.log.read_text().splitlines() if line[:1] == "{"]
    draining = [entry["sessions"] for entry in entries if entry["message"] == "draining"]
    # Else nothing was shown.
    report.require(draining[-1] == CLIENTS, f"{trunk.log.name}: drained {draining[-1]} sessions")
    return round(took, 2)


def _require_nothing_lost(
    report: Report, references: list[Training], found: list[Training]
) -> None:
    for reference, training in zip(references, found, strict=True):
        require_same_run(report, reference.out, training.out)
        repeated = training.metrics.written - training.steps
        report.require(repeated == 0, f"{training.out.name}: {repeated} steps were done twice")
