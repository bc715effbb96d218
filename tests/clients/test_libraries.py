"""Other people's libraries, called as their documentation does, on the split and the whole model.

In an environment of their own: ``make test-clients``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    Saliency,
    TextTokenInput,
)
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from client_service import SplitModelForCausalLM
from shared.bundled import model_dir, private_heldout_file
from tests.conftest import Daemon

pytestmark = pytest.mark.filterwarnings("ignore")

Pair = tuple[Any, Any]
PROMPT = "Bed 4. 67-year-old man admitted with chest pain."
TEXTS = [line for line in Path(private_heldout_file()).read_text().splitlines() if len(line) > 80][
    :6
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def pair(trunkd: Callable[..., Daemon]) -> Iterator[Pair]:
    """The split and the whole bundled model with one adapter that does something."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["c_attn", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    torch.manual_seed(1)
    whole = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir()), copy.copy(config))
    split = SplitModelForCausalLM.from_pretrained(
        model_dir(), trunkd().address, peft_config=config, seed=1
    )
    yield split.eval(), whole.eval()
    split.close()


def same(ours: Any, theirs: Any) -> None:
    """The same numbers and words, in whatever they are kept."""
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.float().abs().max())) if theirs.numel() else 1.0
        assert torch.allclose(ours.float(), theirs.float(), rtol=0, atol=1e-5 * scale)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(ours, float):
        assert abs(ours - theirs) <= 1e-5 * max(1.0, abs(theirs))
    else:
        assert ours == theirs


def block(model: Any, index: int) -> Any:
    return model.get_base_model().transformer.h[index]


def embedded(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made: torch.Tensor = model.get_input_embeddings()(ids)
    return made.detach()


def last_logit(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(given: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(inputs_embeds=given, use_cache=False).logits
        return logits[:, -1]

    return forward


ATTRIBUTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "saliency": lambda m, t: Saliency(last_logit(m)).attribute(embedded(m, t), target=7),
    "input x gradient": lambda m, t: InputXGradient(last_logit(m)).attribute(
        embedded(m, t), target=7
    ),
    "integrated gradients": lambda m, t: IntegratedGradients(last_logit(m)).attribute(
        embedded(m, t), target=7, n_steps=6, return_convergence_delta=True
    ),
    "of the embedding": lambda m, t: LayerIntegratedGradients(
        lambda ids: m(input_ids=ids, use_cache=False).logits[:, -1], m.get_input_embeddings()
    ).attribute(t(PROMPT, return_tensors="pt")["input_ids"], target=7, n_steps=4),
    "activation of a block": lambda m, t: LayerActivation(
        lambda ids: m(input_ids=ids, use_cache=False).logits[:, -1], block(m, 5)
    ).attribute(t(PROMPT, return_tensors="pt")["input_ids"]),
    "gradient x activation of a block": lambda m, t: LayerGradientXActivation(
        lambda ids: m(input_ids=ids, use_cache=False).logits[:, -1], block(m, 5)
    ).attribute(t(PROMPT, return_tensors="pt")["input_ids"], target=7),
    "ablation by tokens": lambda m, t: (
        LLMAttribution(FeatureAblation(m), t)
        .attribute(TextTokenInput(PROMPT, t), target=" and he", use_cached_outputs=False)
        .token_attr
    ),
    "ablation by tokens, with a cache": lambda m, t: (
        LLMAttribution(FeatureAblation(m), t)
        .attribute(TextTokenInput(PROMPT, t), target=" and he", use_cached_outputs=True)
        .token_attr
    ),
    "gradients by tokens": lambda m, t: (
        LLMGradientAttribution(LayerIntegratedGradients(m, m.get_input_embeddings()), t)
        .attribute(TextTokenInput(PROMPT, t), target=" and he", n_steps=4)
        .token_attr
    ),
}


@pytest.mark.parametrize("how", ATTRIBUTIONS)
def test_captum_attributes_as_to_the_whole_model(pair: Pair, tokenizer: Any, how: str) -> None:
    split, whole = pair
    same(ATTRIBUTIONS[how](split, tokenizer), ATTRIBUTIONS[how](whole, tokenizer))
    split.zero_grad()
    whole.zero_grad()


def _asked(kind: str, *requests: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, request, index) for index, request in enumerate(requests)]


EVALUATIONS: dict[str, Callable[[Any], Any]] = {
    "loglikelihood": lambda lm: lm.loglikelihood(
        _asked("loglikelihood", *((text[:40], text[40:80]) for text in TEXTS))
    ),
    "rolling": lambda lm: lm.loglikelihood_rolling(
        _asked("loglikelihood_rolling", *((text,) for text in TEXTS))
    ),
    "generate_until": lambda lm: lm.generate_until(
        _asked(
            "generate_until",
            *((text[:40], {"until": ["."], "max_gen_toks": 12}) for text in TEXTS),
        )
    ),
}


@pytest.mark.parametrize("what", EVALUATIONS)
def test_lm_eval_measures_the_whole_model(pair: Pair, tokenizer: Any, what: str) -> None:
    found = []
    for model in pair:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=128)
        found.append(EVALUATIONS[what](lm))
    same(*found)


GENERATED = [
    {"do_sample": False},
    {"num_beams": 3, "do_sample": False},
    {"do_sample": True, "top_k": 10},
    {"do_sample": False, "return_full_text": False, "num_return_sequences": 1},
    {"do_sample": False, "cache_implementation": "static"},
]


@pytest.mark.parametrize("how", GENERATED)
def test_a_pipeline_writes_what_the_whole_model_writes(
    pair: Pair, tokenizer: Any, how: dict[str, Any]
) -> None:
    found = []
    for model in pair:
        write = pipeline("text-generation", model=model, tokenizer=tokenizer)
        torch.manual_seed(5)
        found.append(write([PROMPT, TEXTS[0][:50]], max_new_tokens=8, batch_size=2, **how))
    assert found[0] == found[1]
