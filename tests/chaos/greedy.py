"""A tenant that floods the trunk and one that trains; then memory that runs out in a request.

The other tenant's steps are timed with and without the flood, in turns, in one run of its own,
whose next turn begins when the flood was let go on or held. Step times of two turns next to each
other see the same machine; the long form has a bound on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from peft import LoraConfig

from client_service import TrainingClient
from client_service.certificates import write_certificates
from shared.errors import ResourceExhaustedError
from tests.chaos.gate import Gate
from tests.chaos.metrics import MetricsTail, require_same_run
from tests.chaos.options import Options
from tests.chaos.processes import Child, Training, Trunk, wait_until
from tests.chaos.raw import STATES_BTD
from tests.chaos.report import Report, percentile
from tests.chaos.stage import LORA, Stage
from tests.patience import PATIENCE_S

RATIO_BOUND = 1.2
# Room for the graphs of some forwards of a tenant, not of many.
_TENANT_HELD_BYTES = 4_000_000
_TURN = 50
# The first steps of a turn still see what the one before left under way.
_LEFT_OUT = 3
# The first two forwards, one a client, bring an adapter and train nothing.
MEMORY_FAILPOINTS = "trunk.forward.after=memory@4,trunk.backward.before=memory@2"


def run(stage: Stage, options: Options, report: Report) -> None:
    turns = 12 if options.short else 60
    _flooded(stage, report, turns)
    _out_of_memory(stage, report)


def _flooded(stage: Stage, report: Report, turns: int) -> None:
    certificates = stage.folder / "certificates"
    write_certificates(certificates, tenants=("greedy", "other"))
    trunk = Trunk(
        stage,
        "trunk",
        "--tls",
        str(certificates / "server"),
        "--tenant-held-bytes",
        str(_TENANT_HELD_BYTES),
    )
    trunk.start()
    tls = {"TRUNKLINE_TLS": str(certificates / "clients" / "other")}
    steps = turns * _TURN
    reference = Training(stage, "undisturbed", trunk.address, steps, environment=tls)
    other = Training(stage, "other", trunk.address, steps, environment=tls)
    trunk.running()
    reference.start()
    reference.finish(PATIENCE_S + steps)

    folder, dam = str(certificates / "clients" / "greedy"), Gate(stage.folder / "flood.gate")
    greedy = Child(
        stage, ["-m", "tests.chaos.flood", trunk.address, folder, str(dam.path)],
        stage.folder / "flood.log",
    )  # fmt: skip
    wait_until(lambda: _refused(greedy) > 0, [greedy], PATIENCE_S, "the first refusal")
    other.gate.close_after(0)
    client = other.start()
    for turn in range(turns):
        if turn % 2:
            dam.open()
        else:
            dam.close_after(0)
        end = (turn + 1) * _TURN
        other.gate.close_after(end)
        wait_until(other.past(end), [client, greedy], PATIENCE_S, f"the end of turn {turn}")
    other.gate.open()
    other.finish(PATIENCE_S)
    _compare(report, other.metrics)
    report.note(greedy_answers=_answers(greedy))
    report.require(_refused(greedy) > 0, "the greedy tenant was never refused")
    report.require(greedy.alive, f"the greedy tenant's stream ended: {greedy.said()}")
    require_same_run(report, reference.out, other.out)


def _compare(report: Report, metrics: MetricsTail) -> None:
    with_, without = [], []
    for line in metrics.lines():
        # Turns begin with the step after the one that was waited for.
        turn, number = divmod(line["step"] - 1, _TURN)
        if number >= _LEFT_OUT:
            (with_ if turn % 2 else without).append(line["seconds"])
    ratio = percentile(with_, 0.95) / percentile(without, 0.95)
    report.note(
        step_p95_ms={"with": _ms(with_, 0.95), "without": _ms(without, 0.95)},
        step_median_ms={"with": _ms(with_, 0.5), "without": _ms(without, 0.5)},
        p95_ratio=round(ratio, 3),
        steps_timed=len(with_) + len(without),
    )
    report.require_in_time(
        ratio <= RATIO_BOUND, f"p95 of a step is {ratio:.2f} times as long, bound {RATIO_BOUND:g}"
    )


def _ms(seconds: list[float], share: float) -> float:
    return round(1000 * percentile(seconds, share), 2)


def _answers(greedy: Child) -> dict[str, int]:
    said = [line for line in greedy.said().splitlines() if line.startswith("{")]
    counts: dict[str, int] = json.loads(said[-1]) if said else {}
    return counts


def _refused(greedy: Child) -> int:
    return _answers(greedy).get("ERROR_CODE_RESOURCE_EXHAUSTED", 0)


def _out_of_memory(stage: Stage, report: Report) -> None:
    """Two sessions train in turns; each lack of memory costs one request and changes nothing."""
    calm, scarce = Trunk(stage, "calm_trunk"), Trunk(stage, "scarce_trunk")
    calm.start()
    scarce.start(MEMORY_FAILPOINTS)
    expected, none = _train_two(calm)
    found, refusals = _train_two(scarce)
    report.note(out_of_memory=refusals)
    report.require(not none, f"the undisturbed trunk refused: {none}")
    report.require(
        sorted(refusals) == ["backward", "forward"],
        f"one forward and one backward without memory were to be refused, found {refusals}",
    )
    same = all(
        first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
        for first, second in zip(expected, found, strict=True)
    )
    report.require(same, "after a lack of memory the adapters are others")
    assert scarce.child is not None
    report.require(scarce.child.alive, f"the daemon died of it: {scarce.child.said()}")


def _train_two(trunk: Trunk) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
    """Returns two sessions' adapters after some steps in turns, and what was refused."""
    trunk.running()
    config = LoraConfig(**LORA)  # type: ignore[arg-type]
    clients = [TrainingClient(trunk.address, config, seed=n, dropout=0.1) for n in range(2)]
    optimizers = [torch.optim.AdamW(client.parameters(), lr=0.01) for client in clients]
    refusals: list[str] = []

    def insisted(kind: str, step: int, ask: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for _ in range(2):
            torch.manual_seed(step)  # the same masks when it is asked again
            try:
                ask(STATES_BTD)
                return
            except ResourceExhaustedError:
                refusals.append(kind)

    for step in range(4):
        for client, optimizer in zip(clients, optimizers, strict=True):
            insisted("forward", step, client.forward)
            insisted("backward", step, client.backward)
            optimizer.step()
            optimizer.zero_grad()
    adapters = [
        {n: p.detach() for n, p in client.model.named_parameters() if p.requires_grad}
        for client in clients
    ]
    for client in clients:
        client.close()
    return adapters, refusals
