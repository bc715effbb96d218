"""Sessions of one trunk in this process, and what a client that generates sends them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model

from client_service.adapter_structure import adapter_structure, adapter_tensors
from client_service.sent_state import SentState
from shared.adapters.state_push import StatePush
from shared.models import SplitRange
from tests.models import save_tiny_model
from trunk_service.budget import ByteBudget
from trunk_service.joint_decoding import JointDecoding, Outcome
from trunk_service.limits import Limits
from trunk_service.quotas import TenantQuotas
from trunk_service.requests import CacheEdit, ForwardRequest, OpenRequest
from trunk_service.session import TenantSession
from trunk_service.trunk import Trunk

WIDTH = 64
LIMITS = Limits()


def lora(**changes: Any) -> LoraConfig:
    """One that does something from the start."""
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(task_type="CAUSAL_LM", **settings | changes)


def load(family: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Trunk:
    save_tiny_model(family, folder, **changes)
    return Trunk.load(folder, SplitRange(2, 4), torch.device("cpu"), dtype)


class Client:
    """The same blocks with an adapter of its own, and a session that is told of it."""

    def __init__(self, trunk: Trunk, session: TenantSession, config: PeftConfig | None) -> None:
        self.session, self._trunk = session, trunk
        self.model: Any = copy.deepcopy(trunk._part)
        self._configs = {} if config is None else {"default": copy.deepcopy(config)}
        for own in self._configs.values():
            own.fan_in_fan_out = trunk.info.model_type == "gpt2"
            inject_adapter_in_model(own, self.model)
        self._sent = SentState({})
        if config is not None:
            self.forward(ForwardRequest(torch.zeros(1, 1, WIDTH)))

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Of the adapter, by the names that the trunk calls them by."""
        return {n: t for n, t in self._tensors() if t.requires_grad}

    def forward(self, request: ForwardRequest) -> Any:
        """With what has changed of the adapter, if anything has."""
        push = self._push() if self._configs else None
        asked = replace(request, push=push, state_version=self._sent.version)
        return self.session.forward(asked)

    @property
    def version(self) -> int:
        return self._sent.version

    def _push(self) -> StatePush | None:
        values = {v.names[0]: v for v, _ in adapter_tensors(self._blocks(), torch.float32)}
        tensors = [(values[name], tensor) for name, tensor in self._tensors()]
        return self._sent.push(adapter_structure(self._blocks(), self._configs), tensors)

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        own = {name for name, p in self._trunk._part.named_parameters() if p.ndim > 1}
        found = adapter_tensors(self._blocks(), torch.float32)
        return [(v.names[0], t) for v, t in found if v.names[0] not in own and not v.is_buffer]

    def _blocks(self) -> list[tuple[str, Any]]:
        prefix, modules = self.model.family.layer_prefix, dict(self.model.named_modules())
        return [(n, m) for n, m in modules.items() if n.startswith(prefix) and n.count(".") == 2]


class Host:
    """A trunk's sessions and what computes their tokens together."""

    def __init__(self, trunk: Trunk, held_bytes: int = 10**9) -> None:
        self.trunk = trunk
        self.budget = ByteBudget(held_bytes, "trunk's")
        self.quotas = TenantQuotas(LIMITS, self.budget)
        self.decoding = JointDecoding(trunk, self.budget)
        self.sessions = list[TenantSession]()

    def open(
        self, config: PeftConfig | None = None, seed: int = 0, limits: Limits = LIMITS
    ) -> Client:
        split = self.trunk.info.split
        tenant = f"tenant{len(self.sessions)}"
        terms = OpenRequest("", split.start, split.end)
        session = TenantSession(self.trunk, terms, limits, self.quotas.of(tenant))
        self.sessions.append(session)
        torch.manual_seed(seed)
        return Client(self.trunk, session, config)

    def together(self, *asked: tuple[TenantSession, ForwardRequest]) -> list[Outcome]:
        return self.decoding.run(asked)


@dataclass
class Stream:
    """What one client sends: a prompt, then a token at a time; the same however it is computed."""

    client: Client
    rows: int = 1
    prompt: int = 7
    padded: int = 0
    seed: int = 0
    cache_id: str = "c"
    edits: dict[int, list[CacheEdit]] = field(default_factory=dict)
    """By the number of the token before which they come."""
    tokens: int = 0

    @property
    def session(self) -> TenantSession:
        return self.client.session

    def ask(self, number: int, cache_id: str) -> ForwardRequest:
        """Number 0 is the prompt."""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        edits = self.edits.get(number, [])
        new = self.prompt if number == 0 else 1
        self.tokens = new + (self.tokens if number else 0)
        self.tokens -= sum(e.remove_tokens or 0 for e in edits)
        mask = torch.ones(self.rows, self.tokens, dtype=torch.bool)
        mask[0, : self.padded] = False
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        hidden = torch.randn(self.rows, new, WIDTH, generator=generator)
        return ForwardRequest(
            hidden,
            mask,
            positions,
            cache_id=cache_id,
            cache_edits=edits,
            state_version=self.client.version,
        )

    def alone(self, count: int) -> list[torch.Tensor]:
        self.session.caches.drop("alone")
        return [numbers(self.client.forward(self.ask(n, "alone"))) for n in range(count + 1)]

    def begin(self) -> torch.Tensor:
        self.session.caches.drop(self.cache_id)
        return numbers(self.client.forward(self.ask(0, self.cache_id)))


def numbers(answer: Any) -> torch.Tensor:
    assert isinstance(answer.hidden_BTD, torch.Tensor)
    return answer.hidden_BTD
