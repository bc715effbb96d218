"""Training with lossy wire formats: how close it stays, what it sends, and the way back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client_service import SplitModelForCausalLM
from client_service.pipeline import accumulate, cut_batch
from shared.errors import InvalidInputError
from tests.conftest import Daemon
from tests.integration.test_pipeline import batch, lora

Start = Callable[..., Daemon]


@pytest.fixture
def opened(trunkd: Start, tiny_gpt2: Path) -> Callable[..., Any]:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")

    def open_model(dropout: float = 0.0, **settings: Any) -> Any:
        config = lora(lora_dropout=dropout)
        return SplitModelForCausalLM.from_pretrained(
            tiny_gpt2, daemon.address, peft_config=config, dropout=dropout, seed=1, **settings
        ).train()

    return open_model


def train(model: Any, steps: int, pieces: int = 0) -> list[float]:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        if pieces:
            losses.append(accumulate(model, cut_batch(batch(step), pieces), pieces))
        else:
            loss = model(**batch(step), use_cache=False).loss
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("wire_format", "apart", "bytes_per_token"),
    [("bfloat16", 1e-3, 64 * 2 * 4), ("float16", 1e-3, 64 * 2 * 4), ("int8", 5e-3, 66 * 4)],
)
def test_a_lossy_format_stays_close_for_fewer_bytes(
    wire_format: str, apart: float, bytes_per_token: int, opened: Callable[..., Any]
) -> None:
    exact, lossy = opened(), opened(wire_format=wire_format)
    expected, found = train(exact, 6), train(lossy, 6)
    assert expected != found, "nothing was rounded: the format was not used"
    worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    assert worst <= apart
    counted = lossy.remote_trunk.session.traffic
    inside = [
        p for n, p in lossy.named_parameters() if "lora" in n and re.search(r"\.h\.[12]\.", n)
    ]
    # What is in the trunk's blocks goes up and its gradients come down, a step, in float32. Masks
    # and small fields aside; hidden states in float32 would be twice as many or more.
    adapter = 6 * sum(2 * p.nbytes for p in inside)
    tokens = 6 * batch(0)["labels"].numel()
    per_token = (counted.bytes_sent + counted.bytes_received - adapter) / tokens
    assert 0.9 * bytes_per_token <= per_token <= bytes_per_token + 60
    for model in (exact, lossy):
        model.remote_trunk.close()


def test_hidden_states_and_gradients_may_differ(opened: Callable[..., Any]) -> None:
    """With gradients alone rounded, the first loss is exact and the second is not."""
    exact, lossy = opened(), opened(gradient_wire_format="int8")
    expected, found = train(exact, 2), train(lossy, 2)
    assert found[0] == expected[0] and found[1] != expected[1]
    for model in (exact, lossy):
        model.remote_trunk.close()


@pytest.mark.parametrize("pieces", [0, 3])
def test_the_guard_changes_nothing_until_it_must(pieces: int, opened: Callable[..., Any]) -> None:
    settings = {"wire_format": "int8", "dropout": 0.2}
    alone = train(opened(**settings), 4, pieces)
    watched = opened(**settings, max_wire_drift=0.5, wire_check_every=2)
    assert train(watched, 4, pieces) == alone
    guard = watched.wire_guard
    assert len(guard.drifts) == (2 if not pieces else 6)
    assert 0 < max(guard.drifts) < 0.05, "other dropout, or nothing was rounded"
    assert not guard.alarmed
    watched.remote_trunk.close()


@pytest.mark.parametrize("parts", ["top", "bottom"])
def test_the_guard_watches_a_model_that_is_trained_in_part(
    parts: str, opened: Callable[..., Any]
) -> None:
    """With the top alone the trunk is asked for no gradient, and keeps no graph."""
    model = opened(wire_format="int8", peft_parts=parts, max_wire_drift=0.5, wire_check_every=1)
    train(model, 2)
    drifts = model.wire_guard.drifts
    assert len(drifts) == 2 and 0 < max(drifts) < 0.05
    model.remote_trunk.close()


def test_the_guard_goes_back_to_float32(
    opened: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = opened(wire_format="int8", max_wire_drift=1e-9)
    session = model.remote_trunk.session
    train(model, 1)
    assert model.wire_guard.alarmed
    assert "everything travels in float32" in caplog.text
    before = session.traffic.bytes_sent
    model.zero_grad()
    loss = model(**batch(5), use_cache=False).loss
    loss.backward()
    assert session.traffic.bytes_sent - before >= 2 * 64 * 4 * batch(5)["labels"].numel()
    again = model(**batch(5), use_cache=False).loss
    assert torch.equal(again, loss)
    model.remote_trunk.close()


def test_float32_is_exact_and_drifts_by_nothing(opened: Callable[..., Any]) -> None:
    model = opened(max_wire_drift=1e-12, wire_check_every=1)
    train(model, 2)
    assert model.wire_guard.drifts == [0.0, 0.0]
    model.remote_trunk.close()


def test_what_is_no_format_or_bound_is_refused(opened: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInputError, match="accepted: float32, bfloat16"):
        opened(wire_format="int4")
    with pytest.raises(InvalidInputError, match="must be positive"):
        opened(wire_format="int8", max_wire_drift=0.0)
