"""One adapter of a tenant: its own module tree around the shared weights, gradients, optimizer.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import Cache

from shared.adapters import adalora
from shared.adapters.adalora_state import (
    allocator_state,
    check_allocator_state,
    matrices,
    restore_allocator,
)
from shared.adapters.config import config_to_json
from shared.adapters.weights import Weights, adapter_weights, load_adapter_weights
from shared.errors import AdapterError, ProtocolError, StepConflictError
from shared.models.dropout import draws_dropout
from shared.seeding import keyed_generator
from trunk_service.budget import ByteBudget
from trunk_service.footprint import measure_footprint
from trunk_service.gradients import GradientSlots
from trunk_service.mixing import can_mix
from trunk_service.optimizer_state import read_state, write_state
from trunk_service.optimizers import OptimizerSpec, build_optimizer, update_settings
from trunk_service.requests import AdapterRequest, ForwardRequest, StepAnswer, StepRequest
from trunk_service.trunk import Trunk

_ALLOCATOR = "allocator/"


class TenantAdapter:
    """An adapter, or none, around the trunk's blocks.

    Args:
        trunk: The shared blocks.
        request: Which adapter; an empty configuration runs the blocks as they are.
        model: The tenant's own module tree, from :meth:`Trunk.new_model`.
        budget: The session's byte budget.
    """

    def __init__(
        self, trunk: Trunk, request: AdapterRequest, model: Any, budget: ByteBudget
    ) -> None:
        self._trunk, self._seed, self.budget = trunk, request.seed, budget
        self.model = model
        self.version = 0
        """Another number whenever its weights may have been written."""
        self._draws = draws_dropout(model)
        self._training: bool | None = None
        """The mode of all modules; None if some may be new."""
        info = trunk.info
        with keyed_generator("footprint", device=trunk.device):
            model.train()
            self.footprint = measure_footprint(model, info.hidden_size, info.dtype)
        self.gradients = GradientSlots()
        self._gradient_bytes = 0
        self._penalty: tuple[float, int] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self.committed = StepAnswer(0, 0.0)
        self.mixes = can_mix(model)
        """Whether its rows may be computed together with those of other adapters."""
        self.on_close: list[Callable[[TenantAdapter], None]] = []
        self._list_trainable()

    @property
    def config(self) -> Any:
        """The PEFT configuration; None without an adapter."""
        return self.model.peft_config["default"] if isinstance(self.model, PeftModel) else None

    @property
    def config_json(self) -> str:
        """The adapter's configuration as PEFT resolved it; empty without one."""
        return "" if self.config is None else config_to_json(self.config)

    @property
    def virtual_tokens(self) -> int:
        """Tokens of the prefix that prefix tuning puts before every block's keys and values."""
        config = self.config
        return int(config.num_virtual_tokens) if config and config.is_prompt_learning else 0

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable numbers."""
        return sum(p.numel() for p in self.parameters)

    def base_tensors(self) -> Iterator[torch.Tensor]:
        """Weights and buffers: what a graph refers to and does not hold."""
        yield from self.model.parameters()
        yield from self.model.buffers()

    def run(
        self, request: ForwardRequest, input_BTD: torch.Tensor, past: Cache | None
    ) -> torch.Tensor:
        """Runs the blocks on hidden states; keyed by step and micro where dropout draws."""
        if self._training is not request.training:
            self.model.train(request.training)  # visits every module: a token would feel it
            self._training = request.training
        draws = request.training and self._draws
        key = ("dropout", self._seed, request.step, request.micro, "trunk")
        device = self._trunk.device
        mask, positions = self._mask(request), _to(request.position_ids, device)
        model = self.model
        if self.virtual_tokens:
            # PeftModel.forward would move the positions that the client has moved already.
            model = self.model.base_model
            cached = 0 if past is None else int(past.get_seq_length())
            past, mask = self._with_prefix(past, mask, input_BTD, cached)
            if positions is None:
                seen = max(cached, self.virtual_tokens)
                positions = torch.arange(seen, seen + input_BTD.shape[1], device=device)[None]
        with keyed_generator(*key, device=device) if draws else contextlib.nullcontext():
            output: Any = model(
                inputs_embeds=input_BTD,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=request.cache_id != "",
            )
        hidden_BTD: torch.Tensor = output.last_hidden_state
        return hidden_BTD

    def penalty(self) -> tuple[float, int]:
        """AdaLoRA's unnormalised orthogonality term and its number of matrices; else zeros."""
        if self._penalty is None:
            tuner = adalora.tuner_of(self.model)
            with torch.no_grad():
                total, count = (0.0, 0) if tuner is None else adalora.penalty(tuner)
            self._penalty = float(total), count
        return self._penalty

    def assign_gradients(
        self, micro: int, found: list[torch.Tensor | None], penalty_gradient: float
    ) -> None:
        """Keeps a micro-batch's gradients, AdaLoRA's regularisation included."""
        tuner = adalora.tuner_of(self.model)
        if penalty_gradient and tuner is not None:
            with torch.enable_grad():
                total, _ = adalora.penalty(tuner)
                more = torch.autograd.grad(total, self.parameters, allow_unused=True)
            found = [_scaled_sum(a, b, penalty_gradient) for a, b in zip(found, more, strict=True)]
        self.gradients.assign(micro, found)

    def reserve_gradients(self, micro: int) -> int:
        """Reserves a slot's bytes; none if the micro-batch has one, which is then replaced."""
        if micro in self.gradients:
            return 0
        count: int = sum(p.nbytes for p in self.parameters)
        self.budget.reserve(count)
        self._gradient_bytes += count
        return count

    def give_back_gradients(self, count: int) -> None:
        """Gives a slot's reserved bytes back."""
        self.budget.release(count)
        self._gradient_bytes -= count

    def drop_gradients(self) -> None:
        """Drops what was accumulated since the last step."""
        self.gradients.clear()
        self.give_back_gradients(self._gradient_bytes)

    def step(self, request: StepRequest) -> bool:
        """Applies optimizer step ``committed + 1``; tells whether it was a new one.

        Raises:
            StepConflictError: If the number is neither that nor the committed one.
            OptimizerError: If the optimizer is not accepted; nothing was changed.
            AdapterError: If there is nothing to train.
            ProtocolError: If the gradient scale is no number.
        """
        committed = self.committed.committed_step
        if request.step == committed and committed > 0:
            return False
        if request.step != committed + 1:
            raise StepConflictError(
                f"step {request.step} was asked for, {committed} is committed: "
                f"accepted is {committed + 1}"
            )
        if not self.parameters:
            raise AdapterError("the trunk is frozen in this session: there is nothing to step")
        if not 0.0 <= request.gradient_scale < float("inf"):
            raise ProtocolError(f"gradient_scale {request.gradient_scale} is not a finite number")
        self._apply(request)
        return True

    def weights(self) -> Weights:
        """Copies the adapter's weights, by PEFT's names; empty without one."""
        return adapter_weights(self.model) if isinstance(self.model, PeftModel) else {}

    def accumulated(self) -> Weights:
        """Copies the gradients accumulated since the last step, by parameter name."""
        total = self.gradients.total() if len(self.gradients) else []
        return {
            n: g.cpu().clone() for n, g in zip(self.names, total, strict=False) if g is not None
        }

    def optimizer_state(self) -> Weights:
        """Copies the optimizer's state as ``NAME/KEY``; empty before the first step.

        AdaLoRA's allocation of ranks comes with it, as ``allocator/KEY/NAME``.
        """
        if self._optimizer is None:
            return {}
        state = read_state(self._optimizer, self.names)
        if (tuner := adalora.tuner_of(self.model)) is not None:
            allocation = allocator_state(tuner) | matrices(tuner)
            state |= {f"{_ALLOCATOR}{name}": tensor for name, tensor in allocation.items()}
        return state

    def restore(self, weights: Weights, state: Weights, spec: OptimizerSpec | None) -> None:
        """Replaces the adapter's weights, its optimizer's state, or both.

        Raises:
            AdapterError: If the weights or AdaLoRA's allocation do not fit; nothing was changed.
            OptimizerError: If the state does not fit the optimizer; nothing was changed.
        """
        if not isinstance(self.model, PeftModel):
            raise AdapterError("the trunk is frozen in this session: it has no adapter")
        restored = self._optimizer
        if state and spec is None:
            raise AdapterError("an optimizer's state was given without the optimizer")
        allocation = {n: t for n, t in state.items() if n.startswith(_ALLOCATOR)}
        state = {n: t for n, t in state.items() if n not in allocation}
        allocation = {n.removeprefix(_ALLOCATOR): t for n, t in allocation.items()}
        if allocation:
            check_allocator_state(self._tuner(), allocation)
        if any(name.startswith("matrix/") for name in allocation):
            weights = {}  # the same ones, cut to the ranks that were kept
        if spec is not None:
            restored = build_optimizer(spec, self.parameters)
            write_state(restored, self.names, state)
        if weights:
            before = self.parameters
            try:
                load_adapter_weights(self.model, weights)
            finally:
                self.version += 1
            self._penalty = self._training = None
            self._list_trainable()
            if any(a is not b for a, b in zip(before, self.parameters, strict=True)):
                # AdaLoRA builds its matrices anew in the ranks of the file.
                restored = None
        self._optimizer = restored
        if allocation:
            restore_allocator(self._tuner(), allocation)
            self.version += 1
            self._penalty = self._training = None

    def importance(self, update: bool, report: bool) -> Weights:
        """AdaLoRA: takes the last step's gradients into the scores, and answers them.

        Raises:
            AdapterError: If the adapter is not AdaLoRA, or there are no gradients of a step.
        """
        tuner = self._tuner()
        if update:
            if any(p.grad is None for p in self.parameters):
                raise AdapterError("importance is updated after a step: there was none")
            tuner.rankallocator.update_ipt(tuner.model)
        return adalora.importance(tuner) if report else {}

    def allocate(self, kept: Weights, last: bool) -> None:
        """AdaLoRA: zeroes the singular values that are not kept.

        Raises:
            AdapterError: If the adapter is not AdaLoRA, or what is kept does not fit it.
        """
        adalora.keep(self._tuner(), kept, last)
        self.version += 1
        self._training = None

    def close(self) -> None:
        """Drops gradients and optimizer."""
        while self.on_close:
            self.on_close.pop()(self)
        self.drop_gradients()
        self._optimizer = None

    def _tuner(self) -> Any:
        tuner = adalora.tuner_of(self.model)
        if tuner is None:
            raise AdapterError("ranks are allocated for AdaLoRA alone; this adapter is not AdaLoRA")
        return tuner

    def _list_trainable(self) -> None:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names = [name.replace(".default", "") for name, _ in named]
        self.parameters = [parameter for _, parameter in named]

    def _apply(self, request: StepRequest) -> None:
        if self._optimizer is None:
            self._optimizer = build_optimizer(request.optimizer, self.parameters)
        else:
            update_settings(self._optimizer, request.optimizer)
        norm = self.gradients.norm()
        total = self.gradients.total() or [None] * len(self.parameters)
        for parameter, gradient in zip(self.parameters, total, strict=True):
            if gradient is not None and request.gradient_scale != 1.0:
                gradient = gradient * request.gradient_scale
            parameter.grad = gradient
        try:
            self._optimizer.step()
        finally:
            self.version += 1
        if adalora.tuner_of(self.model) is None:  # whose importance is read off them afterwards
            self._optimizer.zero_grad(set_to_none=True)
        self.drop_gradients()
        self._penalty = None
        self.committed = StepAnswer(request.step, norm)

    def _mask(self, request: ForwardRequest) -> torch.Tensor | None:
        mask, info = request.attention_mask, self._trunk.info
        if mask is None:
            return None
        # An additive mask must have the dtype that attention is computed in.
        return mask.to(self._trunk.device, info.dtype if mask.is_floating_point() else mask.dtype)

    def _with_prefix(
        self,
        past: Cache | None,
        mask: torch.Tensor | None,
        input_BTD: torch.Tensor,
        cached: int,
    ) -> tuple[Cache, torch.Tensor | None]:
        """Puts the prefix before everything, as ``PeftModelForCausalLM`` does."""
        batch, virtual = input_BTD.shape[0], self.virtual_tokens
        if past is None:
            past = self.model.get_prompt(batch)
        elif not cached:
            prompt: Any = self.model.get_prompt(batch)
            for index, layer in enumerate(prompt.layers):
                past.update(layer.keys, layer.values, index)
        if mask is not None:
            if mask.ndim != 2:
                raise ProtocolError("prefix tuning takes masks [B, S] alone")
            seen = torch.ones(batch, virtual, dtype=mask.dtype, device=mask.device)
            mask = torch.cat([seen, mask], dim=1)
        return past, mask


def _scaled_sum(
    first: torch.Tensor | None, second: torch.Tensor | None, scale: float
) -> torch.Tensor | None:
    if second is None:
        return first
    return second * scale if first is None else first + second * scale


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
