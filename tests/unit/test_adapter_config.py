"""PEFT configurations as JSON: what passes arrives unchanged, what is dangerous does not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from shared.adapters.config import (
    ACCEPTED_FIELDS,
    check_config,
    config_from_json,
    config_to_json,
    largest_rank,
)
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


def test_every_accepted_field_is_one_of_peft() -> None:
    assert set(LoraConfig.__dataclass_fields__) >= ACCEPTED_FIELDS["LORA"]


def test_a_configuration_is_bounded_in_size() -> None:
    fields = {"peft_type": "LORA", "target_modules": ["c_attn" * 20_000]}
    with pytest.raises(AdapterError, match="bytes; at most"):
        config_from_json(json.dumps(fields))


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_another_task_is_refused(task: str) -> None:
    with pytest.raises(AdapterError, match="CAUSAL_LM"):
        check_config(LoraConfig(task_type=task))
