"""A model that is read from a file, while others make theirs."""

from __future__ import annotations

import threading

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from shared.models.loading import Undrawn
from tests.models import tiny_model


def fresh_adapter() -> list[torch.Tensor]:
    model = tiny_model("llama")
    torch.manual_seed(4)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    return [p.detach() for n, p in adapted.named_parameters() if "lora_A" in n]


def test_what_another_thread_makes_meanwhile_is_drawn() -> None:
    expected, found = fresh_adapter(), list[torch.Tensor]()
    with Undrawn():
        thread = threading.Thread(target=lambda: found.extend(fresh_adapter()))
        thread.start()
        thread.join()
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_nothing_is_drawn_and_torch_s_generator_stays() -> None:
    state = torch.get_rng_state()
    with Undrawn():
        nn.init.normal_(nn.Linear(64, 64).weight)
    assert torch.equal(torch.get_rng_state(), state)
