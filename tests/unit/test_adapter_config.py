"""PEFT configurations as JSON: what passes arrives unchanged, what is dangerous does not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shared.adapters.config import check_config, config_from_json, config_to_json
from shared.adapters.methods import METHODS, check_parts, method_of
from shared.adapters.numbers import largest_rank
from shared.errors import AdapterError

names = st.sampled_from(["c_attn", "c_proj", "c_fc", "q_proj", "gate_proj"])
ranks = st.integers(1, 64)
lora_fields = st.fixed_dictionaries(
    {"r": ranks, "target_modules": st.sets(names, min_size=1)},
    optional={
        "lora_alpha": st.integers(1, 128),
        "lora_dropout": st.floats(0, 0.9),
        "use_rslora": st.booleans(),
        "use_dora": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "rank_pattern": st.dictionaries(names, ranks),
        "alpha_pattern": st.dictionaries(names, st.integers(1, 64)),
        "layers_to_transform": st.lists(st.integers(0, 11), min_size=1, unique=True),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "ln_f"]), min_size=1, unique=True),
    },
)


@settings(deadline=None)
@given(lora_fields)
def test_a_configuration_arrives_as_it_was_sent(fields: dict[str, Any]) -> None:
    sent = LoraConfig(**fields)
    arrived = config_from_json(config_to_json(sent))
    assert {n: getattr(arrived, n) for n in fields} == {n: getattr(sent, n) for n in fields}
    assert config_to_json(arrived) == config_to_json(sent)
    assert largest_rank(arrived) == max([sent.r, *sent.rank_pattern.values()])


def test_peft_own_file_is_read(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["c_attn"], task_type="CAUSAL_LM")
    config.save_pretrained(str(tmp_path))
    arrived = config_from_json((tmp_path / "adapter_config.json").read_text())
    assert (arrived.r, arrived.target_modules) == (3, {"c_attn"})


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is:UserWarning")  # PEFT, of eva and corda
@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "eva"])
def test_what_rewrites_base_weights_is_refused(value: str) -> None:
    text = json.dumps({"peft_type": "LORA", "init_lora_weights": value})
    with pytest.raises(AdapterError):
        config_from_json(text)


REFUSED = [
    {"megatron_core": "os"},
    {"megatron_config": {"a": 1}},
    {"bias": "all"},
    {"layer_replication": [[0, 4], [2, 5]]},
    {"trainable_token_indices": [1, 2]},
    {"target_parameters": ["weight"]},
    {"lora_bias": True},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_a_field_that_is_not_known_to_be_harmless_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=f"{min(fields)}=.*may be set: .*target_modules"):
        config_from_json(json.dumps({"peft_type": "LORA", **fields}))


@pytest.mark.parametrize("method", METHODS)
def test_every_accepted_field_is_one_of_peft(method: str) -> None:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    assert set(config_class.__dataclass_fields__) >= METHODS[method].fields - {"peft_type"}


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(
            total_step=20, init_r=6, target_r=3, tinit=2, deltaT=5, target_modules=["c_attn"]
        ),
        IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
        PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
        PromptTuningConfig(num_virtual_tokens=4),
        PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, encoder_num_layers=3),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_other_methods_arrive_as_they_were_sent(config: PeftConfig) -> None:
    text = config_to_json(config)
    arrived = config_from_json(text)
    assert config_to_json(arrived) == text
    assert type(arrived) is type(config)


ADALORA = {"peft_type": "ADALORA", "target_modules": ["c_attn"], "total_step": 20}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}
ODD_NUMBERS = [
    {**ADALORA, "init_r": 0},
    {**ADALORA, "deltaT": 0},
    {**ADALORA, "beta1": 1.0},
    {**ADALORA, "orth_reg_weight": "much"},
    {**ADALORA, "total_step": 2.5},
    {**ADALORA, "tinit": 30},
    {**PREFIX, "num_virtual_tokens": 0},
    {**PREFIX, "num_virtual_tokens": True},
    {**PREFIX, "encoder_hidden_size": -8},
    {"peft_type": "LORA", "r": 2, "lora_dropout": 1.0},
    {"peft_type": "LORA", "r": 2, "lora_alpha": float("inf")},
]


@pytest.mark.parametrize("fields", ODD_NUMBERS, ids=str)
def test_numbers_that_no_adapter_has_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(AdapterError):
        config_from_json(json.dumps(fields))


@pytest.mark.parametrize("pattern", [{"a.lora_E": [1, 0]}, {"a.lora_E": "x"}, ["a"]], ids=str)
def test_a_rank_pattern_that_is_none_is_refused(pattern: Any) -> None:
    with pytest.raises(AdapterError):
        largest_rank(config_from_json(json.dumps({**ADALORA, "rank_pattern": pattern})))


def test_a_prompt_tuning_file_names_no_code_to_load() -> None:
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    fields |= {"tokenizer_kwargs": {"trust_remote_code": True}}
    with pytest.raises(AdapterError):
        config_from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("method", "parts"),
    [("PREFIX_TUNING", "trunk"), ("PROMPT_TUNING", "trunk"), ("P_TUNING", "top"), ("LORA", "lid")],
)
def test_a_method_on_a_part_where_it_cannot_work_says_why(method: str, parts: str) -> None:
    with pytest.raises(AdapterError, match=r"accepted|works on the bottom alone"):
        check_parts(method_of(method), parts)


def test_a_configuration_is_bounded_in_size() -> None:
    fields = {"peft_type": "LORA", "target_modules": ["c_attn" * 60_000]}
    with pytest.raises(AdapterError, match="bytes; at most"):
        config_from_json(json.dumps(fields))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_another_task_is_refused(task: str) -> None:
    with pytest.raises(AdapterError, match="CAUSAL_LM"):
        check_config(LoraConfig(task_type=task))
