"""What a session answers that sees every message once and in order."""

from __future__ import annotations

import asyncio
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from shared.adapters.config import config_to_json
from shared.models import SplitRange
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.versions import library_versions
from tests.models import save_tiny_model
from trunk_service.budget import ByteBudget
from trunk_service.handlers import HANDLERS
from trunk_service.limits import Limits
from trunk_service.quotas import TenantQuotas
from trunk_service.session import TenantSession
from trunk_service.translate import open_request
from trunk_service.trunk import Trunk

MICROS = 2
LIMITS = Limits()


def _tiny_trunk() -> Trunk:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sizes = {"n_layer": 3, "n_embd": 8, "n_head": 1, "vocab_size": 16, "n_positions": 8}
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model("gpt2", Path(folder), **sizes)
        return Trunk.load(model, SplitRange(1, 2), torch.device("cpu"), torch.float32)


TRUNK = _tiny_trunk()
LORA = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["c_attn"], fan_in_fan_out=True)
OPEN = pb.Open(
    weight_digest=TRUNK.info.weight_digest,
    start_layer=1,
    end_layer=2,
    peft_config_json=config_to_json(LORA),
    library_versions=library_versions(),
)


class Reference:
    """A session that sees each message once and in order; every schedule sends the same ones."""

    def __init__(self) -> None:
        quota = TenantQuotas(LIMITS, ByteBudget(LIMITS.held_bytes, "reference")).of("reference")
        self._session = TenantSession(TRUNK, open_request(OPEN), LIMITS, quota)
        self._answers: list[dict[str, Any]] = []
        self.weights: list[Any] = [self._session.adapters.get("").weights()]

    def answers(self, step: int) -> dict[str, Any]:
        """What the messages of a step are answered, by kind and micro-batch."""
        while len(self._answers) < step:
            found = {}
            for message, tensors in messages(len(self._answers) + 1):
                kind = message.WhichOneof("body")
                handler = HANDLERS[kind]
                answer = handler(self._session, getattr(message, kind), tensors)
                found[name_of(message)] = answer
            self._answers.append(found)
            self.weights.append(self._session.adapters.get("").weights())
        return self._answers[step - 1]


Request = tuple[pb.SessionRequest, dict[str, torch.Tensor]]


def messages(step: int) -> list[Request]:
    """A training step: two forwards, two backwards, and the optimizer's step."""
    made: list[Request] = []
    for micro in range(MICROS):
        forward = pb.Forward(
            request_id=f"{step}-{micro}", keep_graph=True, training=True, step=step, micro=micro
        )
        tensors = {"hidden_states": VALUES[(7 * step + micro) % 64]}
        made.append((pb.SessionRequest(forward=forward), tensors))
    for micro in range(MICROS):
        backward = pb.Backward(request_id=f"{step}-{micro}", need_input_gradient=True)
        tensors = {"gradient": VALUES[(7 * step + micro) % 64] + 1}
        made.append((pb.SessionRequest(backward=backward), tensors))
    optimizer = pb.Optimizer(name="adamw", hyperparameters={"lr": 0.1})
    body = pb.Step(step=step, gradient_scale=1.0, optimizer=optimizer)
    return [*made, (pb.SessionRequest(step=body), {})]


def name_of(message: pb.SessionRequest) -> str:
    """The piece of work a message is: its kind and micro-batch."""
    kind = message.WhichOneof("body")
    return f"{kind} {getattr(getattr(message, kind), 'request_id', '')}"


LOOP = asyncio.new_event_loop()
VALUES = torch.randn(64, 1, 1, 8, generator=torch.Generator().manual_seed(0))
REFERENCE = Reference()
