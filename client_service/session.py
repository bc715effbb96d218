"""A session on a trunk in terms of tensors: the edge where messages are made and read.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import Future
from typing import Any

import torch

from client_service.addresses import split_addresses
from client_service.calls import CacheEdit, ForwardCall, SessionTerms
from client_service.connection import Answer, Traffic
from client_service.credentials import Credentials
from client_service.link import SessionLink
from shared.adapters.state_push import StatePush
from shared.errors import InvalidInputError, ModelMismatchError
from shared.failpoints import reach
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import check_versions, library_versions
from shared.wire.dtypes import from_format, to_wire
from shared.wire.formats import Packed, WireFormat, pack, pack_value
from shared.wire.structures import write_structure, write_values

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

REQUEST_TIMEOUT_S = 600.0
RECONNECT_TIMEOUT_S = 60.0


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
        self.adapter_format = terms.adapter_format
        """How all of these travel from now on; may be changed between requests."""
        self._link = SessionLink(
            split_addresses(address),
            self._open_message,
            self._check,
            request_timeout_s,
            reconnect_timeout_s,
            credentials,
        )

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

    def check_process(self) -> None:
        """Refuses a process that was forked from the session's.

        Raises:
            InvalidInputError: In such a process.
        """
        self._link.check_process()

    def forward(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> torch.Tensor:
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
        reach("client.forward.before")
        wire_format = WireFormat.FLOAT32 if call.in_float32 else self.activation_format
        tensors: dict[str, Packed] = {"hidden_states": pack(hidden_BTD, wire_format)}
        if call.attention_mask is not None:
            tensors["attention_mask"] = _compact(call.attention_mask)
        if call.position_ids is not None:
            tensors["position_ids"] = call.position_ids.to(torch.int64)
        if call.push is not None:
            how = self.adapter_format
            tensors |= {f"value/{i}": pack_value(t, how) for i, t in enumerate(call.push.tensors)}
        tensors |= {f"past/{i}": tensor.contiguous() for i, tensor in enumerate(call.past)}
        body = pb.Forward(
            request_id=call.request_id,
            keep_graph=call.keep_graph,
            training=call.training,
            cache_id=call.cache_id,
            cache_ops=[_cache_op(edit) for edit in call.cache_edits],
            cached_tokens=call.cached_tokens,
            answer_format=from_format(wire_format),
            state_version=call.state_version,
            state=_state(call.push, self.adapter_format),
            adapter_names=call.adapter_names,
            attention=call.attention,
            dropout_key=call.dropout_key,
            first_block=call.blocks[0] if call.blocks else 0,
            end_block=call.blocks[1] if call.blocks else 0,
            autocast=pb.DATA_TYPE_UNSPECIFIED if call.autocast is None else to_wire(call.autocast),
        )
        return self._link.send(pb.SessionRequest(forward=body), tensors)

    def finish_forward(
        self, sent: Future[Answer], hidden_BTD: torch.Tensor, call: ForwardCall
    ) -> torch.Tensor:
        """Waits for the answer to :meth:`send_forward`; raises what :meth:`forward` raises."""
        answer = self._link.wait(sent)
        reach("client.forward.after")
        # What read the answer holds it until the next: no part of a graph must be in there.
        return answer.tensors.pop("hidden_states").to(hidden_BTD.device, hidden_BTD.dtype)

    def backward(
        self,
        gradient_BTD: torch.Tensor,
        request_id: str,
        need_input_gradient: bool,
        values: list[str],
        past: list[int],
        keep_graph: bool,
    ) -> tuple[torch.Tensor | None, Tensors, dict[int, torch.Tensor]]:
        """Carries a gradient [B, T, D] back through a forward.

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
            value_format=from_format(self.adapter_format),
        )
        tensors = {"gradient": pack(gradient_BTD, self.gradient_format, is_gradient=True)}
        answer = self._link.ask(pb.SessionRequest(backward=body), tensors)
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

    def fetch_norms(self, name: str, of: str) -> torch.Tensor:
        """Reads the 2-norms of a base matrix's ``rows`` or ``columns``.

        Raises:
            SharedWeightsError: If there is no such matrix.
        """
        names = {"norm_rows" if of == "rows" else "norm_columns": [name]}
        answer = self._link.ask(pb.SessionRequest(fetch=pb.Fetch(**names)))
        return answer.tensors[f"{of}/{name}"]

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees state on the trunk, without waiting for the answer."""
        body = pb.Release(request_ids=request_ids, cache_ids=cache_ids)
        self._link.send(pb.SessionRequest(release=body))

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self._link.close()

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
            library_versions=library_versions(),
        )


@functools.cache
def _tell(difference: str) -> None:
    """Once in a process, however many sessions are opened."""
    if difference:
        logger.warning("%s", difference)


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _state(push: StatePush | None, wire_format: WireFormat) -> pb.AdapterState | None:
    if push is None:
        return None
    values = write_values(push.values)
    for value, tensor in zip(values, push.tensors, strict=True):
        value.rounded = tensor.dtype == torch.float32 and wire_format is not WireFormat.FLOAT32
    return pb.AdapterState(
        version=push.version,
        since=push.since,
        structure=None if push.structure is None else write_structure(push.structure),
        values=values,
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
