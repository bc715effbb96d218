"""The blocks with a client's own adapters: what makes them a function of what is sent.

Parameters, gradients and optimizer are the client's. Here are the values that it sent last, in a
module tree of its own, under a version number that every forward names.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache

from shared.adapters.state_push import StatePush
from shared.adapters.structure import Structure, draws
from shared.errors import AdapterError, ProtocolError, StaleStateError, TrunklineError
from trunk_service.adapter_build import TreeLimits
from trunk_service.block_range import blocks_alone
from trunk_service.budget import ByteBudget
from trunk_service.footprint import measure_footprint
from trunk_service.keyed_draws import KEY_BYTES, keyed_draws
from trunk_service.limits import Limits
from trunk_service.mixing import PlainLora, plain_lora
from trunk_service.quotas import TenantQuota
from trunk_service.requests import ForwardRequest
from trunk_service.tenant_tree import TenantTree, TreeState
from trunk_service.trunk import Trunk

_LONGEST = 300  # of what torch says, in characters


class ClientState:
    """One client's adapters in the blocks, as it sent them last.

    Args:
        trunk: The shared blocks.
        limits: What a tenant may use.
        budget: The session's byte budget.
        quota: What all sessions of the tenant may hold.
    """

    def __init__(
        self, trunk: Trunk, limits: Limits, budget: ByteBudget, quota: TenantQuota
    ) -> None:
        self._trunk, self._quota = trunk, quota
        self._limits = TreeLimits(
            limits.max_adapters_per_session, limits.max_adapter_rank, limits.max_adapter_parameters
        )
        self._own: TenantTree | None = None
        self._methods = limits.peft_methods
        self._attention = trunk.config._attn_implementation
        self._bytes = self._numbers = 0
        self._lora: PlainLora | None = None
        self._lora_is_known = False
        self.budget, self.on_close = budget, list[Callable[[], None]]()
        self.version = 0
        """Of the values that are here; 0 before any came."""

    @property
    def _tree(self) -> TenantTree:
        """What is computed with; there once a forward's version was taken."""
        assert self._own is not None
        return self._own

    @property
    def state(self) -> TreeState:
        """What a forward that is computed now is computed with."""
        return self._tree.state

    def base_tensors(self) -> Iterator[torch.Tensor]:
        """Weights and buffers: what a graph refers to and does not hold."""
        yield from self._tree.model.parameters()
        yield from self._tree.model.buffers()

    @property
    def lora(self) -> PlainLora | None:
        """What it adds to the blocks' layers, another object whenever that may have changed.

        None if it does more than that: then its rows cannot be computed beside others'.
        """
        if not self._lora_is_known:
            self._lora, self._lora_is_known = plain_lora(self._tree.state), True
        return self._lora

    @property
    def may_mix(self) -> bool:
        """False if it is known that its rows cannot; may be asked from any thread."""
        return self._own is not None and (self._lora is not None or not self._lora_is_known)

    def mixes(self, request: ForwardRequest) -> bool:
        """Whether a forward's rows may be computed beside those of others."""
        plain = request.attention in ("", self._attention) and request.autocast is None
        return plain and not request.adapter_names and self.lora is not None

    def take(self, push: StatePush | None, version: int) -> None:
        """Brings the adapters to the version that a forward means.

        Raises:
            StaleStateError: If what is here is another one; nothing was changed.
            AdapterError: If an adapter is refused, or the two sides' trees differ; as before.
            ResourceExhaustedError: If it is larger than what is left; as before.
        """
        if push is None or push.version == self.version:
            if version != self.version:
                raise StaleStateError(
                    f"the forward means version {version} of the client's adapters; here is "
                    f"{self.version}"
                )
            if self._own is None:  # bare blocks, which few clients ask for
                self._own = self._trunk.new_tree(self._limits)
                self._measure()
            return
        if push.version != version:
            raise ProtocolError(f"version {version} is meant, {push.version} was sent")
        if push.since and push.since != self.version:
            raise StaleStateError(
                f"a change of version {push.since} of the client's adapters; here is {self.version}"
            )
        self._check_methods(push)
        self._lora_is_known = False
        before = self._own
        state = None if before is None else before.state
        self._reserve(push)
        try:
            if state is None or _may_fail(state, self._tree.state):
                self._try()
        except BaseException:
            if before is not None and state is not None:
                before.restore(state)
            self._own = before
            self._account(before)
            raise
        self.version = push.version

    def run(
        self, request: ForwardRequest, input_BTD: torch.Tensor, past: Cache | None
    ) -> torch.Tensor:
        """Runs the blocks on hidden states [B, T, D].

        Raises:
            ProtocolError: If dropout draws, and the request has no key for it.
        """
        device, tree = self._trunk.device, self._tree
        tree.train(request.training)
        mask = request.attention_mask
        if mask is not None:
            # An additive mask must have the dtype that attention is computed in.
            dtype = self._trunk.info.dtype if mask.is_floating_point() else mask.dtype
            mask = mask.to(device, dtype)
        positions = request.position_ids
        tree.model.config._attn_implementation = request.attention or self._attention
        cast = torch.autocast(device.type, request.autocast, enabled=request.autocast is not None)
        keyed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if request.training and draws(Structure(layers=tree.state.layers)):
            keyed = keyed_draws(tree.model, request.dropout_key, device)
        alone = blocks_alone(tree.model, request.blocks)
        with tree.mixed(request.adapter_names), cast, keyed, alone:
            output: Any = tree.model(
                inputs_embeds=input_BTD,
                attention_mask=mask,
                position_ids=None if positions is None else positions.to(device),
                past_key_values=past,
                use_cache=request.cache_id != "",
            )
        hidden_BTD: torch.Tensor = output.last_hidden_state.to(input_BTD.dtype)
        return hidden_BTD

    @contextlib.contextmanager
    def at(self, state: TreeState) -> Iterator[None]:
        """Computes with earlier values, while it lasts."""
        now = self._tree.state
        self._tree.restore(state)
        try:
            yield
        finally:
            self._tree.restore(now)

    def close(self) -> None:
        """Frees the values."""
        while self.on_close:
            self.on_close.pop()()
        self._own, self.version = None, 0
        self._account(None)

    def _check_methods(self, push: StatePush) -> None:
        for spec in push.structure.adapters if push.structure else ():
            if self._methods and spec.peft_type not in self._methods:
                raise AdapterError(
                    f"this trunk does not accept {spec.peft_type[:80]}; accepted: "
                    f"{', '.join(self._methods)}"
                )

    def _reserve(self, push: StatePush) -> None:
        """Updates the tree, and counts it; on an error it is as it was."""
        before = self._own if push.since else None
        tree = before or self._trunk.new_tree(self._limits)
        state = None if before is None else before.state
        tree.update(push.structure, push.values, push.tensors)
        try:
            self._account(tree)
        except BaseException:
            if state is not None:
                tree.restore(state)
            raise
        self._own = tree

    def _account(self, tree: TenantTree | None) -> None:
        """Counts a tree in the place of the one before."""
        numbers = sum(tensor.numel() for tensor in tree.parameters) if tree else 0
        nbytes = tree.nbytes if tree else 0
        more, more_bytes = numbers - self._numbers, nbytes - self._bytes
        if more > 0:
            self._quota.reserve_parameters(more)
        try:
            if more_bytes > 0:
                self.budget.reserve(more_bytes)
        except BaseException:
            self._quota.release_parameters(max(0, more))
            raise
        self._quota.release_parameters(max(0, -more))
        self.budget.release(max(0, -more_bytes))
        self._numbers, self._bytes = numbers, nbytes

    def _try(self) -> None:
        """Computes with what was sent, before anything is answered for it.

        Raises:
            AdapterError: If that is not possible.
        """
        try:
            self._measure()
        except (TrunklineError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever torch says of dtypes, indices or devices
            why = f"{type(error).__name__}: {error}"[:_LONGEST]
            raise AdapterError(f"the blocks cannot be computed with this adapter: {why}") from None

    def _measure(self) -> None:
        info, model = self._trunk.info, self._tree.model
        self._tree.train(True)
        with keyed_draws(model, bytes(KEY_BYTES), self._trunk.device):
            self.footprint = measure_footprint(model, info.hidden_size, info.dtype)
        # Some methods move their values in a forward, which would move them here alone.
        self._tree.check_unwritten()


def _may_fail(before: TreeState, now: TreeState) -> bool:
    """Whether an update brought more than other numbers of what was computed with already."""
    if now.built is not before.built:
        return True
    pairs = ((before.leaves.get(name), leaf.tensor) for name, leaf in now.leaves.items())
    return any(
        old is None or old.tensor.dtype != new.dtype or not new.is_floating_point()
        for old, new in pairs
        if old is None or old.tensor is not new
    )
