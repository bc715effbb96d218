"""``trunkline export``: one adapter out of whatever was left, and the model it is merged into."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from client_service import PEFTSplitLearningTrainer, SplitModelForCausalLM, TrainingClient
from client_service.adapter_source import find_adapter
from client_service.export import MERGE_TOLERANCE, export
from client_service.whole import whole_twin
from shared.bundled import model_dir
from shared.errors import AdapterError, CheckpointError, InvalidInputError
from shared.models import GPT2BottomModel, GPT2TopModel
from tests.conftest import Daemon
from tests.models import save_tiny_model, tiny_model

IDS = torch.randint(0, 1536, (2, 12), generator=torch.Generator().manual_seed(3))
TARGETS = ["c_attn", "c_proj"]


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "target_modules": TARGETS, "fan_in_fan_out": True}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "head": lambda: lora(modules_to_save=["lm_head"]),
    "patterns": lambda: lora(layers_to_transform=[0, 7, 11], rank_pattern={"h.7.attn.c_attn": 2}),
    "adalora": lambda: AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        total_step=10,
        target_modules=TARGETS,
        fan_in_fan_out=True,
    ),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["c_attn"],
        feedforward_modules=[],
        fan_in_fan_out=True,
    ),
}
UNMERGEABLE: dict[str, Callable[[], PeftConfig]] = {
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p_tuning": lambda: PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def bundled() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


def with_export(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(bundled(), folder))


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def save_adapter(folder: Path, config: PeftConfig) -> torch.Tensor:
    """Writes an adapter by plain PEFT; returns what the model gives with it."""
    torch.manual_seed(1)
    model = get_peft_model(bundled(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return with_export(folder)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied")
@pytest.mark.parametrize("method", CONFIGS)
def test_a_plain_adapter_is_exported_and_merged(method: str, tmp_path: Path) -> None:
    expected = save_adapter(tmp_path / "adapter", CONFIGS[method]())
    assert largest(expected, logits(bundled())) > 1e-3
    done = export(tmp_path / "adapter", tmp_path / "out", merge=True)
    assert done.kind == "adapter" and done.base_model == str(model_dir())
    assert (done.max_abs_reread_diff, done.max_abs_peft_logit_diff) == (0, 0)
    assert done.max_abs_merged_logit_diff is not None
    assert done.max_abs_merged_logit_diff <= MERGE_TOLERANCE
    ours, theirs = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in ("out", "adapter")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(with_export(tmp_path / "out"), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float32)
    assert largest(logits(merged), expected) <= MERGE_TOLERANCE
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/merged")
    assert tokenizer.decode(tokenizer("ward round")["input_ids"]) == "ward round"
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("adapter", "out")] == []


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_virtual_tokens_are_exported_but_never_merged(method: str, tmp_path: Path) -> None:
    expected = save_adapter(tmp_path / "adapter", UNMERGEABLE[method]())
    with pytest.raises(AdapterError, match="cannot be merged: it puts virtual tokens"):
        export(tmp_path / "adapter", tmp_path / "out", merge=True)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert export(tmp_path / "adapter", tmp_path / "out").max_abs_peft_logit_diff == 0
    assert torch.equal(with_export(tmp_path / "out"), expected)


def train_a_little(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_split_models_adapter_gives_the_split_models_logits(
    bundled_trunk: Daemon, tmp_path: Path
) -> None:
    split = SplitModelForCausalLM.from_pretrained(
        model_dir(), bundled_trunk.address, peft_config=lora()
    )
    whole = whole_twin(model_dir(), split)
    for model in (split, whole):
        train_a_little(model.train())
    expected = logits(split)
    assert torch.equal(expected, logits(whole))
    split.save_pretrained(tmp_path / "run/adapter")
    split.remote_trunk.close()
    done = export(tmp_path / "run", tmp_path / "out", merge=True)
    assert (done.kind, done.source) == ("training run", str(tmp_path / "run/adapter"))
    assert torch.equal(with_export(tmp_path / "out"), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged", dtype=torch.float32)
    assert largest(logits(merged), expected) <= 1e-4


def test_a_trainers_output_gives_its_newest_checkpoint(
    bundled_trunk: Daemon, tmp_path: Path
) -> None:
    split = SplitModelForCausalLM.from_pretrained(
        model_dir(), bundled_trunk.address, peft_config=lora()
    )
    settings = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=11,
        save_steps=9,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = Trainer(
        split,
        settings,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_dir()),
    )
    trainer.train()
    expected = logits(split)
    split.remote_trunk.close()
    done = export(tmp_path / "trainer", tmp_path / "out")
    assert (done.kind, done.source) == ("trainer output", str(tmp_path / "trainer/checkpoint-11"))
    assert torch.equal(with_export(tmp_path / "out"), expected)
    older = export(tmp_path / "trainer/checkpoint-9", tmp_path / "older", merge=True)
    assert older.kind == "trainer checkpoint"
    assert largest(with_export(tmp_path / "older"), expected) > 1e-4
    assert not (tmp_path / "older/optimizer.pt").exists()


@pytest.fixture(params=["lora", "all-linear", "frozen trunk", "ia3"])
def hand_written(
    request: pytest.FixtureRequest, bundled_trunk: Daemon, tmp_path: Path
) -> Iterator[tuple[Path, torch.Tensor]]:
    """What the trainer saved, and what its three parts give."""
    config: PeftConfig = {
        "all-linear": lambda: lora(target_modules="all-linear"),
        "ia3": CONFIGS["ia3"],
    }.get(request.param, lora)()
    trunk_config = None if request.param == "frozen trunk" else config
    with TrainingClient(bundled_trunk.address, trunk_config) as client:
        trainer = PEFTSplitLearningTrainer(
            GPT2BottomModel.from_pretrained(str(model_dir()), end_layer=2),
            GPT2TopModel.from_pretrained(str(model_dir()), start_layer=10),
            client,
            config,
            learning_rate=1e-2,
        )
        for _ in range(3):
            trainer.train_step(IDS, IDS)
        trainer.save_lora_weights(tmp_path / "parts")
        with torch.no_grad():
            hidden = trainer.bottom_peft.eval()(input_ids=IDS).last_hidden_state
            hidden = client.compute(hidden)
            yield tmp_path / "parts", trainer.top_peft.eval()(inputs_embeds=hidden).logits


def test_three_parts_become_one_adapter(
    hand_written: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    parts, expected = hand_written
    done = export(parts, tmp_path / "out", merge=True, model=str(model_dir()))
    assert done.kind == "parts"
    assert torch.equal(with_export(tmp_path / "out"), expected)
    assert largest(with_export(tmp_path / "out"), logits(bundled())) > 1e-3
    # Without the model nothing can be loaded, and the adapter is the same.
    alone = export(parts, tmp_path / "alone")
    assert alone.max_abs_peft_logit_diff is None and alone.base_model == ""
    assert torch.equal(with_export(tmp_path / "alone"), with_export(tmp_path / "out"))
    with pytest.raises(AdapterError, match="--model"):
        export(parts, tmp_path / "merged", merge=True)


def test_a_prefix_has_no_parts(tmp_path: Path) -> None:
    for part in ("bottom", "top"):
        save_adapter(tmp_path / f"parts/{part}_lora", UNMERGEABLE["prefix"]())
    with pytest.raises(AdapterError, match="PREFIX_TUNING is one tensor for the whole model"):
        find_adapter(tmp_path / "parts")


def test_parts_with_local_block_numbers_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "parts/bottom_lora", lora(layers_to_transform=[0, 1]))
    shutil.copytree(tmp_path / "parts/bottom_lora", tmp_path / "parts/top_lora")
    with pytest.raises(AdapterError, match="bottom_lora/ has block 1 and top_lora/ block 0"):
        find_adapter(tmp_path / "parts")


def test_an_adapter_of_another_model_leaves_nothing(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", lora())
    save_tiny_model("llama", tmp_path / "llama")
    save_tiny_model("gpt2", tmp_path / "small")
    deeper = tiny_model("gpt2", n_layer=14, n_embd=128, n_positions=256, vocab_size=1536)
    deeper.save_pretrained(tmp_path / "deeper")
    before = sorted(tmp_path.iterdir())
    for model in ("llama", "small", "deeper"):
        with pytest.raises(AdapterError, match=r"cannot load it|not in both"):
            export(tmp_path / "adapter", tmp_path / "out", merge=True, model=str(tmp_path / model))
        assert sorted(tmp_path.iterdir()) == before


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_model_that_is_gone_is_only_needed_to_merge(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", lora())
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    assert export(tmp_path / "adapter", tmp_path / "out").max_abs_peft_logit_diff is None
    with pytest.raises(CheckpointError, match="no such model folder"):
        export(tmp_path / "adapter", tmp_path / "other", merge=True)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", lora())
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path / "adapter", pickled)
    (pickled / weights.name).unlink()
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "adapter", damaged)
    (damaged / weights.name).write_bytes(weights.read_bytes()[:1000])
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "adapter", broken)
    state = load_file(weights)
    first = next(iter(state))
    save_file(state | {first: state[first] * float("nan")}, broken / weights.name)
    refused: list[tuple[Path, Path, str]] = [
        (pickled, tmp_path / "out", "adapter_model.bin"),
        (damaged, tmp_path / "out", "not a readable adapter"),
        (broken, tmp_path / "out", "NaN or Inf"),
        (tmp_path / "nowhere", tmp_path / "out", "no such folder"),
        (tmp_path / "empty", tmp_path / "out", "accepted: an adapter folder"),
        (tmp_path / "adapter", tmp_path / "full", "not an empty folder"),
        (tmp_path / "adapter", tmp_path / "full/note.txt", "not an empty folder"),
    ]
    for checkpoint, out, said in refused:
        with pytest.raises(InvalidInputError, match=said):
            export(checkpoint, out)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "full/note.txt").read_text() == "mine"
    assert export(tmp_path / "adapter", tmp_path / "empty").tensors == len(state)
