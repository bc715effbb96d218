"""Held forwards whose graph rests in a file: the same bits, within a budget, and none left over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client_service import SplitModelForCausalLM
from client_service.calls import SessionTerms
from client_service.session import TrunkSession
from client_service.whole import trained_weights
from shared.errors import InvalidInputError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from tests.conftest import Daemon
from tests.integration.test_pipeline import batch, lora
from trunk_service.offload import OffloadArea

Start = Callable[..., Daemon]

GRAPH = 6 * 20 * 64 * 4  # bytes of one boundary: a session that holds two of them holds no graph
SMALL = ("--session-held-bytes", str(40 * GRAPH))


def run(folder: Path, daemon: Daemon, dropout: float) -> tuple[list[Any], set[int]]:
    """Four steps; losses, the weights, and how the trunk held the forwards."""
    split: Any = SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=lora(lora_dropout=dropout), seed=1, dropout=dropout
    )
    session = split.train().remote_trunk.session
    modes: set[int] = set()
    asked = session._link.wait

    def watched(sent: Any) -> Any:
        answer = asked(sent)
        if answer.message.WhichOneof("body") == "forward":
            modes.add(answer.message.forward.held_mode)
        return answer

    session._link.wait = watched
    optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    found: list[Any] = []
    for step in range(4):
        loss = split(**batch(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    found += trained_weights(split).values()
    split.remote_trunk.close()
    return found, modes


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_all_three_ways_to_hold_give_the_same_bits(
    dropout: float, trunkd: Start, tiny_gpt2: Path, tmp_path: Path
) -> None:
    rest = tmp_path / "rest"
    rest.mkdir()
    model = ("--model", str(tiny_gpt2), "--split", "1:9")
    offloads = ("--offload-bytes", "100000000", "--offload-dir", str(rest))
    retained, modes = run(tiny_gpt2, trunkd(*model), dropout)
    assert modes == {pb.HELD_MODE_RETAINED}
    for flags, mode in (
        ((*model, *SMALL), pb.HELD_MODE_RECOMPUTED),
        ((*model, *SMALL, *offloads), pb.HELD_MODE_OFFLOADED),
    ):
        found, modes = run(tiny_gpt2, trunkd(*flags), dropout)
        assert modes == {mode}
        for a, b in zip(found, retained, strict=True):
            assert a == b if isinstance(a, float) else torch.equal(a, b)
    assert not list(rest.iterdir()), "a file has a name"


def test_a_spent_offload_budget_recomputes_and_is_given_back(
    trunkd: Start, tiny_gpt2: Path, tmp_path: Path
) -> None:
    rest = tmp_path / "rest"
    rest.mkdir()
    flags = ("--offload-bytes", "20000000", "--offload-dir", str(rest))
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:9", *SMALL, *flags)
    session = TrunkSession(daemon.address, SessionTerms())
    hidden = torch.randn(6, 20, 64)

    def forward(name: str) -> int:
        message = pb.SessionRequest(forward=pb.Forward(request_id=name, keep_graph=True))
        answer = session._link.ask(message, {"hidden_states": hidden})
        return answer.message.forward.held_mode

    modes: list[int] = []
    while not modes or modes[-1] == pb.HELD_MODE_OFFLOADED:
        modes.append(forward(f"{len(modes)}"))
    assert 2 <= len(modes) <= 10 and modes[-1] == pb.HELD_MODE_RECOMPUTED
    last = f"{len(modes) - 1}"
    first, second = (session.backward(hidden, name, True, [], [], False)[0] for name in ("0", last))
    assert first is not None and second is not None and torch.equal(first, second)
    assert forward("after a backward") == pb.HELD_MODE_OFFLOADED
    assert forward("full again") == pb.HELD_MODE_RECOMPUTED
    session.release(["after a backward"], [])
    assert forward("after a release") == pb.HELD_MODE_OFFLOADED
    session.close()


def test_offloading_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="give --offload-dir DIR"):
        OffloadArea(1, None, torch.device("cpu"))
    with pytest.raises(InvalidInputError, match="no such folder"):
        OffloadArea(1, tmp_path / "missing", torch.device("cpu"))
