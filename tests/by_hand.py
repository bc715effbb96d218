"""A client with an adapter whose messages a test makes itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig

from client_service import TrainingClient
from client_service.calls import ForwardCall
from client_service.session import TrunkSession
from shared.adapters.state_push import StatePush


class ByHand:
    """A session, and an adapter of which its trunk was told.

    Args:
        address: Of the trunk.
        config: The adapter's; None for none.
        seed: Of its fresh values.
    """

    def __init__(self, address: str, config: PeftConfig | None, seed: int = 1) -> None:
        self.client = TrainingClient(address, config, seed=seed)
        self.session: TrunkSession = self.client.session
        self._sent = self.client._passage.function._sent

    @property
    def version(self) -> int:
        """Of the adapter, as the trunk has it."""
        return self._sent.version

    def call(self, **fields: Any) -> ForwardCall:
        """A forward with what the trunk has."""
        return ForwardCall(**{"state_version": self.version} | fields)

    def forward(self, hidden_BTD: torch.Tensor, **fields: Any) -> torch.Tensor:
        return self.session.forward(hidden_BTD, self.call(**fields))

    def backward(
        self, gradient_BTD: torch.Tensor, request_id: str, *values: str
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """Gradients of the input and of some values."""
        found = self.session.backward(gradient_BTD, request_id, True, list(values), [], False)
        return found[:2]

    def everything(self, **changes: Any) -> StatePush:
        """All that the trunk has, to be sent once more, with changes."""
        structure, values, tensors = self._sent.content()
        return replace(StatePush(self.version + 1, 0, structure, values, tensors), **changes)

    def push(self, hidden_BTD: torch.Tensor, push: StatePush) -> torch.Tensor:
        """A forward that brings something, and means it."""
        return self.session.forward(hidden_BTD, ForwardCall(state_version=push.version, push=push))

    def close(self) -> None:
        self.client.close()
