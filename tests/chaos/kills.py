"""Both sides are killed again and again at named places; the run ends as if nothing had happened.

Recovery is counted from when both sides are back after the last kill (the trunk: its ready file is
written; the client: its libraries are loaded) to the next line of ``metrics.jsonl``. It holds all
that is ours: reading the checkpoint, opening, sending the adapter, computing again what was held,
waiting between attempts. The long form has a bound on it.
"""

from __future__ import annotations

import collections
import random
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.failpoints import CLIENT_FAILPOINTS, TRUNK_FAILPOINTS
from tests.chaos.metrics import require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import Child, Training, Trunk
from tests.chaos.report import BrokenError, Report, percentile
from tests.chaos.stage import Stage
from tests.patience import PATIENCE_S

CHECKPOINT_EVERY = 10
RECOVERY_BOUND_S = 5.0
NAMES_BOUND = 15
_LOOK_S = 0.01

# How often a step comes by; a place that is not here is passed once in many steps or in a life.
_PASSED_BY_STEP = {
    "trunk.forward": 1,
    "trunk.backward": 1,
    "trunk.answer": 2,
    "client.forward": 1,
    "client.backward": 1,
    "client.step": 1,
    "client.optimizer": 1,
}
# Of each life, in steps: too short for the next checkpoint, or long enough to get past some.
_SHORT_LIFE, _LONG_LIFE = (1, 6), (8, 28)
_TRUNK_SHARE = 0.6


@dataclass
class Side:
    """One of the two processes and how it is brought back."""

    name: str
    failpoints: tuple[str, ...]
    begin: Callable[[str], Child]
    is_back: Callable[[], bool]
    child: Child
    failpoint: str = ""
    back_at: float | None = None


def run(stage: Stage, options: Options, report: Report) -> None:
    kills = options.kills or (8 if options.short else 200)
    steps = options.steps or (40 if options.short else 500)
    calm, trunk = Trunk(stage, "calm_trunk"), Trunk(stage, "trunk")
    reference = Training(stage, "undisturbed", calm.address, steps)
    calm.running()
    reference.start()
    reference.finish(PATIENCE_S + steps)
    assert calm.child is not None
    calm.child.send(signal.SIGTERM)

    training = Training(stage, "killed", trunk.address, steps, checkpoint_every=CHECKPOINT_EVERY)
    driver = Driver(trunk, training, kills, random.Random(options.seed))
    try:
        driver.drive()
    finally:
        driver.note(report)
    require_same_run(report, reference.out, training.out)
    report.require(sum(driver.killed.values()) >= kills, f"fewer than {kills} kills")
    if not options.short:
        report.require(len(driver.killed) >= NAMES_BOUND, f"fewer than {NAMES_BOUND} failpoints")
    slowest = max(driver.recoveries, default=0.0)
    report.require_in_time(
        slowest <= RECOVERY_BOUND_S,
        f"a recovery took {slowest:.2f} s, more than {RECOVERY_BOUND_S:g} s",
    )


class Driver:
    """Starts whoever died at once, with a new place to die at, until the run is finished.

    Args:
        trunk: Not started yet.
        training: Not started yet.
        kills: How many to reach; from then on nobody is killed.
        chance: Draws the places.
    """

    def __init__(self, trunk: Trunk, training: Training, kills: int, chance: random.Random) -> None:
        self._training, self._kills, self._chance = training, kills, chance
        self.killed: collections.Counter[str] = collections.Counter()
        self.recoveries: list[float] = []
        self.replaced = 0
        """Kills that came before the run had recovered from the one before."""
        self._recovering = False
        self._written: dict[int, float] = {}
        self._changed: list[int] = []
        self._moved_at = time.monotonic()
        self._written_in_life = False

        def resume(failpoints: str) -> Child:
            return training.start(resume=training.began, failpoints=failpoints)

        self.without_trunk = 0
        """Starts of the client that found no trunk: it says so and ends, to be started again."""
        self._sides = [
            self._side("trunk", TRUNK_FAILPOINTS, trunk.start, lambda: trunk.serves),
            self._side("client", CLIENT_FAILPOINTS, resume, lambda: training.imported),
        ]

    def drive(self) -> None:
        """Returns when the training has ended by itself.

        Raises:
            BrokenError: If a process ends otherwise than by its failpoint, or nothing moves.
        """
        client = self._sides[1]
        while True:
            self._wait()
            self._look()
            for side in self._sides:
                if side.child.alive:
                    continue
                status = side.child.popen.wait()
                if side is client and status == 0:
                    return
                self._died(side, status)
            if time.monotonic() - self._moved_at > PATIENCE_S:
                stacks = "\n".join(side.child.stacks() for side in self._sides)
                raise BrokenError(f"nothing was written for {PATIENCE_S:g} s: {stacks}")

    def note(self, report: Report) -> None:
        by_side = {s.name: sum(self.killed[f] for f in s.failpoints) for s in self._sides}
        report.note(kills=sum(self.killed.values()), by_side=by_side, by_failpoint=self.killed)
        report.note(
            failpoints=len(self.killed),
            lines_written=self._training.metrics.written,
            recoveries=len(self.recoveries),
            killed_again_before_recovery=self.replaced,
            client_starts_without_trunk=self.without_trunk,
        )
        if self.recoveries:
            report.note(
                recovery_max_s=round(max(self.recoveries), 3),
                recovery_p95_s=round(percentile(self.recoveries, 0.95), 3),
                recovery_median_s=round(percentile(self.recoveries, 0.5), 3),
            )
        report.require(
            not self._changed,
            f"{len(self._changed)} lines gave a step another loss than before, "
            f"the first of step {self._changed[:1]}",
        )

    def _side(
        self,
        name: str,
        failpoints: tuple[str, ...],
        begin: Callable[[str], Child],
        is_back: Callable[[], bool],
    ) -> Side:
        failpoint = self._drawn(name, failpoints)
        return Side(name, failpoints, begin, is_back, begin(failpoint), failpoint)

    def _wait(self) -> None:
        """Until a process ends, or it is time to look at the files again."""
        ended = select.poll()
        for side in self._sides:
            ended.register(side.child.fd, select.POLLIN)
        ended.poll(_LOOK_S * 1000)

    def _look(self) -> None:
        now = time.monotonic()
        for side in self._sides:
            if side.back_at is None and side.is_back():
                side.back_at = now
        for line in self._training.metrics.look():
            self._moved_at, self._written_in_life = now, True
            if self._written.setdefault(line["step"], line["loss"]) != line["loss"]:
                self._changed.append(line["step"])
            back = [side.back_at for side in self._sides]
            if self._recovering and None not in back:
                self.recoveries.append(now - max(at for at in back if at is not None))
                self._recovering = False

    def _died(self, side: Side, status: int) -> None:
        if self._found_no_trunk(side, status):
            self.without_trunk += 1
            side.back_at, side.child = None, side.begin(side.failpoint)
            return
        if status != -signal.SIGKILL or not side.failpoint:
            raise BrokenError(
                f"the {side.name} ended with {status} (failpoint {side.failpoint or 'none'}): "
                f"{side.child.said()}"
            )
        self._moved_at = time.monotonic()
        if side.name == "client":
            self._written_in_life = False
        self.killed[side.failpoint.partition("=")[0]] += 1
        self.replaced += self._recovering
        self._recovering = True
        side.failpoint, side.back_at = self._drawn(side.name, side.failpoints), None
        side.child = side.begin(side.failpoint)

    def _found_no_trunk(self, side: Side, status: int) -> bool:
        """Whether it is a client that was started while the trunk was away."""
        return (
            side.name == "client"
            and status == 2
            and "TrunkUnavailableError" in side.child.said()
            and not self._written_in_life
        )

    def _drawn(self, side: str, failpoints: tuple[str, ...]) -> str:
        """Where the next life of a side ends: ``NAME=kill@N``, or empty when all are done."""
        killed, done = sum(self.killed.values()), self._training.metrics.last_step
        if killed >= self._kills:
            return ""
        shortest, longest = _LONG_LIFE
        if side == "client":
            longest = round(longest * _TRUNK_SHARE / (1 - _TRUNK_SHARE))
        # As many kills as steps, in shares of what is wanted of both: a life that could carry the
        # steps past the kills is a short one, or the run would end before all of them.
        if (killed + 1) / self._kills < (done + longest) / self._training.steps:
            shortest, longest = _SHORT_LIFE
        # Each kill that is still to come has a step left to come in, whoever was how fast; the last
        # line may not be written yet.
        spare = self._training.steps - done - 1 - (self._kills - killed)
        shortest, longest = min(shortest, max(1, spare)), min(longest, max(1, spare))
        if spare < CHECKPOINT_EVERY:
            failpoints = tuple(f for f in failpoints if f.rpartition(".")[0] in _PASSED_BY_STEP)
        name = self._chance.choice(failpoints)
        passed = _PASSED_BY_STEP.get(name.rpartition(".")[0])
        count = self._chance.randint(shortest, longest) * passed if passed else 1
        return f"{name}=kill@{count}"
