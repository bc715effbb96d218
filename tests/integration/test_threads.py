"""Threads that share a split model, and what other threads do to it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from client_service import SplitModelForCausalLM
from shared.errors import AdapterError
from tests.conftest import Daemon
from tests.patience import PATIENCE_S

Start = Callable[..., Daemon]


def ids(seed: int) -> torch.Tensor:
    return torch.randint(3, 500, (1, 6), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tiny_gpt2: Path, trunkd: Start) -> Iterator[tuple[Any, Any]]:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )
    address = trunkd("--model", str(tiny_gpt2)).address
    made = []
    for model in (
        SplitModelForCausalLM.from_pretrained(tiny_gpt2, address),
        AutoModelForCausalLM.from_pretrained(tiny_gpt2),
    ):
        torch.manual_seed(1)
        peft = get_peft_model(model, config)
        peft.add_adapter("other", config)
        made.append(peft.eval())
    yield made[0], made[1]
    made[0].remote_trunk.close()


def test_sixty_four_threads_that_call_get_their_own_answers(pair: tuple[Any, Any]) -> None:
    split, whole = pair

    def work(model: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(input_ids=ids(seed)).logits
        how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        return logits, model.generate(ids(seed), **how)

    with ThreadPoolExecutor(64) as threads:
        ours = list(threads.map(lambda seed: work(split, seed), range(64)))
    for seed, (logits, tokens) in enumerate(ours):
        expected, expected_tokens = work(whole, seed)
        assert float((logits - expected).abs().max()) <= 1e-5
        assert torch.equal(tokens, expected_tokens)


def disable(model: Any) -> Callable[[], None]:
    model.base_model.disable_adapter_layers()
    return lambda: model.base_model.enable_adapter_layers()


def switch(model: Any) -> Callable[[], None]:
    model.set_adapter("other")
    return lambda: model.set_adapter("default")


def scale(model: Any) -> Callable[[], None]:
    layer = model.base_model.model.transformer.h[1].mlp.c_fc
    before = layer.scaling["default"]
    layer.set_scale("default", 7.0)
    return lambda: layer.scaling.update(default=before)


def mode(model: Any) -> Callable[[], None]:
    model.train()
    return lambda: model.eval()


@pytest.mark.parametrize("change", [disable, switch, scale, mode])
@pytest.mark.parametrize("where", ["transformer.h.0", "transformer.h.11", "transformer.ln_f"])
def test_a_call_during_which_another_thread_changes_adapters_is_refused(
    pair: tuple[Any, Any], change: Callable[[Any], Callable[[], None]], where: str
) -> None:
    split, whole = pair
    undo: list[Callable[[], None]] = []

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=lambda: undo.append(change(split)))
        thread.start()
        thread.join(PATIENCE_S)

    hook = split.get_submodule(f"base_model.model.{where}").register_forward_hook(meanwhile)
    with torch.no_grad(), pytest.raises(AdapterError, match="changed by another thread"):
        split(input_ids=ids(0))
    hook.remove()
    undo[0]()
    with torch.no_grad():
        ours, theirs = split(input_ids=ids(0)).logits, whole(input_ids=ids(0)).logits
    assert float((ours - theirs).abs().max()) <= 1e-5
