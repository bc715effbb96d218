"""``transformers.Trainer`` and ``trl``'s trainers as they are, on a split model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
from transformers.optimization import Adafactor

from client_service import SplitModelForCausalLM
from client_service.data import read_texts
from client_service.whole import largest_difference, load_whole, trained_weights, whole_twin
from shared.bundled import model_dir, private_train_file
from shared.errors import AdapterError, OptimizerError
from shared.models import family_of
from tests.conftest import Daemon
from tests.models import save_tiny_model

pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    # trl sets it for its users, transformers renamed it.
    pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing\w*` is deprecated:FutureWarning"),
    # Plain PEFT, of an adapter that has nothing for the blocks of a frozen trunk.
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

slow = partial(pytest.param, marks=pytest.mark.slow)

VOCAB = 1536  # of the bundled tokenizer

STEPS, MIDDLE, CLIP = 6, 3, 0.05
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": CLIP,
    "weight_decay": 0.1,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "eval_strategy": "steps",
}
SETTINGS |= dict(eval_steps=MIDDLE, save_steps=MIDDLE, per_device_eval_batch_size=2)
SETTINGS |= dict(logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)


def lora(family: str = "gpt2", **changes: Any) -> LoraConfig:
    targets = list(family_of(family).linear_layers)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def notes() -> list[str]:
    return read_texts(private_train_file())[0].splitlines()[:48]


def random_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(random_ids()).logits
    return found


@dataclass
class Place:
    """A tiny model of four blocks, and a daemon with the middle two."""

    folder: Path
    address: str
    opened: list[Any] = field(default_factory=list)

    def open(self, seed: int = 0, folder: Path | None = None, **terms: Any) -> Any:
        model = SplitModelForCausalLM.from_pretrained(
            folder or self.folder, self.address, seed=seed, **terms
        )
        self.opened.append(model)
        return model

    def whole(self) -> Any:
        return load_whole(self.folder)


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
    trunkd: Callable[..., Daemon], folders: dict[str, Path]
) -> Iterator[Callable[[str], Place]]:
    """Where to open models of a family; their sessions end with the test."""
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
    history: list[dict[str, float]]

    def of(self, key: str) -> list[float]:
        return [entry[key] for entry in self.history if key in entry]

    def difference(self, other: Run) -> float:
        """Largest of any step's loss, gradient norm and evaluation loss."""
        pairs = [
            pair
            for key in ("loss", "grad_norm", "eval_loss")
            for pair in zip(self.of(key), other.of(key), strict=True)
        ]
        assert len(pairs) == 2 * STEPS + STEPS // MIDDLE
        return max(abs(ours - theirs) for ours, theirs in pairs)


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


@pytest.mark.parametrize(
    ("family", "fit", "settings"),
    [
        ("gpt2", with_trainer, {"optim": "adamw_torch"}),
        slow(
            "llama", with_trainer, {"optim": "adamw_torch_fused", "activation_checkpointing": True}
        ),
        ("gpt2", with_trainer, {"optim": "adafactor"}),
        ("gpt2", with_sft, {"activation_checkpointing": False}),
        ("gpt2", with_sft, {"columns": prompts, "optim": "adafactor"}),
        ("gpt2", with_sft, {"packing": True, "activation_checkpointing": True}),
        slow("llama", with_sft, {"packing": True, "activation_checkpointing": False}),
        slow("gpt2", with_sft, {"packing": True, "packing_strategy": "wrapped"}),
    ],
)
def test_a_trainer_trains_and_resumes_as_on_the_whole_model(
    family: str, fit: Fit, settings: dict[str, Any], places: Callable[[str], Place], tmp_path: Path
) -> None:
    place, config = places(family), lora(family)
    split = place.open(peft_config=config)
    whole = whole_twin(place.folder, split)
    ours = fit(split, tmp_path / "split", **settings)
    theirs = fit(whole, tmp_path / "whole", **settings)
    assert min(ours.of("grad_norm")) > CLIP
    assert ours.difference(theirs) <= 1e-5
    assert largest_difference(trained_weights(split), trained_weights(whole)) <= 1e-4

    # Another session, which starts from other weights, goes on from the middle.
    again = place.open(peft_config=config, seed=5)
    middle = tmp_path / "split" / f"checkpoint-{MIDDLE}"
    resumed = fit(again, tmp_path / "again", middle, **settings)
    assert resumed.difference(ours) == 0.0
    assert resumed.difference(theirs) <= 1e-5
    assert largest_difference(trained_weights(again), trained_weights(split)) == 0.0


def test_a_resumed_run_draws_the_same_dropout_on_both_sides(place: Place, tmp_path: Path) -> None:
    terms = {"peft_config": lora(lora_dropout=0.1), "dropout": 0.1}
    split, again, other = (place.open(**terms) for _ in range(3))
    ours = with_trainer(split, tmp_path / "split")
    middle = tmp_path / "split" / f"checkpoint-{MIDDLE}"
    resumed = with_trainer(again, tmp_path / "again", middle)
    assert resumed.difference(ours) == 0.0
    assert with_trainer(other, tmp_path / "other", seed=1).difference(ours) > 1e-4


def test_the_best_checkpoint_is_loaded_and_is_a_standard_adapter(
    place: Place, tmp_path: Path
) -> None:
    split = place.open(peft_config=lora())
    # The larger loss is called the better one, so that the best is not the last.
    settings = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    with_trainer(split, tmp_path, load_best_model_at_end=True, **settings)
    best, last = (
        logits(PeftModel.from_pretrained(place.whole(), tmp_path / f"checkpoint-{step}"))
        for step in (MIDDLE, STEPS)
    )
    assert float((logits(split) - best).abs().max()) <= 1e-5
    assert float((last - best).abs().max()) > 1e-2
    with split.disable_adapter():
        assert float((logits(split) - logits(place.whole())).abs().max()) <= 1e-5


def test_dpo_takes_the_base_model_as_its_reference(place: Place, tmp_path: Path) -> None:
    def fit(model: Any, out: str) -> list[float]:
        settings = {k: v for k, v in SETTINGS.items() if not k.startswith("eval")}
        texts = notes()[:16]
        pairs = {"prompt": (0, 30), "chosen": (30, 80), "rejected": (80, 120)}
        columns = {name: [t[slice(*cut)] for t in texts] for name, cut in pairs.items()}
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(output_dir=str(tmp_path / out), bf16=False, **settings),
            train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=AutoTokenizer.from_pretrained(model_dir()),
        )
        trainer.train()
        logged = [e for e in trainer.state.log_history if "grad_norm" in e]
        return [entry[key] for entry in logged for key in ("loss", "grad_norm")]

    split = place.open(peft_config=lora())
    whole = whole_twin(place.folder, split)
    ours, theirs = fit(split, "split"), fit(whole, "whole")
    assert len(ours) == 2 * STEPS and ours[-2] < ours[0]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@pytest.mark.parametrize("trunk_config", [None, lora()])
def test_ends_that_are_trained_themselves_are_saved_and_resumed(
    trunk_config: LoraConfig | None, place: Place, tmp_path: Path
) -> None:
    split, again = (place.open(seed, trunk_peft_config=trunk_config) for seed in (0, 5))
    whole = None if trunk_config else whole_twin(place.folder, split)
    ours = with_trainer(split, tmp_path / "split")
    middle = tmp_path / "split" / f"checkpoint-{MIDDLE}"
    assert with_trainer(again, tmp_path / "again", middle).difference(ours) == 0.0
    assert torch.equal(logits(again), logits(split))
    if whole is not None:
        assert with_trainer(whole, tmp_path / "whole").difference(ours) <= 1e-5
        saved = place.open(folder=tmp_path / "split" / f"checkpoint-{STEPS}")
        assert torch.equal(logits(saved), logits(split))


def test_a_trainer_may_wrap_the_ends_itself_beside_a_frozen_trunk(
    place: Place, tmp_path: Path
) -> None:
    def fit(out: str, resume: Path | None = None) -> Run:
        split = place.open(trunk_peft_config=None)
        return with_sft(split, tmp_path / out, resume, peft_config=lora(fan_in_fan_out=True))

    ours = fit("split")
    resumed = fit("again", tmp_path / "split" / f"checkpoint-{MIDDLE}")
    assert resumed.difference(ours) == 0.0
    adapter = tmp_path / "split" / f"checkpoint-{STEPS}"
    whole = PeftModel.from_pretrained(place.whole(), adapter)
    assert float((logits(ours.model) - logits(whole)).abs().max()) <= 1e-5


def test_a_trainer_that_would_save_half_an_adapter_is_refused(place: Place, tmp_path: Path) -> None:
    split = place.open(trunk_peft_config=lora())
    with pytest.raises(AdapterError, match="none to the trainer"):
        with_sft(split, tmp_path, peft_config=lora(fan_in_fan_out=True))
    assert split.remote_trunk.next_step == 1


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {}),
        (torch.optim.Adagrad, {}),
        (torch.optim.NAdam, {}),
        (Adafactor, {"relative_step": False, "scale_parameter": False, "beta1": 0.5}),
    ],
)
def test_an_optimizers_state_is_that_of_both_sides(
    optimizer_class: Any, settings: dict[str, Any], place: Place, tmp_path: Path
) -> None:
    def fresh(seed: int) -> tuple[Any, torch.optim.Optimizer]:
        model = place.open(seed, peft_config=lora()).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        return model, optimizer_class(trainable, lr=1e-2, **settings)

    def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 3) -> list[float]:
        found = []
        for _ in range(count):
            loss = model(random_ids(), labels=random_ids(), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    model, optimizer = fresh(0)
    steps(model, optimizer)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = steps(model, optimizer)

    def saved() -> dict[str, Any]:
        # Anew each time: torch loads the tensors themselves, which the next step then moves.
        return dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))

    # A new session, and the same one set back; a state saved before its first step is kept too.
    for going_on in (fresh(5), (model, optimizer)):
        going_on[0].load_adapter(tmp_path / "adapter", "default", is_trainable=True)
        going_on[1].load_state_dict(saved())
        going_on[1].load_state_dict(going_on[1].state_dict())
        assert steps(*going_on) == expected

    model, optimizer = fresh(5)
    optimizer.load_state_dict(saved())
    with pytest.raises(OptimizerError, match="load the adapter"):
        steps(model, optimizer)


def test_two_optimizers_of_one_model_save_the_trunks_state_once(
    place: Place, tmp_path: Path
) -> None:
    def fresh(seed: int) -> tuple[Any, list[torch.optim.Optimizer]]:
        model = place.open(seed, peft_config=lora()).train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        return model, [torch.optim.AdamW(part, lr=1e-2) for part in (trainable[:4], trainable[4:])]

    def steps(model: Any, optimizers: list[torch.optim.Optimizer]) -> list[float]:
        found = []
        for _ in range(3):
            loss = model(random_ids(), labels=random_ids(), use_cache=False).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            found.append(float(loss.detach()))
        return found

    model, optimizers = fresh(0)
    steps(model, optimizers)
    model.save_pretrained(tmp_path)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    expected = steps(model, optimizers)
    again, others = fresh(5)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    for optimizer, state in zip(others, saved, strict=True):
        optimizer.load_state_dict(state)
    assert steps(again, others) == expected
