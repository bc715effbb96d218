"""Where an adapter is, said in PEFT's words: what stock PEFT makes of them on the whole model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from client_service.placement import PARTS, check_parts, part_of, placed
from shared.errors import AdapterError
from shared.models import FAMILIES, SplitRange, family_of
from tests.models import tiny_model

SPLIT = SplitRange(1, 3)
LAYERS = {"gpt2": "n_layer"}


def small(family: str) -> Any:
    return tiny_model(family, **{LAYERS.get(family, "num_hidden_layers"): 4})


def lora(family: str, **changes: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(family_of(family).linear_layers),
        "fan_in_fan_out": family == "gpt2",
    }
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def adapted(family: str, config: PeftConfig, trunk: Any = "same", parts: str = "all") -> Any:
    """The whole model with an adapter where it was placed."""
    model = small(family)
    return get_peft_model(model, placed(config, trunk, parts, model.config, SPLIT))


def layers(model: Any) -> dict[str, Any]:
    found = model.get_base_model().named_modules()
    return {n: m for n, m in found if isinstance(m, BaseTunerLayer) and n}


def parts_of(family: str, names: Any) -> set[str]:
    return {part_of(name, family_of(family), SPLIT) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_of_a_family_is_of_one_part(family: str) -> None:
    model, known = small(family), family_of(family)
    blocks = [f"{known.layer_prefix}{index}" for index in range(4)]
    found = [part_of(f"{name}.x", known, SPLIT) for name in blocks]
    assert found == ["bottom", "trunk", "trunk", "top"]
    names = {module: name for name, module in model.named_modules()}
    assert part_of(names[model.get_input_embeddings()], known, SPLIT) == "bottom"
    assert part_of(names[model.get_output_embeddings()], known, SPLIT) == "top"
    assert part_of(f"{known.base}.{known.norm}.weight", known, SPLIT) == "top"
    # Of twelve blocks, the tenth is not the first.
    assert part_of(f"{known.layer_prefix}11.x", known, SplitRange(1, 2)) == "top"


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_where_it_was_put_and_nowhere_else(family: str, parts: str) -> None:
    everywhere = layers(adapted(family, lora(family)))
    put = layers(adapted(family, lora(family), parts=parts))
    expected = [n for n in everywhere if parts_of(family, [n]) <= set(PARTS[parts])]
    assert list(put) == expected and parts_of(family, put) == set(PARTS[parts])


@pytest.mark.parametrize("parts", ["top", "ends", "bottom"])
def test_the_head_and_modules_to_save_are_placed_too(parts: str) -> None:
    has_head = "top" in PARTS[parts]
    config = lora("llama", target_modules=["lm_head", "q_proj"])
    assert ("lm_head" in layers(adapted("llama", config, parts=parts))) == has_head
    saved = {"top": ["norm"], "ends": ["lm_head", "embed_tokens"], "bottom": ["embed_tokens"]}
    config = lora("llama", modules_to_save=saved[parts])
    named = adapted("llama", config, parts=parts).get_base_model().named_parameters()
    names = [name for name, _ in named if "to_save" in name]
    assert names and parts_of("llama", names) <= set(PARTS[parts])
    assert {w for w in saved[parts] if any(f"{w}.modules_to_save" in n for n in names)} == set(
        saved[parts]
    )


def test_a_norm_of_some_blocks_alone_is_saved() -> None:
    model = adapted("llama", lora("llama", modules_to_save=["input_layernorm"]), parts="trunk")
    saved = {n for n, p in model.named_parameters() if p.requires_grad and "to_save" in n}
    assert len(saved) == 2 and all(".layers.1." in n or ".layers.2." in n for n in saved)


@pytest.mark.parametrize("theirs", [["q_proj", "lm_head"], r".*\.[qk]_proj"])
def test_what_was_excluded_stays_so(theirs: Any) -> None:
    config = lora("llama", exclude_modules=theirs)
    found = layers(adapted("llama", config, parts="ends"))
    whole = layers(adapted("llama", config))
    assert "model.layers.0.self_attn.q_proj" not in whole
    assert set(found) == {n for n in whole if parts_of("llama", [n]) != {"trunk"}}
    assert config.exclude_modules in (theirs, set(theirs)), "the caller's own was changed"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_a_frozen_trunk_has_no_adapter(family: str, method: str) -> None:
    targets, transposed = list(family_of(family).linear_layers), family == "gpt2"
    common = {"task_type": "CAUSAL_LM", "target_modules": targets, "fan_in_fan_out": transposed}
    config: PeftConfig = {
        "lora": lambda: LoraConfig(**common),
        "adalora": lambda: AdaLoraConfig(**common, total_step=10),
        "ia3": lambda: IA3Config(**common, feedforward_modules=targets[-1:]),
    }[method]()
    found = layers(adapted(family, config, trunk=None))
    assert parts_of(family, found) == {"bottom", "top"}


def test_the_trunk_may_have_another_rank_and_alpha() -> None:
    config = lora("llama", rank_pattern={"q_proj": 3}, alpha_pattern={"k_proj": 5})
    before = copy.deepcopy(config)
    other = copy.deepcopy(config)
    other.r, other.lora_alpha = 2, 32
    found = layers(adapted("llama", config, trunk=other))
    for name, layer in found.items():
        inside = parts_of("llama", [name]) == {"trunk"}
        # A pattern that says something of a layer is for the ends; the trunk's own comes first.
        rank = 2 if inside else 3 if "q_proj" in name else 4
        alpha = 32 if inside else 5 if "k_proj" in name else 8
        assert (layer.r["default"], layer.lora_alpha["default"]) == (rank, alpha), name
    assert config == before, "the caller's own was changed"


def test_the_same_is_the_configuration_as_it_was() -> None:
    config = lora("llama", modules_to_save=["lm_head"])
    made = placed(config, "same", "all", small("llama").config, SPLIT)
    assert made == config and made is not config
    assert placed(config, copy.deepcopy(config), "all", small("llama").config, SPLIT) == config


TOKENS: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
PROMPTS = [PromptTuningConfig(**TOKENS), PromptEncoderConfig(**TOKENS, encoder_hidden_size=8)]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: p.peft_type.value)
@pytest.mark.parametrize("parts", ["all", "ends", "bottom"])
def test_virtual_tokens_are_the_bottom_s(prompt: PeftConfig, parts: str) -> None:
    assert placed(prompt, "same", parts, small("gpt2").config, SPLIT) == prompt


ONE = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
REFUSED: list[tuple[PeftConfig, Any, str, str]] = [
    (lora("llama"), "same", "middle", r"parts 'middle' .*; accepted: all, bottom, trunk"),
    (lora("llama"), None, "trunk", "nothing is left"),
    (lora("llama"), IA3Config(**ONE), "all", r"trunk_peft_config differs in .* PEFT cannot say"),
    (lora("llama"), lora("llama", use_rslora=True), "all", "differs in use_rslora"),
    (lora("llama"), lora("llama", target_modules=["q_proj"]), "all", "differs in target_modules"),
    (
        VBLoRAConfig(**ONE, num_vectors=8, vector_length=8, r=4),
        VBLoRAConfig(**ONE, num_vectors=8, vector_length=8, r=2),
        "all",
        "differs in r, .*another nothing",
    ),
    (PrefixTuningConfig(**TOKENS), "same", "trunk", "no way to leave blocks out"),
    (PrefixTuningConfig(**TOKENS), None, "all", "accepted is 'all'"),
    *(
        (prompt, "same", part, "before the first block")
        for prompt in PROMPTS
        for part in ("top", "trunk")
    ),
    (lora("llama", modules_to_save=["lm_head"]), "same", "bottom", r"\['lm_head'\] are not in"),
    (VeraConfig(**ONE), "same", "ends", "PEFT has no exclude_modules for it"),
    (VeraConfig(**ONE), None, "all", "VERA on some parts: .*; accepted is 'all'"),
    (lora("llama", trainable_token_indices=[1]), "same", "top", "the embedding is the bottom's"),
]


@pytest.mark.parametrize(("config", "trunk", "parts", "why"), REFUSED)
def test_what_peft_has_no_words_for_is_refused(
    config: PeftConfig, trunk: Any, parts: str, why: str
) -> None:
    with pytest.raises(AdapterError, match=why):
        placed(config, trunk, parts, small("llama").config, SPLIT)


def test_parts_are_known_by_word() -> None:
    for word in PARTS:
        check_parts(word)
    with pytest.raises(AdapterError, match="'lid'"):
        check_parts("lid")
