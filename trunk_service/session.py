"""One tenant's session: its adapters as it sent them, and the state of its open requests.

Nothing here is thread-safe: the scheduler runs the calls of one session one after another.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from transformers import DynamicCache

from shared.errors import (
    ProtocolError,
    ResourceExhaustedError,
    SharedWeightsError,
    TensorError,
    UnknownRequestError,
)
from shared.wire.formats import pack, pack_value
from trunk_service.block_range import cache_of_blocks
from trunk_service.budget import ByteBudget
from trunk_service.caches import KeyValueCaches
from trunk_service.client_state import ClientState
from trunk_service.held import HeldRequest, HeldRequests
from trunk_service.limits import Limits
from trunk_service.packed_rows import PackedRows
from trunk_service.quotas import TenantQuota
from trunk_service.requests import (
    BackwardAnswer,
    BackwardRequest,
    FetchRequest,
    ForwardAnswer,
    ForwardRequest,
    HeldMode,
    OpenRequest,
)
from trunk_service.room import Room
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
    """

    def __init__(
        self, trunk: Trunk, request: OpenRequest, limits: Limits, quota: TenantQuota
    ) -> None:
        trunk.check(request)
        self._trunk, self._limits = trunk, limits
        self.budget = ByteBudget(limits.session_held_bytes, "session's held-state", quota.budget)
        self.held = HeldRequests(limits.held_lease_s)
        self.caches = KeyValueCaches(trunk.config, trunk.info.dtype.itemsize, self.budget)
        self.client = ClientState(trunk, limits, self.budget, quota)

    @property
    def linear_modules(self) -> list[str]:
        """Full names of the blocks' modules that are torch's ``Linear``."""
        return self._trunk.linear_modules()

    def forward(self, request: ForwardRequest) -> ForwardAnswer:
        """Carries hidden states through the trunk.

        Raises:
            TensorError: If a tensor is not acceptable.
            ReusedRequestError: If another forward is held under the request id; the same one again
                is given the same answer.
            ProtocolError: If the request asks for a graph and a cache at once.
            StaleStateError: If it means another version of the client's adapters than is here.
            AdapterError: If the adapters that it brings are refused.
            ResourceExhaustedError: If the byte budget is spent.
        """
        if request.keep_graph and request.cache_id:
            raise ProtocolError("a forward keeps a graph or uses a cache, not both")
        if request.keep_graph and not request.request_id:
            raise ProtocolError("a forward that keeps a graph needs a request id")
        self.client.take(request.push, request.state_version)
        self._check(request)
        if request.keep_graph:
            return self._forward_held(request)
        # More than no_grad: small operations are a third of a token's time, and autograd's
        # bookkeeping a part of each. What it makes no graph can use, caches included. But there
        # attention's own dropout is one operation, whose draws cannot be keyed.
        with torch.no_grad() if request.training else torch.inference_mode():
            return self.answer(request, self._run(request, self._input(request)))

    def joins(self, request: ForwardRequest) -> bool:
        """Whether a forward may be computed together with other sessions'; from any thread."""
        whole = request.push is None and request.blocks is None
        return whole and self.caches.can_pack and self.client.may_mix

    def begin_decoding(self, request: ForwardRequest) -> tuple[torch.Tensor, PackedRows] | None:
        """Makes a forward of one cached token ready to be computed together with others'.

        Returns:
            The hidden states [B, 1, D] and the cache's rows, with room for the token and all edits
            done; None if it has to be computed alone.

        Raises:
            TrunklineError: As :meth:`forward`; nothing was changed.
        """
        if not (self.joins(request) and self.client.mixes(request)):
            return None
        self.client.take(None, request.state_version)
        self._check(request)
        rows = self.caches.pack(request.cache_id, request.cache_edits, request.hidden_BTD.shape[0])
        return None if rows is None else (self._input(request), rows)

    def answer(self, request: ForwardRequest, output_BTD: torch.Tensor) -> ForwardAnswer:
        """The answer of a forward of which nothing is held."""
        return ForwardAnswer(pack(output_BTD, request.answer_format, False, to_host))

    def backward(self, request: BackwardRequest) -> BackwardAnswer:
        """Carries a gradient back through a held forward; what is found is the client's to keep.

        Raises:
            UnknownRequestError: If nothing is held under the id.
            TensorError: If the gradient is not acceptable; the forward stays held.
            ResourceExhaustedError: If the memory has no room; the forward stays held.
        """
        held = self.held.get(request.request_id)
        size, finite = self._trunk.info.hidden_size, self._limits.check_finite
        check_values("gradient", request.gradient_BTD, size, finite)
        if request.gradient_BTD.shape != held.input_BTD.shape:
            raise TensorError(
                f"gradient has shape {tuple(request.gradient_BTD.shape)}; the forward had "
                f"{tuple(held.input_BTD.shape)}"
            )
        wanted = _wanted(held, request)
        inputs = list(wanted.values())
        try:
            found = self._gradients(held, inputs, request)
        except OSError as error:
            if held.mode is not HeldMode.OFFLOADED:
                raise
            logger.warning("an offloaded graph is computed again: %s", error)
            held.give_up_graph()
            found = self._gradients(held, inputs, request)
        except BaseException:
            held.give_up_graph()
            raise
        if not request.keep_graph:
            self.held.drop(request.request_id)
        answer = None
        if request.need_input_gradient and found[0] is not None:
            answer = pack(found[0], request.answer_format, True, to_host)
        pairs = zip(wanted, found[1:], strict=True)
        how = request.value_format
        sent = {key: pack_value(g, how, to_host) for key, g in pairs if g is not None}
        return BackwardAnswer(
            answer,
            values={key: t for key, t in sent.items() if isinstance(key, str)},
            past={key: t for key, t in sent.items() if isinstance(key, int)},
        )

    def fetch(self, request: FetchRequest) -> dict[str, torch.Tensor]:
        """Base weights of the blocks by full name, and norms as ``rows/NAME``, ``columns/NAME``.

        Raises:
            SharedWeightsError: If there is none of a name, or it is a matrix and the host does not
                serve its weights.
        """
        trunk, vectors = self._trunk, self._trunk.vectors()
        norms = {f"rows/{name}": trunk.norms(name, False) for name in request.norm_rows}
        norms |= {f"columns/{name}": trunk.norms(name, True) for name in request.norm_columns}
        for name in (n for n in request.names if n not in vectors):
            if not self._limits.serve_weights:
                raise SharedWeightsError(
                    f"{name[:120]}: this trunk does not give its base matrices; its host would "
                    f"have to start it with --serve-weights"
                )
        names = request.names or (() if norms else vectors)
        given = {name: vectors.get(name) for name in names}
        found = {n: trunk.matrix(n) if vector is None else vector for n, vector in given.items()}
        return {name: to_host(tensor) for name, tensor in (found | norms).items()}

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees held forwards and caches; ids that hold nothing are ignored."""
        for request_id in request_ids:
            self.held.drop(request_id)
        for cache_id in cache_ids:
            self.caches.drop(cache_id)

    def close(self) -> None:
        """Frees everything the session holds."""
        self.held.drop_all()
        self.caches.drop_all()
        self.client.close()

    def _check(self, request: ForwardRequest) -> None:
        """Refuses a forward whose blocks, tensors or cache edits are not acceptable."""
        split, cached = self._trunk.info.split, 0
        if request.blocks and not split.start <= request.blocks[0] < request.blocks[1] <= split.end:
            raise ProtocolError(
                f"blocks {request.blocks[0]} to {request.blocks[1]}; accepted is a range within "
                f"{split}"
            )
        if request.cache_id:
            removes = any(edit.remove_tokens for edit in request.cache_edits)
            if (request.cached_tokens or removes) and request.cache_id not in self.caches:
                raise UnknownRequestError(f"no cache {request.cache_id[:120]!r} of this session")
            cached = self._cached_tokens(request)
            if cached and request.past:
                raise ProtocolError(f"past tensors for a cache of {cached} tokens; accepted: none")
            if request.cached_tokens not in (None, cached):
                raise ProtocolError(
                    f"cache {request.cache_id} has {cached} tokens, the client counts "
                    f"{request.cached_tokens}: a forward failed between; begin a new cache"
                )
        limits = self._limits
        most, finite = limits.max_tokens_per_request, limits.check_finite
        check_forward(request, self._trunk.info, most, cached, finite)

    def _forward_held(self, request: ForwardRequest) -> ForwardAnswer:
        if (same := self.held.same(request)) is not None:
            answer = pack(self._output_again(same), request.answer_format, False, to_host)
            return ForwardAnswer(answer, same.mode, same.room.reserved_bytes)
        boundary = request.hidden_BTD.nbytes + sum(t.nbytes for t in request.past)
        batch, tokens, _ = request.hidden_BTD.shape
        graph = self.client.footprint.graph_bytes(batch, tokens)
        if request.blocks:
            first, end = request.blocks
            graph = graph * (end - first) // self._trunk.config.num_hidden_layers
        room = Room(self.budget, graph, boundary, self._trunk.offload)
        try:
            input_BTD = self._input(request)
            request = replace(request, push=None, past=self._past(request, needs_grad=True))
            if room.keeps_graph:
                input_BTD.requires_grad_(True)
            shared = self.client.base_tensors()
            with torch.set_grad_enabled(room.keeps_graph), room.catch(shared):
                output_BTD = self._run(request, input_BTD)
            answer = pack(output_BTD, request.answer_format, False, to_host)
            room.settle()
        except BaseException:
            room.close()
            raise
        kept = output_BTD if room.keeps_graph else None
        held = self.held.add(request, input_BTD, kept, room, self.client.state)
        return ForwardAnswer(answer, held.mode, room.reserved_bytes)

    def _output_again(self, held: HeldRequest) -> torch.Tensor:
        if held.output_BTD is not None:
            return held.output_BTD
        with torch.no_grad(), self.client.at(held.state):
            return self._run(held.request, held.input_BTD)

    def _gradients(
        self, held: HeldRequest, leaves: list[torch.Tensor], request: BackwardRequest
    ) -> tuple[torch.Tensor | None, ...]:
        """With respect to the input, and to each of the leaves."""
        output_BTD = held.output_BTD
        if output_BTD is None:
            held.input_BTD.requires_grad_(True)
            with torch.enable_grad(), self.client.at(held.state):
                output_BTD = self._run(held.request, held.input_BTD)
        inputs = [held.input_BTD, *leaves]
        gradient_BTD = to_device(request.gradient_BTD, self._trunk.device, output_BTD.dtype)
        return torch.autograd.grad(
            output_BTD, inputs, gradient_BTD, retain_graph=request.keep_graph, allow_unused=True
        )

    def _run(self, request: ForwardRequest, input_BTD: torch.Tensor) -> torch.Tensor:
        run = self.client.run
        if not request.cache_id:
            return run(request, input_BTD, _filled(DynamicCache(), request.past))
        batch, tokens, _ = input_BTD.shape
        if tokens == 1 and (rows := self._packed(request)) is not None:
            output_BTD = run(request, input_BTD, rows.extended())
            rows.commit()
            return output_BTD
        cached = self._cached_tokens(request)
        if not cached:
            tokens += request.past_tokens  # a prefix is cached with the first tokens
        past = self.caches.open(request.cache_id, request.cache_edits, batch, tokens)
        filled = _filled(past, self._past(request))
        if request.blocks and filled is not None:
            first, end = (block - self._trunk.info.split.start for block in request.blocks)
            filled = cache_of_blocks(filled, first, end, cached + request.past_tokens)
        return run(request, input_BTD, filled)

    def _cached_tokens(self, request: ForwardRequest) -> int:
        """Tokens of the request's cache behind its edits, in the blocks that compute."""
        start = self._trunk.info.split.start
        blocks = range(*(block - start for block in request.blocks)) if request.blocks else None
        return self.caches.tokens(request.cache_id, request.cache_edits, blocks)

    def _packed(self, request: ForwardRequest) -> PackedRows | None:
        """The rows of a cache that is extended by one token and nothing else."""
        if request.cache_edits or request.blocks or not self.caches.can_pack:
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


def _wanted(held: HeldRequest, request: BackwardRequest) -> dict[str | int, torch.Tensor]:
    """The tensors whose gradients are asked for, by first name or by number of the past."""
    leaves = {name: leaf.tensor for name, leaf in held.state.leaves.items()}
    if unknown := [name for name in request.values if name not in leaves]:
        raise TensorError(f"the forward was computed without a value {unknown[0][:120]!r}")
    past = held.request.past
    if request.past and max(request.past) >= len(past):
        raise TensorError(f"the forward had {len(past)} past tensors, not {max(request.past)}")
    wanted: dict[str | int, torch.Tensor] = {number: past[number] for number in request.past}
    return wanted | {n: leaves[n] for n in request.values if leaves[n].requires_grad}


def _filled(cache: DynamicCache, past: tuple[torch.Tensor, ...]) -> DynamicCache | None:
    """A cache with keys and values put before everything; None if nothing needs one."""
    for index in range(len(past) // 2):
        cache.update(past[2 * index], past[2 * index + 1], index)
    return cache if past or cache.layers else None
