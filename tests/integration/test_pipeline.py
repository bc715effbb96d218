"""Micro-batches in flight: the numbers are those of one after the other, and of one large batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig

from client_service import SplitModelForCausalLM
from client_service.pipeline import accumulate, cut_batch, model_loss
from client_service.turns import Turns
from client_service.whole import gradients, largest_difference, trained_weights, whole_twin
from shared.errors import InvalidInputError, ReusedRequestError
from tests.conftest import Daemon
from tests.models import VOCAB, tiny_model
from tests.patience import PATIENCE_S

Start = Callable[..., Daemon]


def lora(**changes: Any) -> LoraConfig:
    targets = ["c_attn", "c_fc", "c_proj"]
    settings = {"r": 4, "target_modules": targets, "fan_in_fan_out": True}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Six rows, of which one is padded and one has hardly a label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (6, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[4, :17] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(
    folder: Path, daemon: Daemon, in_flight: int, dropout: float = 0.0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of three micro-batches each; losses and the adapter's weights of all parts."""
    config = lora(lora_dropout=dropout)
    split: Any = SplitModelForCausalLM.from_pretrained(
        folder, daemon.address, peft_config=config, dropout=dropout, seed=1
    )
    split.train()
    optimizer = torch.optim.AdamW([p for p in split.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(7)
    losses = []
    for step in range(3):
        losses.append(accumulate(split, cut_batch(batch(step), 3), in_flight))
        torch.nn.utils.clip_grad_norm_(split.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    split.remote_trunk.close()
    return losses, trained_weights(split)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_overlap_changes_no_bit(dropout: float, trunkd: Start, tiny_gpt2: Path) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    alone = trained(tiny_gpt2, daemon, 1, dropout)
    for in_flight in (2, 3):
        losses, weights = trained(tiny_gpt2, daemon, in_flight, dropout)
        assert losses == alone[0]
        assert largest_difference(weights, alone[1]) == 0


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_micro_batches_are_the_whole_batch(method: str, trunkd: Start, tiny_gpt2: Path) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    config: Any = lora()
    if method == "adalora":
        config = AdaLoraConfig(
            task_type="CAUSAL_LM",
            init_r=4,
            target_r=2,
            total_step=10,
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        )
    split: Any = SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, daemon.address, peft_config=config
    )
    whole = whole_twin(tiny_gpt2, split)
    loss = accumulate(split.train(), cut_batch(batch(0), 3), 3)
    expected = model_loss(whole.train(), batch(0))
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-5)
    found, theirs = gradients(split), gradients(whole)
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)
    split.remote_trunk.close()


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("projection", [False, True], ids=["prefix", "projected prefix"])
def test_what_both_ends_share_is_gone_back_through_for_both(
    projection: bool, in_flight: int, trunkd: Start, tiny_gpt2: Path
) -> None:
    """One prefix makes the keys and values of all blocks, on both sides."""
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projection
    )
    split: Any = SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, daemon.address, peft_config=config
    )
    whole = whole_twin(tiny_gpt2, split)
    expected = stepped(whole.train(), 0)
    assert stepped(split.train(), in_flight) == pytest.approx(expected, abs=1e-5)
    assert largest_difference(trained_weights(split), trained_weights(whole)) <= 1e-5
    split.remote_trunk.close()


def stepped(model: Any, in_flight: int) -> list[float]:
    """The losses of three steps; 0 in flight is an ordinary loop over ordinary backwards."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for step in range(3):
        pieces = cut_batch(batch(step), 3)
        if in_flight:
            losses.append(accumulate(model, pieces, in_flight))
        else:
            counts = [int((p["labels"][:, 1:] != -100).sum()) for p in pieces]
            total = 0.0
            for piece, count in zip(pieces, counts, strict=True):
                loss = model_loss(model, piece) * (count / sum(counts))
                loss.backward()
                total += float(loss.detach())
            losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_loss_may_read_what_is_below_the_trunk(
    in_flight: int, trunkd: Start, tiny_gpt2: Path
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    split: Any = SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, daemon.address, peft_config=lora(init_lora_weights=False)
    )
    whole = whole_twin(tiny_gpt2, split)
    below: dict[str, torch.Tensor] = {}

    def keep(block: Any, args: Any, output: torch.Tensor) -> None:
        below[threading.current_thread().name] = output

    def loss_of(model: Any, piece: Any) -> torch.Tensor:
        loss: torch.Tensor = model_loss(model, piece)
        return loss + below[threading.current_thread().name].square().mean()

    for model in (split, whole):
        model.get_submodule("base_model.model.transformer.h.0").register_forward_hook(keep)
    pieces = [cut_batch(batch(seed), 2)[0] for seed in (0, 1)]
    accumulate(split.train(), pieces, in_flight, loss_of)
    counts = [int((piece["labels"][:, 1:] != -100).sum()) for piece in pieces]
    for piece, count in zip(pieces, counts, strict=True):
        (loss_of(whole.train(), piece) * (count / sum(counts))).backward()
    assert largest_difference(gradients(split), gradients(whole)) <= 1e-6
    split.remote_trunk.close()


def test_a_failure_ends_all_and_leaves_the_session_usable(
    trunkd: Start, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = trunkd("--model", str(tiny_gpt2), "--split", "1:3")
    split: Any = SplitModelForCausalLM.from_pretrained(
        tiny_gpt2, daemon.address, peft_config=lora()
    )
    split.train()
    calls, begun = 0, set[tuple[str, int]]()
    take, pause = Turns.take, threading.Event()

    def noted(turns: Turns, micro: int) -> None:
        begun.add((threading.current_thread().name, micro))
        take(turns, micro)

    def failing(model: Any, piece: Any) -> torch.Tensor:
        nonlocal calls
        while len(begun) < 3:  # who has the turn waits for the others to have begun
            pause.wait(0.01)
        loss = model_loss(model, piece)
        calls += 1
        if calls == 2:
            raise ReusedRequestError("on purpose")
        return loss

    with monkeypatch.context() as patched:
        patched.setattr(Turns, "take", noted)
        with pytest.raises(ReusedRequestError, match="on purpose"):
            accumulate(split, cut_batch(batch(0), 6), 3, failing)
    assert len({name for name, _ in begun}) == 3, "not in threads of their own"
    assert not [t.name for t in threading.enumerate() if t.name.startswith("micro-batch")]
    split.zero_grad()
    accumulate(split, cut_batch(batch(0), 3), 3)
    again = gradients(split)
    split.zero_grad()
    accumulate(split, cut_batch(batch(0), 3), 1)
    assert largest_difference(gradients(split), again) == 0
    split.remote_trunk.close()


def test_what_cannot_be_trained_is_refused() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="no labelled token"):
        accumulate(None, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
    with pytest.raises(InvalidInputError, match="needs labels"):
        accumulate(None, [{"input_ids": ids}])
    with pytest.raises(InvalidInputError, match="is not split"):
        accumulate(tiny_model("gpt2"), [{"input_ids": ids, "labels": ids}])
    with pytest.raises(InvalidInputError, match="in_flight 0"):
        accumulate(None, [{"input_ids": ids, "labels": ids}], 0)


def test_every_stage_is_passed_in_order() -> None:
    """Micro-batch 1 is ready first, and still waits until 0 has passed the stage."""
    turns = Turns(2, in_flight=2, seed=0)
    turns.take(0)
    turns.give(0)
    turns.take(1)
    turns.give(1)
    order: list[int] = []

    def second() -> None:
        turns.take(1)
        order.append(1)
        turns.give(1, finished=True)

    thread = threading.Thread(target=second)
    thread.start()
    pause = threading.Event()
    while 1 not in turns._wanting:
        pause.wait(0.01)
    turns.take(0)
    order.append(0)
    turns.give(0, finished=True)
    thread.join(PATIENCE_S)
    assert order == [0, 1]


def test_cutting_keeps_every_row() -> None:
    pieces = cut_batch({"input_ids": torch.arange(5)[:, None]}, 3)
    assert [len(p["input_ids"]) for p in pieces] == [2, 2, 1]
    assert torch.equal(torch.cat([p["input_ids"] for p in pieces]), torch.arange(5)[:, None])
    assert len(cut_batch({"input_ids": torch.arange(2)[:, None]}, 3)) == 2
