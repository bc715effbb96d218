"""One tenant's session: its adapters and the state of its open requests.

Nothing here is thread-safe: the scheduler runs the calls of one session one after another.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import DynamicCache

from shared.errors import (
    AdapterError,
    ProtocolError,
    ResourceExhaustedError,
    SharedWeightsError,
    TensorError,
    UnknownRequestError,
)
from shared.wire.formats import Packed, WireFormat, pack
from trunk_service.adapter import TenantAdapter
from trunk_service.adapters import SessionAdapters
from trunk_service.budget import ByteBudget
from trunk_service.caches import KeyValueCaches
from trunk_service.client_state import ClientState
from trunk_service.held import HeldRequest, HeldRequests
from trunk_service.limits import Limits
from trunk_service.packed_rows import PackedRows
from trunk_service.quotas import TenantQuota
from trunk_service.requests import (
    AdapterRequest,
    BackwardAnswer,
    BackwardRequest,
    ForwardAnswer,
    ForwardRequest,
    HeldMode,
    OpenRequest,
    RestoreRequest,
    StepAnswer,
    StepRequest,
)
from trunk_service.room import Room
from trunk_service.tenant_tree import TreeState
from trunk_service.transfer import to_device, to_host
from trunk_service.trunk import Trunk
from trunk_service.validation import check_forward, check_values

logger = logging.getLogger(__name__)


class TenantSession:
    """What one tenant holds on the trunk.

    Args:
        trunk: The shared blocks.
        request: The terms the tenant asked for.
        limits: What it may use.
        quota: What all sessions of the tenant may hold.

    Raises:
        ModelMismatchError: If the tenant's model is another one.
        AdapterError: If its adapter is refused.
    """

    def __init__(
        self, trunk: Trunk, request: OpenRequest, limits: Limits, quota: TenantQuota
    ) -> None:
        trunk.check(request)
        self._trunk, self._terms, self._limits = trunk, request, limits
        self.budget = ByteBudget(limits.session_held_bytes, "session's held-state", quota.budget)
        self.adapters = SessionAdapters(trunk, limits, self.budget, quota, request.dropout)
        self.held = HeldRequests(limits.held_lease_s)
        self.caches = KeyValueCaches(trunk.config, trunk.info.dtype.itemsize, self.budget)
        self._client: ClientState | None = None
        """The client's own adapters, once it sent any."""
        self._quota = quota
        # Last: what it reserves is given back by close() alone.
        self.adapters.add(AdapterRequest("", request.peft_config_json, request.seed))

    @property
    def trainable_parameters(self) -> int:
        """Of the session's own adapter; 0 when it was removed."""
        own = dict(self.adapters.items()).get("")
        return 0 if own is None else own.trainable_parameters

    @property
    def linear_modules(self) -> list[str]:
        """Full names of the blocks' modules that are torch's ``Linear``."""
        return self._trunk.linear_modules()

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients wait for their step."""
        return any(len(adapter.gradients) for adapter in self.adapters)

    def forward(self, request: ForwardRequest) -> ForwardAnswer:
        """Carries hidden states through the trunk.

        Raises:
            TensorError: If a tensor is not acceptable.
            ReusedRequestError: If the request id was used since the last step, unless it is the
                same forward again and still held: that is given the same answer.
            ProtocolError: If the request asks for a graph and a cache at once.
            AdapterError: If the session has no such adapter.
            ResourceExhaustedError: If the byte budget is spent.
        """
        if request.keep_graph and request.cache_id:
            raise ProtocolError("a forward keeps a graph or uses a cache, not both")
        if request.keep_graph and not request.request_id:
            raise ProtocolError("a forward that keeps a graph needs a request id")
        adapter = self._checked(request)
        if request.keep_graph:
            answer = self._forward_held(adapter, request)
        else:
            # More than no_grad: small operations are a third of a token's time, and autograd's
            # bookkeeping a part of each. What it makes no graph can use, caches included.
            with torch.inference_mode():
                output_BTD = self._run(adapter, request, self._input(request))
                answer = ForwardAnswer(self._to_wire(output_BTD, request.answer_format))
        penalty, terms = adapter.penalty()
        return replace(answer, penalty=penalty, penalty_terms=terms)

    def joins(self, adapter: str, without_adapter: bool) -> bool:
        """Whether forwards with this adapter may be computed together with other sessions'."""
        known = None if without_adapter else dict(self.adapters.items()).get(adapter)
        return self.caches.can_pack and (without_adapter or (known is not None and known.mixes))

    def begin_decoding(
        self, request: ForwardRequest
    ) -> tuple[TenantAdapter, torch.Tensor, PackedRows] | None:
        """Makes a forward of one cached token ready to be computed together with others'.

        Returns:
            The adapter, the hidden states [B, 1, D] and the cache's rows, with room for the token
            and all edits done; None if it has to be computed alone.

        Raises:
            TrunklineError: As :meth:`forward`; nothing was changed.
        """
        if request.state_version or not self.joins(request.adapter, request.without_adapter):
            return None
        adapter = self._checked(request)
        assert isinstance(adapter, TenantAdapter)
        rows = self.caches.pack(request.cache_id, request.cache_edits, request.hidden_BTD.shape[0])
        return None if rows is None else (adapter, self._input(request), rows)

    def end_decoding(self, request: ForwardRequest, output_BTD: torch.Tensor) -> ForwardAnswer:
        """The answer of a forward that was computed together with others'."""
        return ForwardAnswer(self._to_wire(output_BTD, request.answer_format))

    def backward(self, request: BackwardRequest) -> BackwardAnswer:
        """Carries a gradient back through a held forward and keeps the adapter's gradient.

        Raises:
            UnknownRequestError: If nothing is held under the id.
            TensorError: If the gradient is not acceptable; the forward stays held.
            ResourceExhaustedError: If the byte budget or the memory has no room; the forward
                stays held.
        """
        held = self.held.get(request.request_id)
        check_values("gradient", request.gradient_BTD, self._trunk.info.hidden_size)
        if request.gradient_BTD.shape != held.input_BTD.shape:
            raise TensorError(
                f"gradient has shape {tuple(request.gradient_BTD.shape)}; the forward had "
                f"{tuple(held.input_BTD.shape)}"
            )
        if not abs(request.penalty_gradient) < float("inf"):
            raise TensorError(f"penalty_gradient {request.penalty_gradient} is not finite")
        if held.state is not None:
            return self._backward_of_client(held, held.state, request)
        adapter = self.adapters.get(held.request.adapter)
        if held.request.without_adapter:
            adapter = self.adapters.bare()
        if request.reset_gradients:
            adapter.drop_gradients()
        reserved = adapter.reserve_gradients(held.request.micro)
        try:
            input_gradient = self._backward_held(adapter, held, request)
        except BaseException:
            adapter.give_back_gradients(reserved)
            held.give_up_graph()
            raise
        self.held.drop(request.request_id)
        wanted = request.need_input_gradient and input_gradient is not None
        answer = None
        if wanted and input_gradient is not None:
            answer = self._to_wire(input_gradient, request.answer_format, is_gradient=True)
        return BackwardAnswer(answer, adapter.gradients.norm())

    def _backward_of_client(
        self, held: HeldRequest, state: TreeState, request: BackwardRequest
    ) -> BackwardAnswer:
        """Carries a gradient back; what is found for the client's values is its own to keep."""
        leaves = {name: leaf.tensor for name, leaf in state.leaves.items()}
        if unknown := [name for name in request.values if name not in leaves]:
            raise TensorError(f"the forward was computed without a value {unknown[0][:120]!r}")
        past = held.request.past
        if request.past and max(request.past) >= len(past):
            raise TensorError(f"the forward had {len(past)} past tensors, not {max(request.past)}")
        wanted: dict[str | int, torch.Tensor] = {number: past[number] for number in request.past}
        wanted |= {n: leaves[n] for n in request.values if leaves[n].requires_grad}
        inputs = list(wanted.values())
        try:
            found = self._client_gradients(held, state, inputs, request)
        except OSError as error:
            if held.mode is not HeldMode.OFFLOADED:
                raise
            logger.warning("an offloaded graph is computed again: %s", error)
            held.give_up_graph()
            found = self._client_gradients(held, state, inputs, request)
        except BaseException:
            held.give_up_graph()
            raise
        if not request.keep_graph:
            self.held.drop(request.request_id)
        hidden_BTD = found[0] if request.need_input_gradient else None
        answer = None
        if hidden_BTD is not None:
            answer = self._to_wire(hidden_BTD, request.answer_format, is_gradient=True)
        pairs = zip(wanted, found[1:], strict=True)
        sent = {key: to_host(gradient) for key, gradient in pairs if gradient is not None}
        return BackwardAnswer(
            answer,
            values={key: t for key, t in sent.items() if isinstance(key, str)},
            past={key: t for key, t in sent.items() if isinstance(key, int)},
        )

    def _client_gradients(
        self,
        held: HeldRequest,
        state: TreeState,
        leaves: list[torch.Tensor],
        request: BackwardRequest,
    ) -> tuple[torch.Tensor | None, ...]:
        output_BTD, client = held.output_BTD, self._client
        assert client is not None
        if output_BTD is None:
            held.input_BTD.requires_grad_(True)
            with torch.enable_grad(), client.at(state):
                output_BTD = self._run(client, held.request, held.input_BTD)
        inputs = [held.input_BTD, *leaves]
        gradient_BTD = to_device(request.gradient_BTD, self._trunk.device, output_BTD.dtype)
        return torch.autograd.grad(
            output_BTD, inputs, gradient_BTD, retain_graph=request.keep_graph, allow_unused=True
        )

    def fetch(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Base weights of the blocks by full name; all vectors if none is named.

        Raises:
            SharedWeightsError: If there is none of a name, or it is a matrix and the host does not
                serve its weights.
        """
        vectors = self._trunk.vectors()
        for name in (n for n in names if n not in vectors):
            if not self._limits.serve_weights:
                raise SharedWeightsError(
                    f"{name[:120]}: this trunk does not give its base matrices; its host would "
                    f"have to start it with --serve-weights"
                )
        given = {name: vectors.get(name) for name in names or vectors}
        return {
            name: to_host(self._trunk.matrix(name) if vector is None else vector)
            for name, vector in given.items()
        }

    def step(self, request: StepRequest) -> StepAnswer:
        """Applies optimizer step ``committed + 1``, or answers ``committed`` again.

        Raises:
            StepConflictError: If the number is neither.
            OptimizerError: If the optimizer is not accepted; nothing was changed.
            AdapterError: If there is nothing to train.
        """
        adapter = self.adapters.get(request.adapter)
        if adapter.step(request):
            # What was computed with the old weights has no gradient any more.
            self.held.drop_of(request.adapter)
            self.held.forget_used()
        return adapter.committed

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees held forwards and caches; ids that hold nothing are ignored."""
        for request_id in request_ids:
            self.held.drop(request_id)
        for cache_id in cache_ids:
            self.caches.drop(cache_id)

    def restore(self, request: RestoreRequest) -> None:
        """Replaces an adapter's weights, its optimizer's state and its step number.

        Raises:
            AdapterError: If they do not fit, or belong to other trunk weights; nothing was changed.
            OptimizerError: If the optimizer's state does not fit; nothing was changed.
        """
        served = self._trunk.info.weight_digest
        if request.weight_digest and request.weight_digest != served:
            raise AdapterError(
                f"the adapter was trained on trunk weights {request.weight_digest[:16]}…, this "
                f"trunk serves {served[:16]}…"
            )
        adapter = self.adapters.get(request.adapter)
        adapter.restore(request.weights, request.optimizer_state, request.optimizer)
        if request.weights or request.optimizer_state:  # AdaLoRA's has matrices in it
            self.held.drop_of(request.adapter)
        if request.committed_step is not None:
            adapter.committed = StepAnswer(request.committed_step, 0.0)

    def remove_adapter(self, name: str) -> None:
        """Frees an adapter and what is held of it.

        Raises:
            AdapterError: If there is none of this name.
        """
        self.adapters.remove(name)
        self.held.drop_of(name)

    def close(self) -> None:
        """Frees everything the session holds."""
        self.held.drop_all()
        self.caches.drop_all()
        self.adapters.close()
        if self._client is not None:
            self._client.close()

    def _checked(self, request: ForwardRequest) -> TenantAdapter | ClientState:
        """The adapter of a forward whose tensors and edits are acceptable."""
        adapter = self._adapter_of(request)
        cached = 0
        if request.cache_id:
            cached = self.caches.tokens(request.cache_id, request.cache_edits)
            cached = max(0, cached - adapter.virtual_tokens)
            if cached and request.past:
                raise ProtocolError(f"past tensors for a cache of {cached} tokens; accepted: none")
            if request.cached_tokens and not cached and request.state_version:
                raise UnknownRequestError(f"no cache {request.cache_id[:120]!r} of this session")
            if request.cached_tokens not in (None, cached):
                raise ProtocolError(
                    f"cache {request.cache_id} has {cached} tokens, the client counts "
                    f"{request.cached_tokens}: a forward failed between; begin a new cache"
                )
        check_forward(
            request,
            self._trunk.info,
            self._limits.max_tokens_per_request,
            cached,
            adapter.virtual_tokens,
        )
        return adapter

    def _adapter_of(self, request: ForwardRequest) -> TenantAdapter | ClientState:
        if request.state_version:
            return self._client_at(request)
        return (
            self.adapters.bare() if request.without_adapter else self.adapters.get(request.adapter)
        )

    def _client_at(self, request: ForwardRequest) -> ClientState:
        """The client's adapters, brought to the version that a forward means."""
        client = self._client
        if client is None:
            client = ClientState(self._trunk, self._limits, self.budget, self._quota)
        client.take(request.push, request.state_version)
        self._client = client
        return client

    def _forward_held(
        self, adapter: TenantAdapter | ClientState, request: ForwardRequest
    ) -> ForwardAnswer:
        if (same := self.held.same(request)) is not None:
            output_BTD = self._output_again(adapter, same)
            answer = self._to_wire(output_BTD, request.answer_format)
            return ForwardAnswer(answer, same.mode, same.room.reserved_bytes)
        self.held.check_new(request.request_id)
        boundary = request.hidden_BTD.nbytes + sum(t.nbytes for t in request.past)
        batch, tokens, _ = request.hidden_BTD.shape
        graph = adapter.footprint.graph_bytes(batch, tokens)
        room = Room(self.budget, graph, boundary, self._trunk.offload)
        try:
            input_BTD = self._input(request)
            request = replace(request, push=None, past=self._past(request, needs_grad=True))
            if room.keeps_graph:
                input_BTD.requires_grad_(True)
            with torch.set_grad_enabled(room.keeps_graph), room.catch(adapter.base_tensors()):
                output_BTD = self._run(adapter, request, input_BTD)
            answer = self._to_wire(output_BTD, request.answer_format)
            room.settle()
        except BaseException:
            room.close()
            raise
        state = adapter.state if isinstance(adapter, ClientState) else None
        kept = output_BTD if room.keeps_graph else None
        held = self.held.add(request, input_BTD, kept, room, state)
        return ForwardAnswer(answer, held.mode, room.reserved_bytes)

    def _output_again(
        self, adapter: TenantAdapter | ClientState, held: HeldRequest
    ) -> torch.Tensor:
        if held.output_BTD is not None:
            return held.output_BTD
        with torch.no_grad():
            return self._run(adapter, held.request, held.input_BTD)

    def _backward_held(
        self, adapter: TenantAdapter, held: HeldRequest, request: BackwardRequest
    ) -> torch.Tensor | None:
        try:
            found = self._gradients(adapter, held, request)
        except OSError as error:
            if held.mode is not HeldMode.OFFLOADED:
                raise
            logger.warning("an offloaded graph is computed again: %s", error)
            held.give_up_graph()
            found = self._gradients(adapter, held, request)
        if adapter.parameters:
            micro = held.request.micro
            adapter.assign_gradients(micro, list(found[1:]), request.penalty_gradient)
        return found[0]

    def _gradients(
        self, adapter: TenantAdapter, held: HeldRequest, request: BackwardRequest
    ) -> tuple[torch.Tensor | None, ...]:
        """With respect to the input, and to each of the adapter's parameters."""
        output_BTD = held.output_BTD
        if output_BTD is None:
            held.input_BTD.requires_grad_(True)
            with torch.enable_grad():
                output_BTD = self._run(adapter, held.request, held.input_BTD)
        inputs = [held.input_BTD, *adapter.parameters]
        gradient_BTD = to_device(request.gradient_BTD, self._trunk.device, output_BTD.dtype)
        return torch.autograd.grad(output_BTD, inputs, gradient_BTD, allow_unused=True)

    def _run(
        self, adapter: TenantAdapter | ClientState, request: ForwardRequest, input_BTD: torch.Tensor
    ) -> torch.Tensor:
        if not request.cache_id:
            return adapter.run(request, input_BTD, _filled(DynamicCache(), request.past))
        batch, tokens, _ = input_BTD.shape
        if tokens == 1 and (rows := self._packed(request)) is not None:
            output_BTD = adapter.run(request, input_BTD, rows.extended())
            rows.commit()
            return output_BTD
        if not self.caches.tokens(request.cache_id, request.cache_edits):
            # The prefix is cached with the first tokens.
            tokens += adapter.virtual_tokens + request.past_tokens
        past = self.caches.open(request.cache_id, request.cache_edits, batch, tokens)
        return adapter.run(request, input_BTD, _filled(past, self._past(request)))

    def _packed(self, request: ForwardRequest) -> PackedRows | None:
        """The rows of a cache that is extended by one token and nothing else."""
        if request.cache_edits or not self.caches.can_pack:
            return None
        try:
            return self.caches.pack(request.cache_id, [], request.hidden_BTD.shape[0])
        except ResourceExhaustedError:
            return None  # there may be room for the token, if not for more

    def _past(self, request: ForwardRequest, needs_grad: bool = False) -> tuple[torch.Tensor, ...]:
        """Keys and values before the first token, where the blocks are."""
        device, dtype = self._trunk.device, self._trunk.info.dtype
        moved = (to_device(tensor, device, dtype) for tensor in request.past)
        return tuple(tensor.requires_grad_(needs_grad) for tensor in moved)

    def _input(self, request: ForwardRequest) -> torch.Tensor:
        return to_device(request.hidden_BTD, self._trunk.device, self._trunk.info.dtype)

    def _to_wire(
        self, tensor: torch.Tensor, wire_format: WireFormat | None, is_gradient: bool = False
    ) -> Packed:
        return pack(tensor, wire_format or self._terms.wire_format, is_gradient, to_host)


def _filled(cache: DynamicCache, past: tuple[torch.Tensor, ...]) -> DynamicCache | None:
    """A cache with keys and values put before everything; None if nothing needs one."""
    for index in range(len(past) // 2):
        cache.update(past[2 * index], past[2 * index + 1], index)
    return cache if past or cache.layers else None
