"""A session on a trunk in terms of tensors: the edge where messages are made and read.

Dimension letters: B batch, T tokens, S tokens with those in the cache, D model dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from client_service.connection import SessionConnection, Traffic, get_info, open_channel
from client_service.optimizer_spec import OptimizerSettings
from shared.errors import ModelMismatchError
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.wire.dtypes import to_wire

Tensors = dict[str, torch.Tensor]

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class SessionTerms:
    """What a client expects of a trunk and asks of it."""

    split: tuple[int, int] | None = None
    """First block of the trunk and first block above; None takes what the trunk serves."""
    weight_digest: str | None = None
    """None where the client cannot know it: then it is not checked."""
    peft_config_json: str = ""
    """Empty for a frozen trunk."""
    seed: int = 0
    dropout: float | None = None
    wire_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class CacheEdit:
    """A change of the trunk's cache before a forward; exactly one is set."""

    reorder: list[int] | None = None
    remove_tokens: int | None = None
    repeats: int | None = None
    reset: bool = False


@dataclass(frozen=True)
class ForwardCall:
    """What goes with hidden states; see ``Forward`` in the protocol."""

    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    request_id: str = ""
    keep_graph: bool = False
    training: bool = False
    step: int = 0
    micro: int = 0
    cache_id: str = ""
    cache_edits: list[CacheEdit] = field(default_factory=list)
    adapter: str = ""
    """Empty is the session's own, of its terms."""
    without_adapter: bool = False


@dataclass(frozen=True)
class ForwardReply:
    """What the trunk gave: hidden states [B, T, D], and AdaLoRA's orthogonality term."""

    hidden_BTD: torch.Tensor
    penalty: float = 0.0
    penalty_terms: int = 0
    """Matrices that ``penalty`` is the sum over; 0 for another method."""


@dataclass(frozen=True)
class AdapterEntry:
    """One adapter of the session on the trunk."""

    name: str
    peft_config_json: str
    trainable_parameters: int
    committed_step: int


class TrunkSession:
    """A tenant's session.

    Args:
        address: ``host:port`` of the trunk.
        terms: What is expected and asked.
        request_timeout_s: How long an answer may take.

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
    ) -> None:
        self.address = address
        self.terms = terms
        self._channel = open_channel(address)
        try:
            self.info = get_info(self._channel, address, CONNECT_TIMEOUT_S)
            self._check(terms)
            self._connection = SessionConnection(self._channel, address, request_timeout_s)
            opened = self._connection.ask(pb.SessionRequest(open=self._open_message(terms)))
        except BaseException:
            self._channel.close()
            raise
        self.session_id = opened.message.open.session_id
        self.trainable_parameters = opened.message.open.trainable_parameters

    @property
    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""
        return self._connection.traffic

    def forward(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> ForwardReply:
        """Carries hidden states [B, T, D] through the trunk.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        tensors = {"hidden_states": hidden_BTD.to(self.terms.wire_dtype)}
        if call.attention_mask is not None:
            tensors["attention_mask"] = _compact(call.attention_mask)
        if call.position_ids is not None:
            tensors["position_ids"] = call.position_ids.to(torch.int64)
        body = pb.Forward(
            request_id=call.request_id,
            keep_graph=call.keep_graph,
            training=call.training,
            step=call.step,
            micro=call.micro,
            cache_id=call.cache_id,
            cache_ops=[_cache_op(edit) for edit in call.cache_edits],
            adapter=call.adapter,
            without_adapter=call.without_adapter,
        )
        answer = self._connection.ask(pb.SessionRequest(forward=body), tensors)
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
        body = pb.Backward(
            request_id=request_id,
            need_input_gradient=need_input_gradient,
            reset_gradients=reset_gradients,
            penalty_gradient=penalty_gradient,
        )
        tensors = {"gradient": gradient_BTD.to(self.terms.wire_dtype)}
        answer = self._connection.ask(pb.SessionRequest(backward=body), tensors)
        found = answer.tensors.get("gradient")
        if found is not None:
            found = found.to(gradient_BTD.device, gradient_BTD.dtype)
        return found, answer.message.backward.gradient_norm

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
        return self._connection.ask(pb.SessionRequest(step=body)).message.step.gradient_norm

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees state on the trunk, without waiting for the answer."""
        body = pb.Release(request_ids=request_ids, cache_ids=cache_ids)
        self._connection.send(pb.SessionRequest(release=body))

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
        self._connection.ask(pb.SessionRequest(restore=body), tensors)

    def restore_optimizer(
        self, state: Tensors, optimizer: OptimizerSettings, step: int, name: str = ""
    ) -> None:
        """Replaces the state of an adapter's optimizer and the number of its steps.

        Raises:
            OptimizerError: If it does not fit; nothing was changed.
        """
        body = pb.Restore(adapter=name, committed_step=step, optimizer=_optimizer(optimizer))
        tensors = {f"optimizer/{n}": tensor for n, tensor in state.items()}
        self._connection.ask(pb.SessionRequest(restore=body), tensors)

    def add_adapter(self, name: str, peft_config_json: str, seed: int) -> int:
        """Adds a fresh adapter to this session; returns its number of trainable numbers.

        Raises:
            AdapterError: If the name is taken or the adapter refused.
        """
        body = pb.AddAdapter(adapter=name, peft_config_json=peft_config_json, seed=seed)
        answer = self._connection.ask(pb.SessionRequest(add_adapter=body))
        return answer.message.add_adapter.trainable_parameters

    def remove_adapter(self, name: str) -> None:
        """Frees an adapter of this session.

        Raises:
            AdapterError: If there is none of this name.
        """
        self._connection.ask(pb.SessionRequest(remove_adapter=pb.RemoveAdapter(adapter=name)))

    def adapters(self) -> list[AdapterEntry]:
        """The adapters that this session has on the trunk."""
        answer = self._connection.ask(pb.SessionRequest(list_adapters=pb.ListAdapters()))
        return [
            AdapterEntry(a.adapter, a.peft_config_json, a.trainable_parameters, a.committed_step)
            for a in answer.message.list_adapters.adapters
        ]

    def adapter_config_json(self, name: str = "") -> str:
        """An adapter's configuration as PEFT resolved it; empty for a frozen trunk."""
        message = pb.SessionRequest(snapshot=pb.Snapshot(adapter=name))
        return self._connection.ask(message).message.snapshot.peft_config_json

    def importance(self, name: str, update: bool, report: bool) -> Tensors:
        """AdaLoRA: the scores [R, 3] of the trunk's singular values, by the name of ``lora_E``."""
        body = pb.Importance(adapter=name, update=update, report=report)
        answer = self._connection.ask(pb.SessionRequest(importance=body))
        return _without("importance/", answer.tensors)

    def allocate(self, name: str, kept: Tensors, last: bool) -> None:
        """AdaLoRA: zeroes the trunk's singular values that are not kept, booleans [R] by name."""
        tensors = {f"keep/{n}": mask for n, mask in kept.items()}
        body = pb.Allocate(adapter=name, last=last)
        self._connection.ask(pb.SessionRequest(allocate=body), tensors)

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self._connection.close()
        self._channel.close()

    def _snapshot(self, name: str, part: pb.SnapshotPart.ValueType, prefix: str) -> Tensors:
        message = pb.SessionRequest(snapshot=pb.Snapshot(adapter=name, parts=[part]))
        return _without(prefix, self._connection.ask(message).tensors)

    def _check(self, terms: SessionTerms) -> None:
        served = self.info.start_layer, self.info.end_layer
        if terms.split is not None and terms.split != served:
            raise ModelMismatchError(
                f"this client is split {terms.split[0]}:{terms.split[1]}, trunk {self.address} "
                f"serves {served[0]}:{served[1]} of a {self.info.model_type}"
            )
        if terms.weight_digest and terms.weight_digest != self.info.weight_digest:
            raise ModelMismatchError(
                f"trunk {self.address} serves other weights: digest "
                f"{self.info.weight_digest[:16]}…, this client's model has "
                f"{terms.weight_digest[:16]}…"
            )

    def _open_message(self, terms: SessionTerms) -> pb.Open:
        return pb.Open(
            weight_digest=terms.weight_digest or "",
            start_layer=self.info.start_layer,
            end_layer=self.info.end_layer,
            peft_config_json=terms.peft_config_json,
            seed=terms.seed,
            dropout=terms.dropout,
            wire_dtype=to_wire(terms.wire_dtype),
        )


def _without(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _optimizer(settings: OptimizerSettings) -> pb.Optimizer:
    return pb.Optimizer(
        name=settings.name,
        hyperparameters=settings.hyperparameters,
        flags=settings.flags,
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
