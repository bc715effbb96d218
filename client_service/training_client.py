"""A trunk in three calls: compute, forward, backward.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import uuid
from types import TracebackType
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model

from client_service.by_peft import by_peft, seeded
from client_service.calls import SessionTerms
from client_service.placement import placed
from client_service.session import TrunkSession
from client_service.skeleton_model import blocks_alone
from client_service.trunk_blocks import Passage
from shared.errors import AdapterError, UnknownRequestError
from shared.models.dropout import set_dropout


class TrainingClient:
    """The trunk's side of a hand-written training loop; its adapter's parameters are here.

    Attributes:
        session: On the trunk.
        model: The trunk's blocks in a model that has nothing else, with the adapter if there is
            one; every PEFT call that reads or writes an adapter takes it.

    Args:
        address: ``host:port`` of the trunk.
        peft_config: Adapter of the trunk's blocks; None leaves them frozen.
        seed: Of torch's generator while the adapter is drawn; None draws from it as it is.
        dropout: Replaces the probability of the trunk's own dropout layers.
        weight_digest: What the trunk must serve; None does not check.

    Raises:
        TrunkUnavailableError: If no trunk answers within a few seconds.
        ModelMismatchError: If it serves other weights.
        AdapterError: If the adapter is refused.
    """

    def __init__(
        self,
        address: str = "localhost:50052",
        peft_config: PeftConfig | None = None,
        *,
        seed: int | None = None,
        dropout: float | None = None,
        weight_digest: str | None = None,
    ) -> None:
        if peft_config is not None:
            _check_method(peft_config)
        self.session = TrunkSession(address, SessionTerms(weight_digest=weight_digest))
        try:
            self.model: Any = blocks_alone(self.session)
            self._passage: Passage = self.model.passage
            if dropout is not None:
                set_dropout(self.model, dropout)
            self.model.requires_grad_(False)
            if peft_config is not None:
                split = self.model.split
                config = placed(peft_config, "same", "trunk", self.model.config, split)
                with by_peft("PEFT cannot put this adapter on the trunk's blocks"), seeded(seed):
                    self.model = get_peft_model(self.model, config)
                self._passage.check()
        except BaseException:
            self.session.close()
            raise
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._last_request: str | None = None

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained in the trunk's blocks, for an optimizer; empty for a frozen trunk."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def compute(
        self, hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk for inference; keeps nothing."""
        self.model.eval()
        with torch.no_grad():
            return self._through(hidden_BTD, attention_mask)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        request_id: str | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk, which keeps their graph.

        Args:
            hidden_BTD: What the bottom gave.
            request_id: Names the forward for its backward; made up if None.
            attention_mask: [B, T] of zeros and ones.

        Returns:
            Hidden states [B, T, D], a leaf that collects its gradient in ``.grad`` for
            :meth:`backward`.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        self.model.train()
        given_BTD = hidden_BTD.detach().requires_grad_(True)
        with torch.enable_grad():
            output_BTD = self._through(given_BTD, attention_mask)
        self._last_request = request_id or uuid.uuid4().hex
        self._held[self._last_request] = given_BTD, output_BTD
        return output_BTD.detach().requires_grad_(True)

    def backward(self, gradient_BTD: torch.Tensor, request_id: str | None = None) -> torch.Tensor:
        """Carries the loss's gradient [B, T, D] back, adding to those of :meth:`parameters`.

        Args:
            gradient_BTD: With respect to that forward's result.
            request_id: Which forward; None means the last one.

        Returns:
            The gradient [B, T, D] with respect to that forward's input.

        Raises:
            UnknownRequestError: If there was no such forward, or its backward was done.
            TrunklineError: What the trunk answered, if it refused.
        """
        request_id = request_id or self._last_request
        if request_id not in self._held:
            raise UnknownRequestError(
                f"backward of {request_id!r}: accepted are forwards whose backward was not done"
            )
        given_BTD, output_BTD = self._held[request_id]
        output_BTD.backward(gradient_BTD)
        del self._held[request_id]
        assert given_BTD.grad is not None
        return given_BTD.grad

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self.session.close()

    def _through(self, hidden_BTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        self._passage.begin(mask)
        try:
            return self._passage.through(hidden_BTD, None, None, self.model.training)
        finally:
            self._passage.end()

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_method(config: PeftConfig) -> None:
    if config.peft_type == PeftType.ADALORA:
        raise AdapterError(
            "AdaLoRA divides one budget of ranks among all parts, which a trunk by itself "
            "cannot: use SplitModelForCausalLM"
        )
    if config.is_prompt_learning:
        raise AdapterError(
            f"{config.peft_type.value} puts virtual tokens before the whole model, of which a "
            f"trunk by itself has a part: use SplitModelForCausalLM"
        )
