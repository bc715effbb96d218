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

    def forward(self, hidden_BTD: torch.Tensor, call: ForwardCall) -> torch.Tensor:
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
        )
        answer = self._connection.ask(pb.SessionRequest(forward=body), tensors)
        return answer.tensors["hidden_states"].to(hidden_BTD.device, hidden_BTD.dtype)

    def backward(
        self,
        gradient_BTD: torch.Tensor,
        request_id: str,
        need_input_gradient: bool = True,
        reset_gradients: bool = False,
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
        )
        tensors = {"gradient": gradient_BTD.to(self.terms.wire_dtype)}
        answer = self._connection.ask(pb.SessionRequest(backward=body), tensors)
        found = answer.tensors.get("gradient")
        if found is not None:
            found = found.to(gradient_BTD.device, gradient_BTD.dtype)
        return found, answer.message.backward.gradient_norm

    def step(self, step: int, scale: float, optimizer: OptimizerSettings) -> float:
        """Applies optimizer step number ``step`` on the trunk; returns its gradient's norm.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        body = pb.Step(
            step=step,
            gradient_scale=scale,
            optimizer=pb.Optimizer(
                name=optimizer.name,
                hyperparameters=optimizer.hyperparameters,
                flags=optimizer.flags,
            ),
        )
        return self._connection.ask(pb.SessionRequest(step=body)).message.step.gradient_norm

    def release(self, request_ids: list[str], cache_ids: list[str]) -> None:
        """Frees state on the trunk, without waiting for the answer."""
        body = pb.Release(request_ids=request_ids, cache_ids=cache_ids)
        self._connection.send(pb.SessionRequest(release=body))

    def adapter(self) -> dict[str, torch.Tensor]:
        """Fetches the trunk's adapter weights, by PEFT's names."""
        return self._snapshot(pb.SNAPSHOT_PART_ADAPTER, "adapter/")

    def gradients(self) -> dict[str, torch.Tensor]:
        """Fetches the trunk's gradients accumulated since the last step."""
        return self._snapshot(pb.SNAPSHOT_PART_GRADIENTS, "gradient/")

    def restore(self, weights: dict[str, torch.Tensor]) -> None:
        """Replaces the trunk's adapter weights.

        Raises:
            AdapterError: If they do not fit; nothing was changed.
        """
        tensors = {f"adapter/{name}": tensor for name, tensor in weights.items()}
        self._connection.ask(pb.SessionRequest(restore=pb.Restore()), tensors)

    def close(self) -> None:
        """Ends the session; the trunk frees what it held."""
        self._connection.close()
        self._channel.close()

    def _snapshot(self, part: pb.SnapshotPart.ValueType, prefix: str) -> dict[str, torch.Tensor]:
        answer = self._connection.ask(pb.SessionRequest(snapshot=pb.Snapshot(parts=[part])))
        return {name.removeprefix(prefix): tensor for name, tensor in answer.tensors.items()}

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
