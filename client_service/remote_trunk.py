"""The trunk as a differentiable function, and as a part of the client's optimizer step.

The trunk's adapter appears to the client as one number, the *proxy*: a 1-element parameter whose
gradient is the 2-norm of the trunk's accumulated gradient. So stock ``clip_grad_norm_`` computes
the global norm, and what it (or a loss scaler) did to the proxy's gradient is the scale by which
the trunk multiplies its own gradients when it steps.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import collections
import threading
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from client_service.calls import CacheEdit, ForwardCall
from client_service.optimizer_spec import OptimizerSettings
from client_service.session import Tensors, TrunkSession
from client_service.turns import Cut, Turn, current_turn
from shared.errors import TrunkUnavailableError


@dataclass
class _Progress:
    """Where the training of one of the trunk's adapters stands."""

    trainable: bool
    step: int = 1
    """Number of the next optimizer step."""
    micro: int = 0
    norm: float = 0.0
    accumulated: bool = False


class _Here(threading.local):
    """What one thread does, of the micro-batches that several have in flight."""

    exact = False
    """Whether it repeats its last forward in float32."""
    micro = 0
    """Number of that forward, which keys dropout."""


@dataclass(frozen=True)
class Penalty:
    """AdaLoRA's orthogonality term of the trunk's matrices, differentiable in training."""

    total: torch.Tensor
    terms: int


class RemoteTrunk:
    """A session, its proxy parameter, and the count of steps and micro-batches.

    Args:
        session: An open session.
    """

    def __init__(self, session: TrunkSession) -> None:
        self.session = session
        self._adapters = {"": _Progress(session.trainable_parameters > 0)}
        self._active = ""
        self._without_adapter = False
        self.proxy = torch.nn.Parameter(torch.zeros(1), requires_grad=self.trainable)
        self.penalty: Penalty | None = None
        """Of the last forward; None unless the trunk's adapter is AdaLoRA."""
        self.prefix_tokens = 0
        """Virtual tokens of prefix tuning, which each side puts before its own blocks."""
        self.guard: Any = None
        """The :class:`~client_service.wire_guard.WireGuard` of the model, if it has one."""
        self.saved_by_peft = False
        """Whether the model's ``save_pretrained`` joins the trunk's adapter with the client's."""
        self._dropped: collections.deque[tuple[str, str]] = collections.deque()
        self._here = _Here()

    @property
    def active(self) -> str:
        """Name on the trunk of the adapter in use; empty is the session's own."""
        return self._active

    @property
    def trainable(self) -> bool:
        """Whether the trunk has an adapter in use that can be trained."""
        return self._now.trainable and not self._without_adapter

    @property
    def next_step(self) -> int:
        """Number of the next optimizer step of the adapter in use."""
        return self._now.step

    @property
    def micro(self) -> int:
        """Number of the next micro-batch, which keys dropout on the trunk with the step's."""
        return self._now.micro

    @micro.setter
    def micro(self, value: int) -> None:
        self._now.micro = value

    def run(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        training: bool,
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk, differentiably where needed."""
        self._release_dropped()
        call = self._call(attention_mask, position_ids, training)
        wanted = hidden_BTD.requires_grad or self.trainable
        progress = self._now
        if not (torch.is_grad_enabled() and wanted):
            self._here.micro = call.micro
            return self._ask(hidden_BTD, call)
        call = replace(call, request_id=uuid.uuid4().hex, keep_graph=True, micro=progress.micro)
        self._here.micro = progress.micro
        progress.micro += 1
        # get_peft_model() freezes every parameter it did not make, this one included.
        self.proxy.requires_grad_(self.trainable)
        turn = current_turn()
        if turn is None:
            output, penalty = _RemoteForward.apply(hidden_BTD, self.proxy, self, call)
        else:
            output, penalty = self._run_cut(turn, hidden_BTD, call)
        if self.penalty is not None:
            self.penalty = replace(self.penalty, total=penalty)
        return output  # type: ignore[no-any-return]

    def run_cached(
        self,
        hidden_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache_id: str,
        edits: list[CacheEdit],
        cached: int,
    ) -> torch.Tensor:
        """Carries new tokens' hidden states through the trunk, extending its cache.

        Args:
            hidden_BTD: Of the new tokens.
            attention_mask: [B, S], or [B, 1, T, S]; None hides nothing.
            position_ids: [B or 1, T].
            cache_id: Name of the cache.
            edits: Applied to it before.
            cached: Tokens in it by then, without a prefix.
        """
        self._release_dropped()
        call = self._call(attention_mask, position_ids, training=False)
        call = replace(call, cache_id=cache_id, cache_edits=edits, cached_tokens=cached)
        return self._ask(hidden_BTD, call)

    def backward(
        self,
        gradient_BTD: torch.Tensor,
        call: ForwardCall,
        need_input_gradient: bool,
        penalty_gradient: float = 0.0,
    ) -> torch.Tensor | None:
        """Carries a gradient back and shows the trunk's gradient norm in the proxy's gradient."""
        progress = self._adapters[call.adapter]
        trains = progress.trainable and not call.without_adapter
        reset = trains and progress.accumulated and self._zeroed_by_client(progress)
        if reset:
            progress.accumulated = False  # or another micro-batch in flight would reset them too
        try:
            found, norm = self.session.backward(
                gradient_BTD,
                call.request_id,
                need_input_gradient,
                reset_gradients=reset,
                penalty_gradient=penalty_gradient,
            )
        except BaseException:
            progress.accumulated = trains  # perhaps: so the next one asks to drop it
            raise
        if trains:
            progress.norm, progress.accumulated = norm, True
            self.proxy.grad = torch.full_like(self.proxy, norm)
        return found

    def step(self, optimizer: OptimizerSettings) -> None:
        """Steps the trunk's optimizer, if gradients were accumulated since the last step."""
        progress = self._now
        if not self.has_gradients:
            return
        assert self.proxy.grad is not None
        scale = float(self.proxy.grad) / progress.norm if progress.norm > 0 else 1.0
        self.session.step(progress.step, scale, optimizer, self._active)
        progress.step += 1
        progress.micro = 0
        progress.accumulated = False
        self.proxy.grad = None
        with torch.no_grad():
            self.proxy.zero_()  # it stands for nothing that an optimizer could move

    @property
    def has_gradients(self) -> bool:
        """Whether the trunk holds gradients that its next step would apply."""
        progress = self._now
        return self.trainable and progress.accumulated and not self._zeroed_by_client(progress)

    def restore_optimizer(self, state: Tensors, optimizer: OptimizerSettings, step: int) -> None:
        """Gives the trunk's optimizer the state it had after its step number ``step``."""
        self.session.restore_optimizer(state, optimizer, step, self._active)
        self._now.step = step + 1

    def restore(self, weights: Tensors, weight_digest: str = "", step: int | None = None) -> None:
        """Replaces the weights of the adapter in use, and its number of steps if given."""
        self.session.restore(weights, self._active, weight_digest, step)
        if step is not None:
            self._now.step = step + 1

    def add_adapter(self, name: str, peft_config_json: str, seed: int) -> None:
        """Adds a fresh adapter beside the session's own; with no configuration, a frozen trunk."""
        count = 0
        if peft_config_json:
            count = self.session.add_adapter(name, peft_config_json, seed)
        self._adapters[name] = _Progress(count > 0)

    def use_adapter(self, name: str) -> None:
        """Runs with this adapter from now on."""
        self._active = name
        self.proxy.requires_grad_(self.trainable)

    def remove_adapter(self, name: str) -> None:
        """Frees an adapter."""
        if self._adapters.pop(name).trainable:
            self.session.remove_adapter(name)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Repeats this thread's last training forward: in float32, with the same dropout."""
        self._here.exact = True
        try:
            yield
        finally:
            self._here.exact = False

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Runs the trunk's blocks as they are."""
        before, self._without_adapter = self._without_adapter, True
        try:
            yield
        finally:
            self._without_adapter = before

    def release(self, request_id: str = "", cache_id: str = "") -> None:
        """Notes state that will not be asked for again; the next call tells the trunk.

        Finalizers call this, perhaps in the middle of a send of this very thread, so it must not
        send itself.
        """
        self._dropped.append((request_id, cache_id))

    def close(self) -> None:
        """Ends the session."""
        self.session.close()

    @property
    def _now(self) -> _Progress:
        return self._adapters[self._active]

    def _call(
        self,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        training: bool,
    ) -> ForwardCall:
        # One that is frozen on the trunk has no name there.
        bare = self._without_adapter or (self._active != "" and not self._now.trainable)
        return ForwardCall(
            attention_mask,
            position_ids,
            training=training,
            step=self._now.step,
            micro=self._here.micro if self._here.exact else 0,
            in_float32=self._here.exact,
            adapter="" if bare else self._active,
            without_adapter=bare,
        )

    def _run_cut(
        self, turn: Turn, hidden_BTD: torch.Tensor, call: ForwardCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a forward whose backward the pipeline asks for, where it has collected gradients."""
        output_BTD = self._ask(hidden_BTD, call).requires_grad_(True)
        penalty = torch.zeros(()) if self.penalty is None else self.penalty.total
        held = _HeldForward(self, call.request_id)
        turn.cuts.append(Cut(hidden_BTD, output_BTD, penalty.requires_grad_(True), call, held))
        return output_BTD, penalty

    def _ask(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> torch.Tensor:
        reply = self.session.forward(hidden_BTD.detach(), call)
        total = torch.tensor(reply.penalty, dtype=torch.float32, device=hidden_BTD.device)
        self.penalty = Penalty(total, reply.penalty_terms) if reply.penalty_terms else None
        return reply.hidden_BTD

    def _release_dropped(self) -> None:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if not dropped:
            return
        requests, caches = zip(*dropped, strict=True)
        try:
            self.session.release([r for r in requests if r], [c for c in caches if c])
        except TrunkUnavailableError:
            return  # the session is gone, and its state with it

    def _zeroed_by_client(self, progress: _Progress) -> bool:
        gradient = self.proxy.grad
        return gradient is None or (progress.norm > 0 and float(gradient) == 0.0)


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output_BTD = trunk._ask(hidden_BTD, call)
        ctx.trunk, ctx.call = trunk, call
        ctx.held = _HeldForward(trunk, call.request_id)
        penalty = trunk.penalty
        return output_BTD, torch.zeros(()) if penalty is None else penalty.total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, gradient_BTD: torch.Tensor, penalty_gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        found = ctx.trunk.backward(
            gradient_BTD.contiguous(), ctx.call, ctx.needs_input_grad[0], float(penalty_gradient)
        )
        ctx.held.release.detach()
        return found, None, None, None
