"""``transformers.Trainer`` and ``trl``'s trainers as they are, on a split model and the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from client_service import SplitModelForCausalLM
from client_service.data import read_texts
from client_service.dropout_key import SECRET_VARIABLE
from client_service.whole import largest_difference, load_whole, trained_weights, whole_twin
from shared.bundled import model_dir, private_train_file
from shared.models import family_of
from tests.conftest import Daemon
from tests.models import save_tiny_model

pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# trl sets it for its users, transformers renamed it.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`gradient_checkpointing\w*` is deprecated:FutureWarning"
)

slow = partial(pytest.param, marks=pytest.mark.slow)

VOCAB = 1536  # of the bundled tokenizer

STEPS, MIDDLE, CLIP = 6, 3, 0.05
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": CLIP,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
SETTINGS: dict[str, Any] = SHORT | {
    "max_steps": STEPS,
    "weight_decay": 0.1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "eval_strategy": "steps",
    "eval_steps": MIDDLE,
    "save_steps": MIDDLE,
    "per_device_eval_batch_size": 2,
}


def lora(family: str = "gpt2", **changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(family_of(family).linear_layers),
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def notes() -> list[str]:
    return read_texts(private_train_file())[0].splitlines()[:48]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model.eval()(ids).logits
    return found


@dataclass
class Place:
    """A tiny model of four blocks, and a daemon with the middle two."""

    folder: Path
    address: str
    opened: list[Any] = field(default_factory=list)

    def open(self, config: LoraConfig | None = None, seed: int = 0, **terms: Any) -> Any:
        terms = {"model": self.folder, "trunk": self.address, "peft_config": config} | terms
        model = SplitModelForCausalLM.from_pretrained(seed=seed, **terms)
        self.opened.append(model)
        return model

    def whole(self, config: LoraConfig | None = None, seed: int = 0) -> Any:
        model = load_whole(self.folder)
        torch.manual_seed(seed)
        return model if config is None else get_peft_model(model, copy.deepcopy(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    blocks = {"gpt2": {"n_layer": 4}, "llama": {"num_hidden_layers": 4}}
    root = tmp_path_factory.mktemp("models")
    return {
        family: save_tiny_model(family, root / family, vocab_size=VOCAB, **changes)
        for family, changes in blocks.items()
    }


@pytest.fixture
def places(
    trunkd: Callable[..., Daemon],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Place]]:
    """Where to open models of a family; their sessions end with the test."""
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "dropout_secret"))
    given: list[Place] = []

    def place(family: str) -> Place:
        folder = folders[family]
        daemon = trunkd("--model", str(folder), "--split", "1:3")
        given.append(Place(folder, daemon.address))
        return given[-1]

    yield place
    for model in (model for place in given for model in place.opened):
        model.remote_trunk.close()


@pytest.fixture
def place(places: Callable[[str], Place]) -> Place:
    return places("gpt2")


@dataclass
class Run:
    """What a trainer saw and made."""

    model: Any
    history: list[dict[str, Any]]

    def of(self, *keys: str) -> list[list[float]]:
        return [[entry[key] for entry in self.history if key in entry] for key in keys]

    @property
    def facts(self) -> list[list[float]]:
        """Every step's loss and gradient norm, and the evaluations."""
        found = self.of("loss", "grad_norm", "eval_loss")
        assert [len(each) for each in found] == [STEPS, STEPS, STEPS // MIDDLE]
        return found


Fit = Callable[..., Run]


def with_trainer(model: Any, out: Path, resume: Path | None = None, **settings: Any) -> Run:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    ids = [tokenizer(text[:120])["input_ids"] for text in notes()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(out), **SETTINGS | settings),
        train_dataset=datasets.Dataset.from_dict({"input_ids": ids[:40]}),
        eval_dataset=datasets.Dataset.from_dict({"input_ids": ids[40:]}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return Run(trainer.model, trainer.state.log_history)


def with_sft(
    model: Any,
    out: Path,
    resume: Path | None = None,
    columns: Callable[[list[str]], dict[str, list[str]]] = lambda texts: {"text": texts},
    peft_config: LoraConfig | None = None,
    **settings: Any,
) -> Run:
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(out), **SETTINGS | {"bf16": False, "max_length": 64} | settings
        ),
        train_dataset=datasets.Dataset.from_dict(columns(notes()[:40])),
        eval_dataset=datasets.Dataset.from_dict(columns(notes()[40:])),
        processing_class=AutoTokenizer.from_pretrained(model_dir()),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return Run(trainer.model, trainer.state.log_history)


def prompts(texts: list[str]) -> dict[str, list[str]]:
    cut = [text.partition(".") for text in texts]
    return {"prompt": [f"{a}." for a, _, _ in cut], "completion": [c[:120] for _, _, c in cut]}


def assert_same(ours: Run, theirs: Run) -> None:
    assert ours.facts == theirs.facts
    weights = [trained_weights(run.model) for run in (ours, theirs)]
    assert weights[0] and largest_difference(*weights) == 0


@pytest.mark.parametrize(
    ("family", "fit", "settings"),
    [
        # Which kind of model has its labels shifted, Trainer decides by the class's name.
        ("gpt2", with_trainer, {"label_smoothing_factor": 0.1}),
        slow(
            "llama", with_trainer, {"optim": "adamw_torch_fused", "activation_checkpointing": True}
        ),
        ("gpt2", with_trainer, {"optim": "adafactor"}),
        ("gpt2", with_sft, {"activation_checkpointing": False}),
        slow("gpt2", with_sft, {"columns": prompts, "optim": "adafactor"}),
        ("gpt2", with_sft, {"packing": True, "activation_checkpointing": True}),
        slow("llama", with_sft, {"packing": True, "activation_checkpointing": False}),
        slow("gpt2", with_sft, {"packing": True, "packing_strategy": "wrapped"}),
    ],
)
def test_a_trainer_trains_and_resumes_as_on_the_whole_model(
    family: str, fit: Fit, settings: dict[str, Any], places: Callable[[str], Place], tmp_path: Path
) -> None:
    place, config = places(family), lora(family)
    ours = fit(place.open(config), tmp_path / "ours", **settings)
    theirs = fit(place.whole(config), tmp_path / "theirs", **settings)
    assert min(ours.of("grad_norm")[0]) > CLIP
    assert_same(ours, theirs)
    middle = f"checkpoint-{MIDDLE}"
    file = f"{middle}/adapter_model.safetensors"
    assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()

    # Another session, which starts from other weights, goes on from the middle.
    again = place.open(config, seed=5)
    resumed = fit(again, tmp_path / "again", tmp_path / "ours" / middle, **settings)
    assert_same(resumed, theirs)


def test_a_resumed_run_draws_the_same_dropout_on_both_sides(place: Place, tmp_path: Path) -> None:
    def fit(out: str, resume: Path | None = None, **settings: Any) -> Run:
        split = place.open(lora(lora_dropout=0.1), dropout=0.1)
        return with_trainer(split, tmp_path / out, resume, **settings)

    ours = fit("ours")
    assert_same(fit("again", tmp_path / "ours" / f"checkpoint-{MIDDLE}"), ours)
    assert fit("other", seed=1).facts != ours.facts


def test_the_best_checkpoint_is_loaded(place: Place, tmp_path: Path) -> None:
    # The larger loss is called the better one, so that the best is not the last.
    best = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    split, whole = place.open(lora()), place.whole(lora())
    for name, model in (("ours", split), ("theirs", whole)):
        with_trainer(model, tmp_path / name, load_best_model_at_end=True, **best)
    assert torch.equal(logits(split), logits(whole))
    saved = [
        logits(PeftModel.from_pretrained(place.whole(), tmp_path / "ours" / f"checkpoint-{step}"))
        for step in (MIDDLE, STEPS)
    ]
    assert torch.equal(logits(split), saved[0]) and not torch.equal(*saved)
    with split.disable_adapter():
        assert torch.equal(logits(split), logits(place.whole()))


def test_ends_that_are_trained_themselves_are_saved_and_resumed(
    place: Place, tmp_path: Path
) -> None:
    split, again = (place.open(seed=seed) for seed in (0, 5))
    whole = whole_twin(place.folder, split)
    ours = with_trainer(split, tmp_path / "ours")
    assert_same(ours, with_trainer(whole, tmp_path / "theirs"))
    middle = tmp_path / "ours" / f"checkpoint-{MIDDLE}"
    assert_same(with_trainer(again, tmp_path / "again", middle), ours)
    saved = place.open(model=tmp_path / "ours" / f"checkpoint-{STEPS}")
    assert torch.equal(logits(saved), logits(whole))


def test_a_trainer_that_is_given_the_adapter_puts_it_on_all_blocks(
    place: Place, tmp_path: Path
) -> None:
    models = {"ours": place.open(), "theirs": place.whole()}
    ours, theirs = (
        with_sft(model, tmp_path / name, peft_config=lora()) for name, model in models.items()
    )
    assert any(".h.2." in name for name in trained_weights(ours.model))
    assert_same(ours, theirs)


def dpo(model: Any, out: Path) -> Any:
    texts = notes()[:16]
    pairs = {"prompt": (0, 30), "chosen": (30, 80), "rejected": (80, 120)}
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(out), bf16=False, max_steps=3, **SHORT),
        train_dataset=datasets.Dataset.from_dict(
            {name: [t[slice(*cut)] for t in texts] for name, cut in pairs.items()}
        ),
        processing_class=AutoTokenizer.from_pretrained(model_dir()),
    )


def kto(model: Any, out: Path) -> Any:
    rows = {key: column[:16] for key, column in prompts(notes()).items()}
    return trl.KTOTrainer(
        model=model,
        args=trl.KTOConfig(output_dir=str(out), bf16=False, max_steps=3, **SHORT),
        train_dataset=datasets.Dataset.from_dict(rows | {"label": [True, False] * 8}),
        processing_class=AutoTokenizer.from_pretrained(model_dir()),
        peft_config=lora(),
    )


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def grpo(model: Any, out: Path) -> Any:
    settings = SHORT | {"learning_rate": 1e-2, "max_grad_norm": 0.0}
    return trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(
            output_dir=str(out),
            bf16=False,
            max_steps=2,
            beta=0.1,  # so that there is a reference
            num_generations=4,
            num_iterations=2,
            max_completion_length=8,
            temperature=1.0,
            **settings,
        ),
        reward_funcs=vowels,
        train_dataset=datasets.Dataset.from_dict({"prompt": [t[:30] for t in notes()[:16]]}),
        processing_class=AutoTokenizer.from_pretrained(model_dir()),
        peft_config=lora(),
    )


def test_dpo_goes_on_with_what_sft_has_trained(place: Place, tmp_path: Path) -> None:
    """Its reference is a copy of the adapter, which trl adds under another name."""
    runs = []
    for name, model in (("ours", place.open(lora())), ("theirs", place.whole(lora()))):
        tuned = with_sft(model, tmp_path / name / "sft", max_steps=2, eval_strategy="no").model
        trainer = dpo(tuned, tmp_path / name / "dpo")
        assert list(trainer.model.peft_config) == ["default", "ref"]
        trainer.train()
        runs.append(Run(trainer.model, trainer.state.log_history))
    check_preferences(*runs)


@pytest.mark.parametrize("made", [kto, grpo])
def test_the_model_without_its_adapter_is_the_reference(
    made: Callable[[Any, Path], Any], place: Place, tmp_path: Path
) -> None:
    runs = []
    for name, model in (("ours", place.open()), ("theirs", place.whole())):
        torch.manual_seed(0)
        trainer = made(model, tmp_path / name)
        assert list(trainer.model.peft_config) == ["default"]
        trainer.train()
        runs.append(Run(trainer.model, trainer.state.log_history))
    check_preferences(*runs)


def check_preferences(ours: Run, theirs: Run) -> None:
    """All that the trainers log, but the clock, and the weights."""
    assert len(ours.history) == len(theirs.history) > 2
    for entry, other in zip(ours.history, theirs.history, strict=True):
        clock = {key for key in entry if "time" in key or "per_second" in key}
        assert all(entry[key] == other[key] for key in entry.keys() - clock), (entry, other)
    norms = ours.of("grad_norm")[0]
    assert len(norms) > 1 and max(norms) > 0
    weights = [trained_weights(run.model) for run in (ours, theirs)]
    assert largest_difference(*weights) == 0
    assert any(".h.2." in n and "lora_B" in n and bool(t.any()) for n, t in weights[0].items())
