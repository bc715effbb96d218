"""One tenant's session: its adapter, its optimizer and the state of its open requests.

Nothing here is thread-safe: the scheduler runs the calls of one session one after another.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from shared.adapters.config import config_to_json
from shared.adapters.weights import Weights, adapter_weights, load_adapter_weights
from shared.errors import (
    AdapterError,
    ProtocolError,
    ResourceExhaustedError,
    StepConflictError,
    TensorError,
)
from shared.models.dropout import draws_dropout
from shared.seeding import keyed_generator
from trunk_service.budget import ByteBudget
from trunk_service.caches import KeyValueCaches
from trunk_service.footprint import measure_footprint
from trunk_service.gradients import GradientSlots
from trunk_service.held import HeldRequest, HeldRequests
from trunk_service.limits import Limits
from trunk_service.optimizers import build_optimizer, update_settings
from trunk_service.requests import (
    BackwardAnswer,
    BackwardRequest,
    ForwardAnswer,
    ForwardRequest,
    OpenRequest,
    StepAnswer,
    StepRequest,
)
from trunk_service.trunk import Trunk
from trunk_service.validation import check_forward, check_values


@dataclass
class _Trainable:
    names: list[str]
    parameters: list[torch.nn.Parameter]


class TenantSession:
    """What one tenant holds on the trunk.

    Args:
        trunk: The shared blocks.
        request: The terms the tenant asked for.
        limits: What it may use.
        total_budget: Held bytes of all sessions.

    Raises:
        ModelMismatchError: If the tenant's model is another one.
        AdapterError: If its adapter is refused.
    """

    def __init__(
        self, trunk: Trunk, request: OpenRequest, limits: Limits, total_budget: ByteBudget
    ) -> None:
        trunk.check(request)
        self._trunk, self._terms, self._limits = trunk, request, limits
        self.model = trunk.new_model(request, limits)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self._trainable = _Trainable([n for n, _ in named], [p for _, p in named])
        self._draws = draws_dropout(self.model)
        info = trunk.info
        with keyed_generator("footprint", device=trunk.device):
            self.model.train()
            self.footprint = measure_footprint(self.model, info.hidden_size, info.dtype)
        self.budget = ByteBudget(limits.session_held_bytes, "session's held-state", total_budget)
        self.held = HeldRequests(self.budget, limits.held_lease_s)
        self.caches = KeyValueCaches(self.model.config, info.dtype.itemsize, self.budget)
        self.gradients = GradientSlots()
        self._gradient_bytes = 0
        self._optimizer: torch.optim.Optimizer | None = None
        self._committed = StepAnswer(0, 0.0)

    @property
    def trainable_parameters(self) -> int:
        """Number of the adapter's trainable numbers."""
        return sum(p.numel() for p in self._trainable.parameters)

    @property
    def committed_step(self) -> int:
        """Number of the last optimizer step that was applied; 0 before the first."""
        return self._committed.committed_step

    def forward(self, request: ForwardRequest) -> ForwardAnswer:
        """Carries hidden states through the trunk.

        Raises:
            TensorError: If a tensor is not acceptable.
            ReusedRequestError: If the request id was used since the last step.
            ProtocolError: If the request asks for a graph and a cache at once.
            ResourceExhaustedError: If the byte budget is spent.
        """
        if request.keep_graph and request.cache_id:
            raise ProtocolError("a forward keeps a graph or uses a cache, not both")
        if request.keep_graph and not request.request_id:
            raise ProtocolError("a forward that keeps a graph needs a request id")
        cached = self.caches.tokens(request.cache_id, request.cache_edits)
        check_forward(
            request,
            self._trunk.info,
            self._terms.wire_dtype,
            self._limits.max_tokens_per_request,
            cached if request.cache_id else 0,
        )
        if request.keep_graph:
            return self._forward_held(request)
        with torch.no_grad():
            return ForwardAnswer(self._to_wire(self._run(request, self._input(request))))

    def backward(self, request: BackwardRequest) -> BackwardAnswer:
        """Carries a gradient back through a held forward and keeps the adapter's gradient.

        Raises:
            UnknownRequestError: If nothing is held under the id.
            TensorError: If the gradient is not acceptable; the forward stays held.
            ResourceExhaustedError: If the byte budget has no room; the forward stays held.
        """
        held = self.held.get(request.request_id)
        check_values(
            "gradient",
            request.gradient_BTD,
            self._terms.wire_dtype,
            self._trunk.info.hidden_size,
        )
        if request.gradient_BTD.shape != held.input_BTD.shape:
            raise TensorError(
                f"gradient has shape {tuple(request.gradient_BTD.shape)}; the forward had "
                f"{tuple(held.input_BTD.shape)}"
            )
        if request.reset_gradients:
            self._drop_gradients()
        reserved = self._reserve_gradients(held.request.micro)
        try:
            input_gradient = self._backward_held(held, request)
        except BaseException:
            self._give_back_gradients(reserved)
            raise
        finally:
            self.held.drop(request.request_id)
        wanted = request.need_input_gradient and input_gradient is not None
        answer = self._to_wire(input_gradient) if wanted and input_gradient is not None else None
        return BackwardAnswer(answer, self.gradients.norm())

    def step(self, request: StepRequest) -> StepAnswer:
        """Applies optimizer step ``committed + 1``, or answers ``committed`` again.

        Raises:
            StepConflictError: If the number is neither.
            OptimizerError: If the optimizer is not accepted; nothing was changed.
            AdapterError: If the session has nothing to train.
        """
        committed = self._committed.committed_step
        if request.step == committed and committed > 0:
            return self._committed
        if request.step != committed + 1:
            raise StepConflictError(
                f"step {request.step} was asked for, {committed} is committed: "
                f"accepted is {committed + 1}"
            )
        if not self._trainable.parameters:
            raise AdapterError("the trunk is frozen in this session: there is nothing to step")
        if not 0.0 <= request.gradient_scale < float("inf"):
            raise ProtocolError(f"gradient_scale {request.gradient_scale} is not a finite number")
        self._apply(request)
        return self._committed

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees held forwards and caches; ids that hold nothing are ignored."""
        for request_id in request_ids:
            self.held.drop(request_id)
        for cache_id in cache_ids:
            self.caches.drop(cache_id)

    def adapter(self) -> Weights:
        """Copies the adapter's weights, by PEFT's names; empty for a frozen trunk."""
        return adapter_weights(self.model) if isinstance(self.model, PeftModel) else {}

    def adapter_config_json(self) -> str:
        """The adapter's configuration as PEFT resolved it; empty for a frozen trunk."""
        if not isinstance(self.model, PeftModel):
            return ""
        return config_to_json(self.model.peft_config["default"])

    def adapter_gradients(self) -> Weights:
        """Copies the gradients accumulated since the last step, by the adapter's names."""
        total = self.gradients.total() if len(self.gradients) else []
        names = (name.replace(".default.", ".") for name in self._trainable.names)
        return {n: g.cpu().clone() for n, g in zip(names, total, strict=False) if g is not None}

    def restore(self, weights: Weights) -> None:
        """Replaces the adapter's weights.

        Raises:
            AdapterError: If they do not fit; nothing was changed.
        """
        if not isinstance(self.model, PeftModel):
            raise AdapterError("the trunk is frozen in this session: it has no adapter")
        load_adapter_weights(self.model, weights)
        self.held.drop_all()  # what was computed with the old weights has no gradient any more

    def close(self) -> None:
        """Frees everything the session holds."""
        self.held.drop_all()
        self.caches.drop_all()
        self._drop_gradients()
        self._optimizer = None

    def _forward_held(self, request: ForwardRequest) -> ForwardAnswer:
        self.held.check_new(request.request_id)
        retain, reserved = self._reserve(request)
        try:
            input_BTD = self._input(request)
            if retain:
                input_BTD.requires_grad_(True)
            with torch.set_grad_enabled(retain):
                output_BTD = self._run(request, input_BTD)
        except BaseException:
            self.budget.release(reserved)
            raise
        held = self.held.add(request, input_BTD, output_BTD if retain else None, reserved)
        return ForwardAnswer(self._to_wire(output_BTD), held.mode, reserved)

    def _reserve(self, request: ForwardRequest) -> tuple[bool, int]:
        """Reserves the graph's bytes, or at least the boundary's; tells whether to retain."""
        batch, tokens, _ = request.hidden_BTD.shape
        boundary = request.hidden_BTD.nbytes
        graph = boundary + self.footprint.graph_bytes(batch, tokens)
        if self.budget.fits(graph):
            with contextlib.suppress(ResourceExhaustedError):  # another tenant may be faster
                self.budget.reserve(graph)
                return True, graph
        self.budget.reserve(boundary)
        return False, boundary

    def _backward_held(self, held: HeldRequest, request: BackwardRequest) -> torch.Tensor | None:
        output_BTD = held.output_BTD
        if output_BTD is None:
            held.input_BTD.requires_grad_(True)
            with torch.enable_grad():
                output_BTD = self._run(held.request, held.input_BTD)
        inputs = [held.input_BTD, *self._trainable.parameters]
        gradient_BTD = request.gradient_BTD.to(self._trunk.device, output_BTD.dtype)
        found = torch.autograd.grad(output_BTD, inputs, gradient_BTD, allow_unused=True)
        if self._trainable.parameters:
            self.gradients.assign(held.request.micro, list(found[1:]))
        return found[0]

    def _reserve_gradients(self, micro: int) -> int:
        """Reserves a slot's bytes; none if the micro-batch has one, which is then replaced."""
        if micro in self.gradients:
            return 0
        count = sum(p.nbytes for p in self._trainable.parameters)
        self.budget.reserve(count)
        self._gradient_bytes += count
        return count

    def _give_back_gradients(self, count: int) -> None:
        self.budget.release(count)
        self._gradient_bytes -= count

    def _drop_gradients(self) -> None:
        self.gradients.clear()
        self.budget.release(self._gradient_bytes)
        self._gradient_bytes = 0

    def _run(self, request: ForwardRequest, input_BTD: torch.Tensor) -> torch.Tensor:
        """Runs the blocks on hidden states; keyed by step and micro where dropout draws."""
        self.model.train(request.training)
        past = None
        if request.cache_id:
            batch, tokens, _ = input_BTD.shape
            past = self.caches.open(request.cache_id, request.cache_edits, batch, tokens)
        draws = request.training and self._draws
        key = ("dropout", self._terms.seed, request.step, request.micro, "trunk")
        device = self._trunk.device
        with keyed_generator(*key, device=device) if draws else contextlib.nullcontext():
            output: Any = self.model(
                inputs_embeds=input_BTD,
                attention_mask=self._mask(request),
                position_ids=_to(request.position_ids, device),
                past_key_values=past,
                use_cache=past is not None,
            )
        hidden_BTD: torch.Tensor = output.last_hidden_state
        return hidden_BTD

    def _apply(self, request: StepRequest) -> None:
        if self._optimizer is None:
            self._optimizer = build_optimizer(request.optimizer, self._trainable.parameters)
        else:
            update_settings(self._optimizer, request.optimizer)
        norm = self.gradients.norm()
        total = self.gradients.total() or [None] * len(self._trainable.parameters)
        for parameter, gradient in zip(self._trainable.parameters, total, strict=True):
            if gradient is not None and request.gradient_scale != 1.0:
                gradient = gradient * request.gradient_scale
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._drop_gradients()
        self.held.drop_all()  # what was computed with the old weights has no gradient any more
        self.held.forget_used()
        self._committed = StepAnswer(request.step, norm)

    def _input(self, request: ForwardRequest) -> torch.Tensor:
        return request.hidden_BTD.to(self._trunk.device, self._trunk.info.dtype)

    def _mask(self, request: ForwardRequest) -> torch.Tensor | None:
        mask, info = request.attention_mask, self._trunk.info
        if mask is None:
            return None
        # An additive mask must have the dtype that attention is computed in.
        return mask.to(self._trunk.device, info.dtype if mask.is_floating_point() else mask.dtype)

    def _to_wire(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", self._terms.wire_dtype)


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
