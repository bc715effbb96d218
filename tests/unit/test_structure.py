"""Which fields of PEFT's configurations a client may tell a trunk."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shared.adapters.structure import setting
from shared.errors import AdapterError

LORA = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", False),
        ("target_modules", ".*"),
        ("exclude_modules", ".*"),
        ("layers_pattern", "evil"),
        ("megatron_core", "evil.core"),
        ("megatron_config", {}),
        ("loftq_config", {}),
        ("base_model_name_or_path", "/etc"),
        ("task_type", "CAUSAL_LM"),
        ("inference_mode", True),
        ("r", True),
        ("r", 4.5),
        ("r", "4"),
        ("r", 2**40),
        ("lora_dropout", float("nan")),
        ("use_dora", 1),
        ("bias", "all"),
        ("absent", 1),
        ("__class__", 1),
        ("layer_replication", [(0, 4)]),
        ("runtime_config", {}),
        (7, 7),
    ],
)
def test_a_field_that_may_not_be_told_never_reaches_peft(field: Any, value: Any) -> None:
    with pytest.raises(AdapterError, match="is not accepted"):
        setting(LORA, field, value)


def test_fields_of_the_kinds_that_may_be_told_do() -> None:
    assert setting(LORA, "r", 4) == 4
    assert setting(LORA, "lora_dropout", 0.5) == 0.5
    assert setting(LORA, "lora_dropout", 0) == 0
    assert setting(LORA, "use_dora", True) is True
    road = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ROAD]
    assert setting(road, "variant", "road_2") == "road_2"
    deft = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DEFT]
    assert setting(deft, "decomposition_method", "qr") == "qr"
    assert setting(deft, "init_scale", 2.0) == 2.0
