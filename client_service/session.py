"""A session on a trunk in terms of tensors: the edge where messages are made and read.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from client_service.addresses import split_addresses
from client_service.calls import (
    AdapterEntry,
    CacheEdit,
    ForwardCall,
    ForwardReply,
    SessionTerms,
)
from client_service.connection import Answer, Traffic
from client_service.credentials import Credentials
from client_service.journal import Entry
from client_service.link import SessionLink
from client_service.optimizer_spec import OptimizerSettings
from client_service.turns import others_compute
from shared.adapters.state_push import StatePush
from shared.errors import (
    InvalidInputError,
    ModelMismatchError,
    ResourceExhaustedError,
)
from shared.failpoints import reach
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import check_versions, library_versions
from shared.wire.dtypes import from_format, to_wire
from shared.wire.formats import Packed, WireFormat, pack
from shared.wire.structures import write_structure, write_values

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

REQUEST_TIMEOUT_S = 600.0
RECONNECT_TIMEOUT_S = 60.0
JOURNAL_BYTES, JOURNAL_STEPS = 256 * 1024**2, 8
"""Requests are kept up to this much before a snapshot takes their place: what a trunk that is lost
costs is the time to do so many steps again."""
_SNAPSHOT_SHARE = 0.02
"""Most of the time that snapshots may take: over a slow link they are taken less often."""


class TrunkSession:
    """A tenant's session; it outlives broken connections and lost trunks (see ``link``).

    Args:
        address: ``host:port`` of the trunk; of several with commas between, the first that answers.
        terms: What is expected and asked.
        request_timeout_s: How long an answer may take.
        reconnect_timeout_s: How long to look for a trunk when one is lost; 0 gives up at once.
        credentials: What to show the trunk; None takes the environment's.

    Raises:
        TrunkUnavailableError: If no trunk answers within a few seconds.
        ModelMismatchError: If it serves another model.
        AdapterError: If it refuses the adapter.
    """

    def __init__(
        self,
        address: str,
        terms: SessionTerms,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
        credentials: Credentials | None = None,
    ) -> None:
        self.terms = terms
        self._opened_with = (address, terms, request_timeout_s, reconnect_timeout_s)
        self._credentials = credentials
        self.activation_format = terms.activation_format
        self.gradient_format = terms.gradient_format
        """How hidden states and gradients travel from now on; may be changed between requests."""
        self._link = SessionLink(
            split_addresses(address),
            self._open_message,
            self._check,
            request_timeout_s,
            reconnect_timeout_s,
            credentials,
        )
        self.trainable_parameters = self._link.opened.trainable_parameters
        self._snapshot_at, self._snapshot_took_s = time.monotonic(), 0.0

    def __getstate__(self) -> tuple[Any, ...]:
        """What another one is opened with, where a model is copied or pickled.

        Raises:
            InvalidInputError: If it would have to carry credentials.
        """
        if self._credentials is not None:
            raise InvalidInputError(
                "a session with credentials given in code is neither copied nor pickled: accepted "
                "are credentials named in the environment"
            )
        return self._opened_with

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @property
    def address(self) -> str:
        """``host:port`` of the trunk that has the session now."""
        return self._link.address

    @property
    def info(self) -> pb.GetInfoResponse:
        """What that trunk serves and accepts."""
        return self._link.info

    @property
    def session_id(self) -> str:
        """Its id on that trunk."""
        return self._link.opened.session_id

    @property
    def recoveries(self) -> int:
        """How often the connection or the trunk was lost and found again."""
        return self._link.recoveries

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._link.traffic

    def forward(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> ForwardReply:
        """Carries hidden states [B, T, D] through the trunk.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        return self.finish_forward(self.send_forward(hidden_BTD, call), hidden_BTD, call)

    def send_forward(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> Future[Answer]:
        """Sends what :meth:`forward` asks; the trunk computes in the order of sending.

        Raises:
            TrunklineError: If the session is lost for good.
        """
        if call.keep_graph and self._link.journal.quiet:
            self._shorten_journal()
        reach("client.forward.before")
        wire_format = WireFormat.FLOAT32 if call.in_float32 else self.activation_format
        tensors: dict[str, Packed] = {"hidden_states": pack(hidden_BTD, wire_format)}
        if call.attention_mask is not None:
            tensors["attention_mask"] = _compact(call.attention_mask)
        if call.position_ids is not None:
            tensors["position_ids"] = call.position_ids.to(torch.int64)
        if call.push is not None:
            tensors |= {f"value/{i}": tensor for i, tensor in enumerate(call.push.tensors)}
        tensors |= {f"past/{i}": tensor.contiguous() for i, tensor in enumerate(call.past)}
        body = pb.Forward(
            request_id=call.request_id,
            keep_graph=call.keep_graph,
            training=call.training,
            step=call.step,
            micro=call.micro,
            cache_id=call.cache_id,
            cache_ops=[_cache_op(edit) for edit in call.cache_edits],
            cached_tokens=call.cached_tokens,
            adapter=call.adapter,
            without_adapter=call.without_adapter,
            answer_format=from_format(wire_format),
            state_version=call.state_version,
            state=_state(call.push),
            adapter_names=call.adapter_names,
            attention=call.attention,
            dropout_key=call.dropout_key,
            autocast=pb.DATA_TYPE_UNSPECIFIED if call.autocast is None else to_wire(call.autocast),
        )
        return self._link.send(pb.SessionRequest(forward=body), tensors)

    def finish_forward(
        self, sent: Future[Answer], hidden_BTD: torch.Tensor, call: ForwardCall
    ) -> ForwardReply:
        """Waits for the answer to :meth:`send_forward`; raises what :meth:`forward` raises."""
        # Other forwards are no stage of a micro-batch: nothing else computes meanwhile.
        with others_compute() if call.keep_graph else contextlib.nullcontext():
            answer = self._link.wait(sent)
        reach("client.forward.after")
        output_BTD = answer.tensors["hidden_states"].to(hidden_BTD.device, hidden_BTD.dtype)
        result = answer.message.forward
        return ForwardReply(output_BTD, result.penalty, result.penalty_terms)

    def backward(
        self,
        gradient_BTD: torch.Tensor,
        request_id: str,
        need_input_gradient: bool = True,
        reset_gradients: bool = False,
        penalty_gradient: float = 0.0,
    ) -> tuple[torch.Tensor | None, float]:
        """Carries a gradient [B, T, D] back through a forward.

        Returns:
            The gradient with respect to the forward's input, if it was asked for, and the 2-norm
            of the trunk's gradient accumulated since the last step.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        reach("client.backward.before")
        body = pb.Backward(
            request_id=request_id,
            need_input_gradient=need_input_gradient,
            reset_gradients=reset_gradients,
            penalty_gradient=penalty_gradient,
            answer_format=from_format(self.gradient_format),
        )
        tensors = {"gradient": pack(gradient_BTD, self.gradient_format, is_gradient=True)}
        answer = self._ask_in_turn(pb.SessionRequest(backward=body), tensors)
        reach("client.backward.after")
        found = answer.tensors.get("gradient")
        if found is not None:
            found = found.to(gradient_BTD.device, gradient_BTD.dtype)
        return found, answer.message.backward.gradient_norm

    def backward_of_values(
        self,
        gradient_BTD: torch.Tensor,
        request_id: str,
        need_input_gradient: bool,
        values: list[str],
        past: list[int],
        keep_graph: bool,
    ) -> tuple[torch.Tensor | None, Tensors, dict[int, torch.Tensor]]:
        """Carries a gradient [B, T, D] back through a forward with the client's own adapters.

        Args:
            gradient_BTD: Of the loss, with respect to the forward's result.
            request_id: Of the forward.
            need_input_gradient: Whether the first result is wanted.
            values: First names of those whose gradients are wanted.
            past: Numbers of the past tensors whose gradients are wanted.
            keep_graph: Whether the trunk keeps what it holds, for another backward.

        Returns:
            The gradient with respect to the forward's input, those of the values by name, without
            those that the output does not depend on, and those of the past tensors by number.

        Raises:
            UnknownRequestError: If the trunk does not hold the forward any more.
            TrunklineError: What else the trunk answered, if it refused.
        """
        reach("client.backward.before")
        body = pb.Backward(
            request_id=request_id,
            need_input_gradient=need_input_gradient,
            values=values,
            past=past,
            keep_graph=keep_graph,
            answer_format=from_format(self.gradient_format),
        )
        tensors = {"gradient": pack(gradient_BTD, self.gradient_format, is_gradient=True)}
        answer = self._ask_in_turn(pb.SessionRequest(backward=body), tensors)
        reach("client.backward.after")
        found = answer.tensors.pop("gradient", None)
        if found is not None:
            found = found.to(gradient_BTD.device, gradient_BTD.dtype)
        of_values = {n: t for n, t in answer.tensors.items() if n.startswith("value/")}
        of_past = {
            int(n.removeprefix("past/")): t for n, t in answer.tensors.items() if n not in of_values
        }
        return found, _without("value/", of_values), of_past

    def fetch(self, names: list[str]) -> tuple[Tensors, list[str]]:
        """Reads base weights of the trunk's blocks; all vectors if none is named.

        Returns:
            Tensors by full name, and the names of the blocks' modules that are torch's ``Linear``.

        Raises:
            SharedWeightsError: If the host does not give them.
        """
        answer = self._link.ask(pb.SessionRequest(fetch=pb.Fetch(names=names)))
        return answer.tensors, list(answer.message.fetch.linear_modules)

    def step(
        self, step: int, scale: float, optimizer: OptimizerSettings, adapter: str = ""
    ) -> float:
        """Applies optimizer step number ``step`` on the trunk; returns its gradient's norm.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        body = pb.Step(
            step=step,
            gradient_scale=scale,
            optimizer=_optimizer(optimizer),
            adapter=adapter,
        )
        return self._link.ask(pb.SessionRequest(step=body)).message.step.gradient_norm

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees state on the trunk, without waiting for the answer."""
        body = pb.Release(request_ids=request_ids, cache_ids=cache_ids)
        self._link.send(pb.SessionRequest(release=body))

    def adapter(self, name: str = "") -> Tensors:
        """Fetches an adapter's weights, by PEFT's names."""
        return self._snapshot(name, pb.SNAPSHOT_PART_ADAPTER, "adapter/")

    def gradients(self, name: str = "") -> Tensors:
        """Fetches an adapter's gradients accumulated since its last step."""
        return self._snapshot(name, pb.SNAPSHOT_PART_GRADIENTS, "gradient/")

    def optimizer_state(self, name: str = "") -> Tensors:
        """Fetches the state of an adapter's optimizer, as ``PARAMETER/KEY``."""
        return self._snapshot(name, pb.SNAPSHOT_PART_OPTIMIZER, "optimizer/")

    def restore(
        self, weights: Tensors, name: str = "", weight_digest: str = "", step: int | None = None
    ) -> None:
        """Replaces an adapter's weights on the trunk.

        Args:
            weights: By PEFT's names.
            name: Of the adapter.
            weight_digest: The trunk weights they were trained on; empty is not checked.
            step: The adapter's number of optimizer steps so far; None keeps what it has.

        Raises:
            AdapterError: If they do not fit; nothing was changed.
        """
        body = pb.Restore(adapter=name, weight_digest=weight_digest, committed_step=step)
        tensors = {f"adapter/{n}": tensor for n, tensor in weights.items()}
        self._link.ask(pb.SessionRequest(restore=body), tensors)

    def restore_optimizer(
        self, state: Tensors, optimizer: OptimizerSettings, step: int, name: str = ""
    ) -> None:
        """Replaces the state of an adapter's optimizer and the number of its steps.

        Raises:
            OptimizerError: If it does not fit; nothing was changed.
        """
        body = pb.Restore(adapter=name, committed_step=step, optimizer=_optimizer(optimizer))
        tensors = {f"optimizer/{n}": tensor for n, tensor in state.items()}
        self._link.ask(pb.SessionRequest(restore=body), tensors)

    def add_adapter(self, name: str, peft_config_json: str, seed: int) -> int:
        """Adds a fresh adapter to this session; returns its number of trainable numbers.

        Raises:
            AdapterError: If the name is taken or the adapter refused.
        """
        body = pb.AddAdapter(adapter=name, peft_config_json=peft_config_json, seed=seed)
        answer = self._link.ask(pb.SessionRequest(add_adapter=body))
        return answer.message.add_adapter.trainable_parameters

    def remove_adapter(self, name: str) -> None:
        """Frees an adapter of this session.

        Raises:
            AdapterError: If there is none of this name.
        """
        self._link.ask(pb.SessionRequest(remove_adapter=pb.RemoveAdapter(adapter=name)))

    def adapters(self) -> list[AdapterEntry]:
        """The adapters that this session has on the trunk."""
        answer = self._link.ask(pb.SessionRequest(list_adapters=pb.ListAdapters()))
        return [
            AdapterEntry(a.adapter, a.peft_config_json, a.trainable_parameters, a.committed_step)
            for a in answer.message.list_adapters.adapters
        ]

    def adapter_config_json(self, name: str = "") -> str:
        """An adapter's configuration as PEFT resolved it; empty for a frozen trunk."""
        message = pb.SessionRequest(snapshot=pb.Snapshot(adapter=name))
        return self._link.ask(message).message.snapshot.peft_config_json

    def importance(self, name: str, update: bool, report: bool) -> Tensors:
        """AdaLoRA: the scores [R, 3] of the trunk's singular values, by the name of ``lora_E``."""
        body = pb.Importance(adapter=name, update=update, report=report)
        answer = self._link.ask(pb.SessionRequest(importance=body))
        return _without("importance/", answer.tensors)

    def allocate(self, name: str, kept: Tensors, last: bool) -> None:
        """AdaLoRA: zeroes the trunk's singular values that are not kept, booleans [R] by name."""
        tensors = {f"keep/{n}": mask for n, mask in kept.items()}
        body = pb.Allocate(adapter=name, last=last)
        self._link.ask(pb.SessionRequest(allocate=body), tensors)

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self._link.close()

    def _ask_in_turn(self, message: pb.SessionRequest, tensors: Mapping[str, Packed]) -> Answer:
        """Asks; other micro-batches compute while this one waits."""
        sent = self._link.send(message, tensors)
        with others_compute():
            return self._link.wait(sent)

    def _snapshot(self, name: str, part: pb.SnapshotPart.ValueType, prefix: str) -> Tensors:
        message = pb.SessionRequest(snapshot=pb.Snapshot(adapter=name, parts=[part]))
        return _without(prefix, self._link.ask(message).tensors)

    def _shorten_journal(self) -> None:
        """Lets a snapshot take the place of many requests, between two steps."""
        journal = self._link.journal
        grown = journal.nbytes - journal.base_nbytes
        now = time.monotonic()
        # A snapshot is worth its bytes once as much again has come together, or nearly.
        due = journal.steps >= JOURNAL_STEPS and 4 * grown >= journal.base_nbytes
        due = due and self._snapshot_took_s <= _SNAPSHOT_SHARE * (now - self._snapshot_at)
        if not due and grown <= max(JOURNAL_BYTES, journal.base_nbytes):
            return
        version = journal.version
        names = ["", *journal.added] if self.trainable_parameters else list(journal.added)
        base = [Entry(message, {}) for message in journal.added.values()]
        for name in names:
            parts = [pb.SNAPSHOT_PART_ADAPTER, pb.SNAPSHOT_PART_OPTIMIZER]
            message = pb.SessionRequest(snapshot=pb.Snapshot(adapter=name, parts=parts))
            try:
                answer = self._link.ask(message)
            except ResourceExhaustedError:
                return  # before the next step, then
            step = answer.message.snapshot.committed_step
            optimizer = journal.optimizers.get(name)
            body = pb.Restore(adapter=name, committed_step=step, optimizer=optimizer)
            # Before the first step there is no optimizer, and nothing of one.
            base.append(Entry(pb.SessionRequest(restore=body), answer.tensors))
        self._link.shorten_journal(version, base)
        self._snapshot_at, self._snapshot_took_s = now, time.monotonic() - now

    def _check(self, address: str, info: pb.GetInfoResponse) -> None:
        _tell(check_versions(library_versions(), info.library_versions))
        terms = self.terms
        served = info.start_layer, info.end_layer
        if terms.split is not None and terms.split != served:
            raise ModelMismatchError(
                f"this client is split {terms.split[0]}:{terms.split[1]}, trunk {address} "
                f"serves {served[0]}:{served[1]} of a {info.model_type}"
            )
        if terms.weight_digest and terms.weight_digest != info.weight_digest:
            raise ModelMismatchError(
                f"trunk {address} serves other weights: digest "
                f"{info.weight_digest[:16]}…, this client's model has "
                f"{terms.weight_digest[:16]}…"
            )

    def _open_message(self, info: pb.GetInfoResponse) -> pb.Open:
        terms = self.terms
        return pb.Open(
            weight_digest=terms.weight_digest or "",
            start_layer=info.start_layer,
            end_layer=info.end_layer,
            peft_config_json=terms.peft_config_json,
            seed=terms.seed,
            dropout=terms.dropout,
            library_versions=library_versions(),
        )


@functools.cache
def _tell(difference: str) -> None:
    """Once in a process, however many sessions are opened."""
    if difference:
        logger.warning("%s", difference)


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _optimizer(settings: OptimizerSettings) -> pb.Optimizer:
    return pb.Optimizer(
        name=settings.name,
        hyperparameters=settings.hyperparameters,
        flags=settings.flags,
    )


def _state(push: StatePush | None) -> pb.AdapterState | None:
    if push is None:
        return None
    return pb.AdapterState(
        version=push.version,
        since=push.since,
        structure=None if push.structure is None else write_structure(push.structure),
        values=write_values(push.values),
    )


def _compact(mask: torch.Tensor) -> torch.Tensor:
    # transformers turns a flat mask into booleans first thing; sent so, it is an eighth.
    return mask if mask.is_floating_point() else mask.to(torch.bool)


def _cache_op(edit: CacheEdit) -> pb.CacheOp:
    if edit.reset:
        return pb.CacheOp(reset=pb.CacheOp.Reset())
    if edit.reorder is not None:
        return pb.CacheOp(reorder=pb.CacheOp.Reorder(indices=edit.reorder))
    if edit.remove_tokens is not None:
        return pb.CacheOp(crop=pb.CacheOp.Crop(tokens_to_remove=edit.remove_tokens))
    return pb.CacheOp(repeat=pb.CacheOp.Repeat(repeats=edit.repeats or 1))
