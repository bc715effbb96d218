"""A trunk in three calls: compute, forward, backward.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import uuid
from types import TracebackType

import torch
from peft import PeftConfig, PeftType

from client_service.calls import ForwardCall, SessionTerms
from client_service.optimizer_spec import OptimizerSettings
from client_service.session import TrunkSession
from shared.adapters.config import config_to_json
from shared.errors import AdapterError, UnknownRequestError


class TrainingClient:
    """The trunk's side of a hand-written training loop.

    Args:
        address: ``host:port`` of the trunk.
        peft_config: Adapter of the trunk's blocks; None leaves them frozen.
        seed: Seeds the fresh adapter and the trunk's dropout.
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
        seed: int = 0,
        dropout: float | None = None,
        weight_digest: str | None = None,
    ) -> None:
        if peft_config is not None and peft_config.peft_type == PeftType.ADALORA:
            raise AdapterError(
                "AdaLoRA divides one budget of ranks among all parts, which a trunk by itself "
                "cannot: use SplitModelForCausalLM"
            )
        terms = SessionTerms(
            weight_digest=weight_digest,
            peft_config_json="" if peft_config is None else config_to_json(peft_config),
            seed=seed,
            dropout=dropout,
        )
        self.session = TrunkSession(address, terms)
        self.peft_config = peft_config
        self._step = 1
        self._micro = 0
        self._last_request: str | None = None

    def compute(
        self, hidden_BTD: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk for inference; keeps nothing."""
        return self.session.forward(hidden_BTD.detach(), ForwardCall(attention_mask)).hidden_BTD

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
        request_id = request_id or uuid.uuid4().hex
        call = ForwardCall(
            attention_mask=attention_mask,
            request_id=request_id,
            keep_graph=True,
            training=True,
            step=self._step,
            micro=self._micro,
        )
        output_BTD = self.session.forward(hidden_BTD.detach(), call).hidden_BTD
        self._micro += 1
        self._last_request = request_id
        return output_BTD.requires_grad_(True)

    def backward(self, gradient_BTD: torch.Tensor, request_id: str | None = None) -> torch.Tensor:
        """Carries the loss's gradient [B, T, D] back through a forward.

        Args:
            gradient_BTD: With respect to that forward's result.
            request_id: Which forward; None means the last one.

        Returns:
            The gradient [B, T, D] with respect to that forward's input.

        Raises:
            UnknownRequestError: If the trunk holds no such forward.
            TrunklineError: What the trunk answered, if it refused.
        """
        request_id = request_id or self._last_request
        if request_id is None:
            raise UnknownRequestError("backward before any forward")
        found, _ = self.session.backward(gradient_BTD, request_id)
        assert found is not None
        return found

    def step(self, optimizer: OptimizerSettings, gradient_scale: float = 1.0) -> None:
        """Steps the trunk's own optimizer on its adapter; nothing to do for a frozen trunk.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        if self.session.trainable_parameters:
            self.session.step(self._step, gradient_scale, optimizer)
        self._step += 1
        self._micro = 0

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self.session.close()

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
