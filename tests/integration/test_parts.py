"""The parts by hand: chained against the whole model, split on disk, trained by the U-loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from client_service import PEFTSplitLearningTrainer, SplitModelForCausalLM, TrainingClient
from client_service.adapter_files import Weights
from client_service.peft_trainer import default_lora_config
from client_service.whole import gradients, largest_difference, load_whole, trained_weights
from shared.errors import CheckpointError
from shared.models import (
    FAMILIES,
    GPT2BottomModel,
    GPT2TopModel,
    GPT2TrunkModel,
    SplitRange,
    get_part_class,
    load_part,
    open_checkpoint,
)
from shared.models.digest import client_digest
from shared.models.dropout import set_dropout
from shared.models.split_layout import write_split_layout
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model, tiny_model

pytestmark = pytest.mark.numeric

IDS = torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def chained(bottom: Any, trunk: Any, top: Any) -> torch.Tensor:
    common: dict[str, Any] = {"attention_mask": MASK, "use_cache": False}
    hidden = bottom(IDS, **common).last_hidden_state
    hidden = trunk(inputs_embeds=hidden, **common).last_hidden_state
    logits: torch.Tensor = top(inputs_embeds=hidden, **common).logits
    return logits


@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("gpt2", "2:10"),
        ("llama", "1:2"),
        ("mistral", "1:5"),
        ("qwen2", "1:5"),
        ("qwen3", "2:4"),
        ("gemma", "2:4"),
        ("gemma2", "1:5"),
        ("phi", "1:5"),
        ("gpt_neox", "2:4"),
    ],
)
@pytest.mark.parametrize("layout", ["whole", "safetensors", "pt", "pt counted from zero"])
def test_three_parts_are_the_whole_model(
    family: str, split: str, layout: str, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    where = SplitRange.parse(split)
    source = folder
    if layout != "whole":
        source = tmp_path / "parts"
        for file in write_split_layout(folder, where, source).values():
            if layout != "safetensors":
                rewrite_as_pt(file, family, from_zero=layout.endswith("zero"))
    ranges: dict[str, dict[str, int]] = {
        "bottom": {"end_layer": where.start},
        "trunk": {"start_layer": where.start, "end_layer": where.end},
        "top": {"start_layer": where.end},
    }
    parts = [
        get_part_class(family, role).from_pretrained(source, **given)
        for role, given in ranges.items()
    ]
    with torch.no_grad():
        assert torch.equal(chained(*parts), whole(IDS, attention_mask=MASK).logits)
    assert client_digest(open_checkpoint(source), where) == client_digest(
        open_checkpoint(folder), where
    )


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_of_a_family_can_be_set(family: str) -> None:
    known = tiny_model(family).config.to_dict()
    model = tiny_model(family, **{name: 0.5 for name in DROPOUTS if name in known})

    def logits() -> torch.Tensor:
        found: torch.Tensor = model(IDS, attention_mask=MASK, use_cache=False).logits
        return found.detach()

    expected = logits()
    model.train()
    assert not torch.equal(logits(), expected)
    set_dropout(model, 0.0)
    assert torch.equal(logits(), expected)


def rewrite_as_pt(file: Path, family: str, from_zero: bool) -> None:
    """Turns a part's file into the guide's: ``.pt``, blocks perhaps counted from zero."""
    tensors = load_file(file)
    if from_zero:
        start = json.loads(file.with_name(f"{file.stem}_metadata.json").read_text())["start_layer"]
        layers = ".h." if family == "gpt2" else ".layers."
        tensors = {renumbered(name, layers, start): t for name, t in tensors.items()}
    torch.save(tensors, file.with_suffix(".pt"))
    file.unlink()


def renumbered(name: str, layers: str, start: int) -> str:
    if layers not in name:
        return name
    before, after = name.split(layers)
    number, rest = after.split(".", 1)
    return f"{before}{layers}{int(number) - start}.{rest}"


def test_a_pickled_object_is_not_loaded(tmp_path: Path) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    written = write_split_layout(folder, SplitRange(2, 10), tmp_path / "parts")
    file = written["trunk"]
    file.unlink()
    torch.save({"transformer.h.2.ln_1.weight": Path("x")}, file.with_suffix(".pt"))
    with pytest.raises(CheckpointError, match=r"trunk\.pt"):
        GPT2TrunkModel.from_pretrained(tmp_path / "parts")


def test_the_u_by_hand_trains_as_the_whole_model(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    config = default_lora_config()
    config.lora_dropout = 0.0
    client = TrainingClient(trunkd("--model", str(folder)).address, config, seed=4)
    bottom = GPT2BottomModel.from_pretrained(folder, end_layer=2)
    top = GPT2TopModel.from_pretrained(folder, start_layer=10)
    trainer = PEFTSplitLearningTrainer(bottom, top, client, config, learning_rate=1e-3)
    parts = (trainer.bottom_peft, client.model, trainer.top_peft)
    whole = get_peft_model(load_whole(folder), config).train()
    fresh = trained(*parts)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(fresh[name])
    optimizer = torch.optim.AdamW([p for p in whole.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(5):
        ours = trainer.train_step(IDS, IDS, MASK)["loss"]
        optimizer.zero_grad()
        loss = whole(input_ids=IDS, attention_mask=MASK, labels=IDS, use_cache=False).loss
        loss.backward()
        assert largest_difference(gradients_of(*parts), gradients(whole)) == 0
        optimizer.step()
        assert ours == float(loss.detach())
    assert largest_difference(trained(*parts), trained_weights(whole)) == 0
    trainer.save_lora_weights(tmp_path / "saved")
    at_save = trained(*parts)
    trainer.train_step(IDS, IDS)
    paths = [tmp_path / "saved" / f"{name}_lora" for name in ("bottom", "top", "trunk")]
    trainer.load_lora_weights(*paths)
    assert largest_difference(trained(*parts), at_save) == 0
    client.close()


def trained(*parts: Any) -> Weights:
    return {n: t for part in parts for n, t in trained_weights(part).items()}


def gradients_of(*parts: Any) -> Weights:
    return {n: t for part in parts for n, t in gradients(part).items()}


def test_a_mask_that_is_too_short_hides_the_rest_as_in_the_whole_model(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model("gpt2", tmp_path / "model")
    split = SplitModelForCausalLM.from_pretrained(folder, trunkd("--model", str(folder)).address)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    with split, torch.no_grad():
        ours, theirs = (m(IDS, attention_mask=MASK[:, :9]).logits for m in (split, whole))
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_a_trunk_by_itself_has_rotary_positions(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model("llama", tmp_path / "model")
    part = load_part(get_part_class("llama", "trunk"), folder, start_layer=1, end_layer=3)
    hidden_BTD, mask = torch.randn(2, 7, 64), torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    expected_BTD = part(inputs_embeds=hidden_BTD, attention_mask=mask).last_hidden_state
    with TrainingClient(trunkd("--model", str(folder), "--split", "1:3").address) as client:
        found_BTD = client.forward(hidden_BTD, attention_mask=mask)
        assert torch.equal(found_BTD, expected_BTD)
        given_BTD = client.backward(torch.ones_like(found_BTD))
    leaf_BTD = hidden_BTD.requires_grad_(True)
    output_BTD = part(inputs_embeds=leaf_BTD, attention_mask=mask).last_hidden_state
    (expected_BTD,) = torch.autograd.grad(output_BTD.sum(), leaf_BTD)
    assert torch.equal(given_BTD, expected_BTD)
