"""``generate()`` through the split, token for token what the whole model gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from tests.conftest import Daemon
from tests.models import VOCAB, save_tiny_model

MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 4},
    {"do_sample": True, "temperature": 0.9, "top_k": 50},
    {"do_sample": True, "num_return_sequences": 3},
]


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling", "several"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_generation_equals_the_whole_models(
    family: str, mode: dict[str, Any], trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "model", pad_token_id=0)
    daemon = trunkd("--model", str(folder), "--split", "2:4")
    split = SplitModelForCausalLM.from_pretrained(folder, daemon.address)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    found = []
    for model in (split, whole):
        torch.manual_seed(5)
        found.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, **mode)
        )
    assert torch.equal(*found)
