"""The model in one piece and in three, with the same weights and the same adapter in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.gpt2_small import SPLIT
from benchmarks.peers.driving import Step, adamw
from client_service.adapter_files import adapter_weights, load_adapter_weights, read_adapter
from shared.models import SplitRange, get_part_class, load_part
from shared.models.onednn import use_onednn

Trunk = Callable[[torch.Tensor], torch.Tensor]


def whole(model: Path, adapter: Path, onednn: bool = False) -> Any:
    """The unsplit ``PeftModel`` in training mode; perhaps with our layers by oneDNN."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if onednn:
        use_onednn(loaded, loaded.dtype, loaded.device)
    return _adapted(loaded, adapter)


def part(role: str, model: Path, adapter: Path) -> Any:
    """Bottom, trunk or top as a ``PeftModel`` in training mode."""
    split = SplitRange.parse(SPLIT)
    bounds = {
        "bottom": {"end_layer": split.start},
        "trunk": {"start_layer": split.start, "end_layer": split.end},
        "top": {"start_layer": split.end},
    }
    loaded = load_part(get_part_class("gpt2", role), model, **bounds[role])
    return _adapted(loaded, adapter)


class Ends:
    """The client of a split system: bottom and top, and the optimizer of both."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self.bottom, self.top = part("bottom", model, adapter), part("top", model, adapter)
        self.parameters = [
            p for end in (self.bottom, self.top) for p in end.parameters() if p.requires_grad
        ]
        self.optimizer = adamw(self.parameters)

    def loss(self, ids: torch.Tensor, trunk: Trunk) -> torch.Tensor:
        """The loss of a batch whose hidden states went through a trunk."""
        hidden_BTD = self.bottom(input_ids=ids, use_cache=False).last_hidden_state
        loss: torch.Tensor = self.top(
            inputs_embeds=trunk(hidden_BTD), labels=ids, use_cache=False
        ).loss
        return loss


class Middle:
    """The trunk of a split system whose library carries tensors and no gradients."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self._part = part("trunk", model, adapter)
        self._optimizer = adamw(self._part.parameters())
        self._input = self._output = torch.empty(0)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Carries hidden states up and keeps the graph."""
        self._input = hidden_BTD.requires_grad_()
        self._output = self._part(inputs_embeds=self._input, use_cache=False).last_hidden_state
        return self._output.detach()

    def backward(self, gradient_BTD: torch.Tensor) -> torch.Tensor:
        """Carries a gradient down through the kept graph and frees it."""
        self._output.backward(gradient_BTD)
        gradient = self._input.grad
        self._input = self._output = torch.empty(0)
        assert gradient is not None
        return gradient

    def step(self) -> None:
        """Steps the trunk's adapter."""
        self._optimizer.step()
        self._optimizer.zero_grad()


def local_step(model: Any) -> Step:
    """A training step of a model that torch trains by itself."""
    optimizer = adamw(model.parameters())

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _adapted(model: Any, adapter: Path) -> Any:
    config, weights = read_adapter(adapter)
    wrapped: Any = get_peft_model(model, config)
    own = adapter_weights(wrapped).keys()
    load_adapter_weights(wrapped, {name: weights[name] for name in own})
    return wrapped.train()
