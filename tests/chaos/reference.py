"""What a session answers that is asked each thing once and in order."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from client_service.trunk_function import Adapters
from shared.adapters.state_push import StatePush
from shared.models import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from tests.client_adapter import client_adapter
from tests.models import save_tiny_model
from trunk_service.budget import ByteBudget
from trunk_service.limits import Limits
from trunk_service.quotas import TenantQuotas
from trunk_service.requests import BackwardRequest, ForwardRequest
from trunk_service.session import TenantSession
from trunk_service.translate import open_request
from trunk_service.trunk import Trunk

MICROS, PROMPT, DECODED = 2, 3, 2
LIMITS = Limits()
_SIZES = {"n_layer": 3, "n_embd": 8, "n_head": 1, "vocab_size": 16, "n_positions": 8}
_SPLIT = SplitRange(1, 2)

Tensors = list[torch.Tensor]


def _tiny_trunk() -> Trunk:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model("gpt2", Path(folder), **_SIZES)
        return Trunk.load(model, _SPLIT, torch.device("cpu"), torch.float32)


TRUNK = _tiny_trunk()
OPEN = pb.Open(
    weight_digest=TRUNK.info.weight_digest,
    start_layer=_SPLIT.start,
    end_layer=_SPLIT.end,
    library_versions=library_versions(),
)
LOOP = asyncio.new_event_loop()
VALUES = torch.randn(64, 1, PROMPT, 8, generator=torch.Generator().manual_seed(0))


def fresh_adapters() -> Adapters:
    """An adapter of the block, whose tensors are the caller's own."""
    structure, tensors = _adapters()
    return structure, [(v, t.detach().clone().requires_grad_(True)) for v, t in tensors]


@functools.cache
def _adapters() -> Adapters:
    config = LoraConfig(
        r=1, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    torch.manual_seed(1)
    return client_adapter(config, _SPLIT, **_SIZES)


def take_step(adapters: Adapters, step: int) -> None:
    """What an optimizer might do to them before a step."""
    with torch.no_grad():
        for _, tensor in adapters[1]:
            tensor.copy_(VALUES[step % 64].flatten()[: tensor.shape.numel()].reshape(tensor.shape))


def hidden_states(step: int, micro: int) -> torch.Tensor:
    return VALUES[(7 * step + micro) % 64]


def tokens(step: int) -> Tensors:
    """Hidden states of a prompt, then of one token at a time."""
    rows = VALUES[(5 * step) % 64], VALUES[(5 * step + 1) % 64]
    return [rows[0], *(rows[1][:, i : i + 1] for i in range(DECODED))]


class Reference:
    """Gives what each step must find."""

    def __init__(self) -> None:
        quota = TenantQuotas(LIMITS, ByteBudget(LIMITS.held_bytes, "reference")).of("reference")
        self._session = TenantSession(TRUNK, open_request(OPEN), LIMITS, quota)
        self._adapters = fresh_adapters()
        self._found: list[Tensors] = []

    def found(self, step: int) -> Tensors:
        """Outputs of the micro-batches, their gradients, and the outputs of what is decoded."""
        while len(self._found) < step:
            self._found.append(self._step(len(self._found) + 1))
        return self._found[step - 1]

    def _step(self, step: int) -> Tensors:
        take_step(self._adapters, step)
        structure, tensors = self._adapters
        values = tuple(value for value, _ in tensors)
        push = StatePush(step, 0, structure, values, tuple(t.detach().clone() for _, t in tensors))
        found: list[Any] = []
        session = self._session
        for micro in range(MICROS):
            forward = ForwardRequest(
                hidden_states(step, micro),
                request_id=f"{micro}",
                keep_graph=True,
                training=True,
                state_version=step,
                push=push,
            )
            found.append(session.forward(forward).hidden_BTD)
        for micro in range(MICROS):
            names = tuple(value.names[0] for value in values)
            backward = BackwardRequest(hidden_states(step, micro) + 1, f"{micro}", values=names)
            answer = session.backward(backward)
            found += [answer.gradient_BTD, *(answer.values[name] for name in names)]
        for hidden in tokens(step):
            request = ForwardRequest(hidden, cache_id=f"{step}", state_version=step)
            found.append(session.forward(request).hidden_BTD)
        session.release([], [f"{step}"])
        return [tensor.clone() for tensor in found]


REFERENCE = Reference()
