"""Every PEFT method on every part it can be on, against the unsplit PEFT model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from client_service import SplitModelForCausalLM, TrainingClient
from client_service.verify import VerifyPlan, verify
from client_service.whole import largest_difference, load_whole, trained_weights, whole_twin
from shared.errors import AdapterError
from shared.models import family_of
from tests.conftest import Daemon
from tests.integration.test_equivalence import assert_equal, lora, losses, padded_batches
from tests.models import save_tiny_model

pytestmark = [
    # PEFT says so of every position that generate() itself made.
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    # Of the case that saves a tied head, which both sides have alike.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # Of a matrix of which AdaLoRA keeps nothing.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor"),
    # PEFT takes AdaLoRA's rank pattern for one of LoRA when it loads its own file.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

Start = Callable[..., Daemon]
Folder = Callable[[str], Path]
Batches = Iterator[dict[str, torch.Tensor]]

STEPS = 10
RATES = {"ia3": 5e-2, "prefix": 5e-2, "prompt": 5e-2, "p-tuning": 2e-2}


def adalora(family: str) -> AdaLoraConfig:
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=6,
        target_r=3,
        total_step=STEPS,
        tinit=2,
        tfinal=3,
        deltaT=2,
        target_modules=list(family_of(family).linear_layers),
        fan_in_fan_out=family == "gpt2",
    )


def methods(family: str) -> dict[str, PeftConfig | None]:
    first = family_of(family).linear_layers[0]
    return {
        "lora": lora(family, layers_to_transform=[0, 2, 5, 11]),
        "patterns": lora(family, rank_pattern={first: 3}, alpha_pattern={first: 7}),
        "dora": lora(family, use_dora=True),
        "rslora": lora(family, use_rslora=True),
        "saved head": lora(family, modules_to_save=["lm_head"]),
        "all-linear": lora(family, target_modules="all-linear"),
        "adalora": adalora(family),
        "ia3": IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p-tuning": PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32
        ),
        "full": None,
    }


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One tiny model of each family, so that one daemon serves all its tests."""
    folders: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(family) / "model"
            folders[family] = save_tiny_model(family, folder, num_hidden_layers=12)
        return folders[family]

    return save


def repeated(batches: Batches, count: int = 2) -> Batches:
    """The same few batches over and over, so that training can lower the loss."""
    return itertools.cycle(list(itertools.islice(batches, count)))


def check(
    model_of: Folder,
    trunkd: Start,
    family: str,
    method: str,
    parts: str = "all",
    quantize: str = "",
) -> None:
    folder = model_of(family)
    flags = ["--quantize", quantize] if quantize else []
    daemon = trunkd("--model", str(folder), *flags)
    plan = VerifyPlan(steps=STEPS, grad_accum=1, lr=RATES.get(method, 5e-3), warmup_steps=1)
    config: Any = methods(family)[method]
    if quantize:
        config.fan_in_fan_out = False  # a Conv1D is torch's Linear, once it is quantised
    batches = repeated(padded_batches())
    found = verify(folder, daemon.address, config, batches, plan, parts=parts, quantize=quantize)
    assert_equal(found)
    assert found.final_loss < found.first_loss - 0.001


FAST = ("lora", "patterns", "dora", "adalora", "prefix", "p-tuning", "full")


@pytest.mark.parametrize(
    "method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in methods("gpt2")]
)
def test_a_method_on_all_parts(method: str, trunkd: Start, model_of: Folder) -> None:
    check(model_of, trunkd, "gpt2", method)


@pytest.mark.parametrize(
    "parts",
    ["trunk", *(pytest.param(p, marks=pytest.mark.slow) for p in ("bottom", "top", "ends"))],
)
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_a_method_on_some_parts(method: str, parts: str, trunkd: Start, model_of: Folder) -> None:
    check(model_of, trunkd, "gpt2", method, parts)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("adalora", marks=pytest.mark.slow),
        "prefix",
        pytest.param("p-tuning", marks=pytest.mark.slow),
        "full",
    ],
)
def test_a_method_with_rotary_positions(method: str, trunkd: Start, model_of: Folder) -> None:
    check(model_of, trunkd, "llama", method)


@pytest.mark.parametrize("quantize", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "lora"), pytest.param("llama", "adalora", marks=pytest.mark.slow)],
)
def test_quantised_base_weights(
    family: str, method: str, quantize: str, trunkd: Start, model_of: Folder
) -> None:
    pytest.importorskip("bitsandbytes")
    check(model_of, trunkd, family, method, quantize=quantize)


def test_adalora_allocates_the_ranks_of_the_whole_model(trunkd: Start, model_of: Folder) -> None:
    """The comparison above would hold of a run that prunes nothing; this one must prune."""
    folder = model_of("gpt2")
    split = SplitModelForCausalLM.from_pretrained(
        folder, trunkd("--model", str(folder)).address, peft_config=adalora("gpt2")
    )
    whole = whole_twin(folder, split)
    patterns = []
    for model in (split.train(), whole.train()):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step, batch in zip(range(1, STEPS + 1), repeated(padded_batches()), strict=False):
            model(**batch).loss.backward()
            optimizer.step()
            model.update_and_allocate(step)
            optimizer.zero_grad()
        patterns.append(model.peft_config["default"].rank_pattern)
    assert patterns[0] == patterns[1]
    assert largest_difference(trained_weights(split), trained_weights(whole)) == 0
    ranks = [sum(kept) for kept in patterns[0].values()]
    assert len(ranks) == 48 and sum(ranks) == 3 * 48 and len(set(ranks)) > 1


@pytest.mark.parametrize(
    ("method", "parts"),
    [("prefix", "trunk"), ("prefix", "bottom"), ("prompt", "trunk"), ("p-tuning", "top")],
)
def test_a_method_that_cannot_work_on_a_part_says_why(
    method: str, parts: str, trunkd: Start, model_of: Folder
) -> None:
    folder = model_of("gpt2")
    address = trunkd("--model", str(folder)).address
    with pytest.raises(AdapterError, match=r"no way to leave blocks out|before the first block"):
        SplitModelForCausalLM.from_pretrained(
            folder, address, peft_config=methods("gpt2")[method], peft_parts=parts
        )


@pytest.mark.parametrize(
    ("ends", "trunk", "why"),
    [
        (lora("gpt2"), IA3Config(task_type="CAUSAL_LM"), "trunk_peft_config differs in"),
        (lora("gpt2"), lora("gpt2", use_rslora=True), "differs in use_rslora"),
        (lora("gpt2", target_modules=["nowhere"]), "same", "No modules were targeted|not found"),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            None,
            "accepted is 'all'",
        ),
        (lora("gpt2"), lora("gpt2", r=1000), "256"),
    ],
)
def test_sides_that_make_no_adapter_are_refused_before_training(
    ends: PeftConfig, trunk: Any, why: str, trunkd: Start, model_of: Folder
) -> None:
    folder = model_of("gpt2")
    with pytest.raises(AdapterError, match=why):
        SplitModelForCausalLM.from_pretrained(
            folder,
            trunkd("--model", str(folder)).address,
            peft_config=ends,
            trunk_peft_config=trunk,
        )


def test_a_trunk_by_itself_takes_no_adalora(trunkd: Start) -> None:
    with pytest.raises(AdapterError, match="one budget of ranks among all parts"):
        TrainingClient(trunkd().address, adalora("gpt2"))


@pytest.mark.parametrize(
    "method", ["lora", "dora", "adalora", "ia3", "prefix", "prompt", "p-tuning"]
)
def test_a_whole_models_adapter_is_loaded_and_training_goes_on(
    method: str, trunkd: Start, model_of: Folder, tmp_path: Path
) -> None:
    """An adapter that plain PEFT trained goes on through the split, and generates the same."""
    folder = model_of("gpt2")
    config = methods("gpt2")[method]
    assert config is not None
    whole = get_peft_model(load_whole(folder), config)
    losses(whole, 3, rate=1e-2)
    whole.eval().save_pretrained(tmp_path / "adapter")
    split = SplitModelForCausalLM.from_pretrained(
        folder, trunkd("--model", str(folder)).address, adapter=tmp_path / "adapter"
    )
    prompt = config.is_prompt_learning  # which PEFT loads for inference alone
    whole = PeftModel.from_pretrained(
        load_whole(folder), tmp_path / "adapter", is_trainable=not prompt
    )
    if prompt:
        whole.prompt_encoder.requires_grad_(True)
    batch = next(padded_batches(5))
    batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(whole.eval()(**batch).logits, split(**batch).logits)
    # Beams through the caches, the trunk's prefix included; the odd row is padded on the left.
    left = {name: tensor[:1, 7:] for name, tensor in batch.items()}
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "pad_token_id": 0}
    assert torch.equal(whole.generate(**left, **options), split.generate(**left, **options))
    assert losses(split, 5, rate=1e-2) == losses(whole, 5, rate=1e-2)
    assert largest_difference(trained_weights(split), trained_weights(whole)) == 0
    split.remote_trunk.close()
