"""A trunk that stops without dying, a client that does, and a connection that swallows all bytes.

Each is noticed within a bound, counted from the stop to the next line of ``metrics.jsonl`` while
the stop lasts, and the run ends as if nothing had happened.
"""

from __future__ import annotations

import signal
import time

from tests.chaos.metrics import require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import START_TIMEOUT_S, Training, Trunk, wait_until
from tests.chaos.relay import Relay
from tests.chaos.report import Report
from tests.chaos.stage import Stage

NOTICED_BOUND_S = 30.0
# Longer than the bound, so that a run that does not notice is seen as one.
_PATIENCE_S = 90.0
_STOP_AT = 15
_STOPPED_CLIENT_S = 40.0
# What the trunk logs when a connection broke.
DETACHED = "session waits for its client"


def run(stage: Stage, options: Options, report: Report) -> None:
    steps = 60 if options.short else 300
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
    for run_ in (reference, frozen_trunk, black_hole):
        run_.start()
    reference.finish(START_TIMEOUT_S)

    _reach(frozen_trunk, _STOP_AT)
    assert stopping.child is not None
    stopping.child.send(signal.SIGSTOP)
    _reach(black_hole, _STOP_AT)
    relay.freeze()
    report.note(
        frozen_trunk_noticed_s=_noticed(report, frozen_trunk),
        black_hole_noticed_s=_noticed(report, black_hole),
    )
    # What was swallowed arrives after all: nobody may take it for news.
    relay.thaw()
    stopping.child.send(signal.SIGCONT)
    for run_ in (frozen_trunk, black_hole):
        run_.finish(START_TIMEOUT_S)
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
    wait_until(training.past(step), [training.child], START_TIMEOUT_S, f"step {step}")


def _noticed(report: Report, training: Training) -> float:
    """Seconds until the run has gone on, from a stop that was just now."""
    assert training.child is not None
    training.metrics.look()
    # What was under way may still have been answered: the step after that was not.
    target = min(training.metrics.last_step + 2, training.steps)
    started = time.monotonic()
    wait_until(training.past(target), [training.child], _PATIENCE_S, f"{training.out.name} noticed")
    took = time.monotonic() - started
    report.require(
        took <= NOTICED_BOUND_S,
        f"{training.out.name}: went on {took:.1f} s after the stop, bound {NOTICED_BOUND_S:g} s",
    )
    return round(took, 2)


def _stop_client(stage: Stage, report: Report, name: str, trunk: Trunk, steps: int) -> None:
    """Stops a client for longer than the trunk waits for its pings."""
    training = _training(stage, name, trunk.address, steps)
    training.start()
    _reach(training, _STOP_AT)
    assert training.child is not None and trunk.child is not None
    closed_before = trunk.log.read_text(encoding="utf-8").count(DETACHED)
    training.child.send(signal.SIGSTOP)
    stopped_at = time.monotonic()

    def noticed() -> bool:
        return trunk.log.read_text(encoding="utf-8").count(DETACHED) > closed_before

    took = wait_until(noticed, [trunk.child], _PATIENCE_S, f"{name} noticed by the trunk")
    report.note(**{f"{name}_noticed_s": round(took, 2)})
    report.require(took <= NOTICED_BOUND_S, f"{name}: the trunk noticed after {took:.1f} s")
    # The stop itself lasts a given time: this is no waiting for something that happens.
    time.sleep(max(0.0, _STOPPED_CLIENT_S - (time.monotonic() - stopped_at)))
    training.child.send(signal.SIGCONT)
    training.finish(START_TIMEOUT_S)
