"""The trunk's blocks as a differentiable function of hidden states and adapter tensors.

Every request is idempotent. What a trunk has lost it is sent again: the adapters, if it has others;
a forward that waits for its backward, with the values that it was computed with.

Dimension letters: B batch, T tokens, D model dimension.
"""

from __future__ import annotations

import collections
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from client_service.calls import ForwardCall
from client_service.sent_state import SentState, same_numbers
from client_service.session import TrunkSession
from client_service.turns import others_compute
from shared.adapters.state_push import StatePush
from shared.adapters.structure import Structure, Value
from shared.errors import (
    AdapterError,
    SharedWeightsError,
    StaleStateError,
    TrunkUnavailableError,
    UnknownRequestError,
)
from shared.models import open_checkpoint
from shared.wire.formats import WireFormat

_ATTEMPTS = 3

Adapters = tuple[Structure, Sequence[tuple[Value, torch.Tensor]]]
"""The adapters in the trunk's blocks as they are now, and their tensors."""


_Push = tuple[int, StatePush | None]
"""The version that a forward means, and what to send for it."""


@dataclass(frozen=True)
class Computed:
    """What a forward was computed with, to be computed again if the trunk loses it."""

    hidden_BTD: torch.Tensor
    call: ForwardCall
    structure: Structure
    values: tuple[Value, ...]
    numbers: tuple[torch.Tensor, ...]

    def with_same_adapters(self, other: Computed | None) -> bool:
        """Whether another forward was computed with the very same values."""
        if other is None or self.structure != other.structure or self.values != other.values:
            return False
        return all(a is b for a, b in zip(self.numbers, other.numbers, strict=True))


class History(Protocol):
    """A cache of the trunk's, as what it is filled from."""

    cache_id: str
    history: list[Computed]

    def renew(self) -> None:
        """Takes another id."""


class TrunkFunction:
    """A session, and what its trunk has of the client's adapters. Threads may share one.

    Args:
        session: An open session.
        base: Vectors of the trunk's own blocks, by name.
        dtype: What the trunk computes in.
        copy: A checkpoint that has the trunk's blocks too, under the trunk's own digest.
    """

    def __init__(
        self,
        session: TrunkSession,
        base: dict[str, torch.Tensor],
        dtype: torch.dtype,
        copy: str = "",
    ) -> None:
        self.session, self.dtype, self._copy = session, dtype, copy
        self._base = base
        self._lock, self._here = threading.Lock(), threading.local()
        self._sent = SentState(base)
        self._dropped: collections.deque[tuple[str, str]] = collections.deque()
        # Not here and now: a finalizer may run in the middle of a send.
        end = threading.Thread(target=session.close, name="end-session", daemon=True)
        self._end = weakref.finalize(self, end.start)
        self._end.atexit = False

    def __getstate__(self) -> tuple[Any, ...]:
        """A copy has a session of its own."""
        return self.session, self._base, self.dtype, self._copy

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def held(self) -> str:
        """How the trunk holds its matrices; empty for float32."""
        dtype = "" if self.dtype == torch.float32 else str(self.dtype).removeprefix("torch.")
        return self.session.info.quantization or dtype

    def fetch(self, name: str, norms: str = "") -> torch.Tensor:
        """Reads a base matrix of the trunk's blocks, or the norms of its ``rows`` or ``columns``.

        Raises:
            SharedWeightsError: If there is no copy here, and the host does not give it.
        """
        if norms:
            return self.session.fetch_norms(name, norms)
        if kind := self.session.info.quantization:
            raise SharedWeightsError(
                f"{name}: a matrix of a trunk in {kind} is not read, since PEFT makes something "
                f"else of a whole model's quantised one: accepted are adapters that begin without"
            )
        if self._copy:
            return open_checkpoint(self._copy).read(name).to(self.dtype)
        tensors, _ = self.session.fetch([name])
        return tensors[name]

    def __call__(
        self,
        hidden_BTD: torch.Tensor,
        call: ForwardCall,
        adapters: Adapters,
        noted: Callable[[Computed], None] = lambda computed: None,
    ) -> torch.Tensor:
        """Carries hidden states [B, T, D] through the trunk, differentiably where needed.

        Args:
            hidden_BTD: What it is given.
            call: What goes with it.
            adapters: As they are.
            noted: Told what it was computed with.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        if torch._C._functorch.maybe_current_level() is not None:
            raise AdapterError(
                "transforms of torch.func do not pass the trunk: accepted are backward() and "
                "torch.autograd.grad()"
            )
        self._release_dropped()
        _, tensors = adapters
        wanted = any(t.requires_grad for t in (hidden_BTD, *call.past))
        wanted = wanted or any(value.requires_grad for value, _ in tensors)
        if not (torch.is_grad_enabled() and wanted):
            output_BTD, computed = self.forward_noted(hidden_BTD, call, lambda: adapters)
            noted(computed)
            return output_BTD
        call = replace(call, request_id=uuid.uuid4().hex, keep_graph=True)
        given = [tensor for _, tensor in tensors]
        past = call.past
        call = replace(call, past=tuple(tensor.detach() for tensor in past))
        given = [hidden_BTD, *past, *given]
        output: torch.Tensor = _Forward.apply(self, call, adapters, noted, *given)
        return output

    def backward(
        self,
        gradient_BTD: torch.Tensor,
        computed: Computed,
        need_input_gradient: bool,
        values: list[str],
        past: list[int],
        keep_graph: bool,
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], dict[int, torch.Tensor]]:
        """Carries a gradient back; computes the forward again if the trunk has lost it."""
        arguments = (computed.call.request_id, need_input_gradient, values, past, keep_graph)
        with others_compute():
            for _ in range(_ATTEMPTS):
                try:
                    return self.session.backward(gradient_BTD, *arguments)
                except UnknownRequestError:
                    self._compute_again([computed])
            return self.session.backward(gradient_BTD, *arguments)

    def release(self, request_id: str = "", cache_id: str = "") -> None:
        """Notes state that will not be asked for again; the next call tells the trunk.

        Finalizers call this, perhaps in the middle of a send of this very thread, so it must not
        send itself.
        """
        self._dropped.append((request_id, cache_id))

    @property
    def in_float32_here(self) -> bool:
        """Whether this thread is inside of :meth:`in_float32`."""
        return bool(getattr(self._here, "exact", False))

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Lets what this thread sends travel in float32, while it lasts."""
        self._here.exact = True
        try:
            yield
        finally:
            self._here.exact = False

    def in_full(self) -> None:
        """Lets everything travel in float32 from now on, what was sent before once more."""
        session = self.session
        session.activation_format = session.gradient_format = WireFormat.FLOAT32
        session.adapter_format = WireFormat.FLOAT32
        with self._lock:
            self._sent.forget()

    def close(self) -> None:
        """Ends the session; may be called again."""
        self._end.detach()
        self.session.close()

    def __enter__(self) -> TrunkFunction:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def forward_noted(
        self,
        hidden_BTD: torch.Tensor,
        call: ForwardCall,
        adapters: Callable[[], Adapters],
        same_adapters: bool = False,
    ) -> tuple[torch.Tensor, Computed]:
        """A forward that may have to be computed again.

        Args:
            hidden_BTD: Of the new tokens.
            call: What goes with them.
            adapters: Gives them as they are.
            same_adapters: Takes them to be what they were in the forward before.
        """
        computed = Computed(hidden_BTD.detach(), call, Structure(), (), ())

        def push() -> _Push:
            nonlocal computed
            pushed = None
            if not (same_adapters and self._sent.version):
                pushed = self._sent.push(*adapters())
            structure, values, numbers = self._sent.content()
            computed = replace(computed, structure=structure, values=values, numbers=numbers)
            return self._sent.version, pushed

        output_BTD = self._forward(hidden_BTD, call, push)
        return output_BTD, computed

    def forward_cached(
        self,
        hidden_BTD: torch.Tensor,
        call: ForwardCall,
        adapters: Callable[[], Adapters],
        cache: History,
        same_adapters: bool,
    ) -> torch.Tensor:
        """Carries new tokens through the trunk, extending its cache; fills a lost one anew.

        Args:
            hidden_BTD: Of the new tokens.
            call: What goes with them.
            adapters: Gives them as they are.
            cache: What stands for it here.
            same_adapters: Takes them to be what they were in the forward before.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        self._release_dropped()
        for last in range(1 - _ATTEMPTS, 1):
            asked = replace(call, cache_id=cache.cache_id)
            try:
                output_BTD, computed = self.forward_noted(
                    hidden_BTD, asked, adapters, same_adapters
                )
            except UnknownRequestError:
                if last == 0:
                    raise
                cache.renew()
                self._compute_again(cache.history, cache.cache_id)
            else:
                cache.history.append(computed)
                return output_BTD
        raise AssertionError("unreachable")

    def _forward(
        self,
        hidden_BTD: torch.Tensor,
        call: ForwardCall,
        push: Callable[[], _Push],
    ) -> torch.Tensor:
        """Asks with what has changed, then with everything, if the trunk has something else."""
        self.session.check_process()  # whose lock may be held for ever
        hidden_BTD = hidden_BTD.detach()
        # Other forwards are no stage of a micro-batch: nothing else computes meanwhile.
        with others_compute() if call.keep_graph else nullcontext():
            for last in range(1 - _ATTEMPTS, 1):
                version = 0
                try:
                    with self._lock:  # what is pushed is sent before whoever builds on it
                        version, pushed = push()
                        asked = replace(call, state_version=version, push=pushed)
                        sent = self.session.send_forward(hidden_BTD, asked)
                    return self.session.finish_forward(sent, hidden_BTD, asked)
                except BaseException as error:
                    self._forget(version)
                    if not isinstance(error, StaleStateError) or last == 0:
                        raise
        raise AssertionError("unreachable")

    def _forget(self, version: int) -> None:
        """What was pushed may not be there: the next push is all there is."""
        with self._lock:
            if self._sent.version >= version:
                self._sent.forget()

    def _compute_again(self, lost: Sequence[Computed], cache_id: str = "") -> None:
        """Has the trunk compute forwards anew, with the values of their first time."""
        before: Computed | None = None
        version = 0

        def push() -> _Push:
            nonlocal version
            if version and once.with_same_adapters(before):
                known, version = version, 0  # if that is not there any more, all is sent again
                return known, None
            found = self._sent.replay(once.structure, once.values, once.numbers)
            version = found.version
            return version, found

        for once in lost:
            call = replace(once.call, cache_id=cache_id)
            self._forward(once.hidden_BTD, call, push)
            before = once

    def _release_dropped(self) -> None:
        self.session.check_process()
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        if not dropped:
            return
        requests, caches = zip(*dropped, strict=True)
        try:
            self.session.release([r for r in requests if r], [c for c in caches if c])
        except TrunkUnavailableError:
            return  # the session is gone, and its state with it


class _HeldForward:
    """Lives as long as the autograd node: a forward whose graph is dropped is released."""

    def __init__(self, function: TrunkFunction, request_id: str) -> None:
        self.release = weakref.finalize(self, function.release, request_id)
        self.release.atexit = False


class _Forward(torch.autograd.Function):
    """From hidden states and adapter tensors to hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        function: TrunkFunction,
        call: ForwardCall,
        adapters: Adapters,
        noted: Callable[[Computed], None],
        hidden_BTD: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        output_BTD, ctx.computed = function.forward_noted(hidden_BTD, call, lambda: adapters)
        noted(ctx.computed)
        ctx.function, ctx.held = function, _HeldForward(function, call.request_id)
        ctx.save_for_backward(hidden_BTD, *tensors)
        return output_BTD

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise AdapterError(
            "forward-mode derivatives do not pass the trunk: accepted are backward() and "
            "torch.autograd.grad()"
        )

    @staticmethod
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        functorch = torch._C._functorch
        batched = functorch.is_batchedtensor, functorch.is_legacy_batchedtensor
        if any(is_one(gradient_BTD) for is_one in batched):
            raise AdapterError(
                "several gradients at once (is_grads_batched) do not pass the trunk: accepted is "
                "one after the other, with retain_graph=True"
            )
        found = _gradients(ctx, gradient_BTD)
        if torch.is_grad_enabled():  # create_graph=True
            at = [i for i, tensor in enumerate(found) if tensor is not None]
            given = [tensor for tensor in found if tensor is not None]
            hung = _Once.apply(len(at), *given, gradient_BTD, *ctx.saved_tensors)
            found = list(found)
            for i, tensor in zip(at, hung, strict=True):
                found[i] = tensor
        return None, None, None, None, *found


def _gradients(ctx: Any, gradient_BTD: torch.Tensor) -> list[torch.Tensor | None]:
    """Of the hidden states and of each tensor, where they are wanted and there are any."""
    computed: Computed = ctx.computed
    _, *given = ctx.saved_tensors  # raises if one was changed in place
    count = len(computed.call.past)
    tensors = given[count:]
    for value, numbers, tensor in zip(computed.values, computed.numbers, tensors, strict=True):
        if not same_numbers(numbers, tensor):
            raise AdapterError(
                f"{value.names[0]} was written between forward and backward, past autograd's "
                f"notice: accepted is to run the forward again"
            )
    need_hidden, *need = ctx.needs_input_grad[4:]
    pairs = zip(computed.values, need[count:], strict=True)
    names = [value.names[0] for value, wanted in pairs if wanted]
    past = [number for number in range(count) if need[number]]
    keep_graph: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    with torch.no_grad():
        of_hidden, of_values, of_past = ctx.function.backward(
            gradient_BTD.contiguous(), computed, need_hidden, names, past, keep_graph
        )
    if not keep_graph:
        ctx.held.release.detach()
    found = [of_past.get(number) for number in range(count)]
    found += [of_values.get(value.names[0]) for value in computed.values]
    moved = [g if g is None else g.to(t.device, t.dtype) for g, t in zip(found, given, strict=True)]
    return [of_hidden, *moved]


class _Once(torch.autograd.Function):
    """Hangs gradients on all that they depend on, so that differentiating them is refused.

    ``once_differentiable`` would be pruned away by ``autograd.grad(inputs=…)``.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise AdapterError(
            "derivatives of second order do not pass the trunk: accepted are those of first order"
        )
