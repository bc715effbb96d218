"""The trunk as a differentiable function, and as a part of the client's optimizer step.

The trunk's adapter appears to the client as one number, the *proxy*: a 1-element parameter whose
gradient is the 2-norm of the trunk's accumulated gradient. So stock ``clip_grad_norm_`` computes
the global norm, and what it (or a loss scaler) did to the proxy's gradient is the scale by which
the trunk multiplies its own gradients when it steps.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import collections
import uuid
import weakref
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from client_service.optimizer_spec import OptimizerSettings
from client_service.session import CacheEdit, ForwardCall, TrunkSession
from shared.errors import TrunkUnavailableError


class RemoteTrunk:
    """A session, its proxy parameter, and the count of steps and micro-batches.

    Args:
        session: An open session.
    """

    def __init__(self, session: TrunkSession) -> None:
        self.session = session
        self.proxy = torch.nn.Parameter(torch.zeros(1), requires_grad=self.trainable)
        self._step = 1
        self._micro = 0
        self._norm = 0.0
        self._accumulated = False
        self._dropped: collections.deque[tuple[str, str]] = collections.deque()

    @property
    def trainable(self) -> bool:
        """Whether the trunk has an adapter to train in this session."""
        return self.session.trainable_parameters > 0

    def run(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        training: bool,
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk, differentiably where needed."""
        self._release_dropped()
        wanted = hidden_BTD.requires_grad or self.trainable
        if not (torch.is_grad_enabled() and wanted):
            call = ForwardCall(attention_mask, position_ids, training=training, step=self._step)
            return self.session.forward(hidden_BTD.detach(), call)
        call = ForwardCall(
            attention_mask,
            position_ids,
            request_id=uuid.uuid4().hex,
            keep_graph=True,
            training=training,
            step=self._step,
            micro=self._micro,
        )
        self._micro += 1
        # get_peft_model() freezes every parameter it did not make, this one included.
        self.proxy.requires_grad_(self.trainable)
        output: torch.Tensor = _RemoteForward.apply(hidden_BTD, self.proxy, self, call)
        return output

    def run_cached(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache_id: str,
        edits: list[CacheEdit],
    ) -> torch.Tensor:
        """Carries new tokens' hidden states through the trunk, extending its cache."""
        self._release_dropped()
        call = ForwardCall(
            attention_mask, position_ids, cache_id=cache_id, cache_edits=edits, step=self._step
        )
        return self.session.forward(hidden_BTD.detach(), call)

    def backward(
        self, gradient_BTD: torch.Tensor, request_id: str, need_input_gradient: bool
    ) -> torch.Tensor | None:
        """Carries a gradient back and shows the trunk's gradient norm in the proxy's gradient."""
        found, self._norm = self.session.backward(
            gradient_BTD,
            request_id,
            need_input_gradient,
            reset_gradients=self._accumulated and self._zeroed_by_client(),
        )
        self._accumulated = True
        if self.trainable:
            self.proxy.grad = torch.full_like(self.proxy, self._norm)
        return found

    def step(self, optimizer: OptimizerSettings) -> None:
        """Steps the trunk's optimizer, if gradients were accumulated since the last step."""
        if not (self.trainable and self._accumulated) or self._zeroed_by_client():
            return
        assert self.proxy.grad is not None
        scale = float(self.proxy.grad) / self._norm if self._norm > 0 else 1.0
        self.session.step(self._step, scale, optimizer)
        self._step += 1
        self._micro = 0
        self._accumulated = False
        self.proxy.grad = None
        with torch.no_grad():
            self.proxy.zero_()  # it stands for nothing that an optimizer could move

    def release(self, request_id: str = "", cache_id: str = "") -> None:
        """Notes state that will not be asked for again; the next call tells the trunk.

        Finalizers call this, perhaps in the middle of a send of this very thread, so it must not
        send itself.
        """
        self._dropped.append((request_id, cache_id))

    def _release_dropped(self) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if not dropped:
            return
        requests, caches = zip(*dropped, strict=True)
        try:
            self.session.release([r for r in requests if r], [c for c in caches if c])
        except TrunkUnavailableError:
            return  # the session is gone, and its state with it

    def close(self) -> None:
        """Ends the session."""
        self.session.close()

    def _zeroed_by_client(self) -> bool:
        return self.proxy.grad is None or (self._norm > 0 and float(self.proxy.grad) == 0.0)


class _HeldForward:
    """Lives as long as the autograd node: a forward whose graph is dropped is released."""

    def __init__(self, trunk: RemoteTrunk, request_id: str) -> None:
        self.release = weakref.finalize(self, trunk.release, request_id)
        self.release.atexit = False


class _RemoteForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: torch.Tensor,
        proxy: torch.Tensor,
        trunk: RemoteTrunk,
        call: ForwardCall,
    ) -> torch.Tensor:
        output_BTD = trunk.session.forward(hidden_BTD.detach(), call)
        ctx.trunk, ctx.request_id = trunk, call.request_id
        ctx.held = _HeldForward(trunk, call.request_id)
        return output_BTD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found = ctx.trunk.backward(
            gradient_BTD.contiguous(), ctx.request_id, ctx.needs_input_grad[0]
        )
        ctx.held.release.detach()
        return found, None, None, None
