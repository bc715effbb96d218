"""Sessions of one trunk in this process, and what a client that generates sends them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig

from shared.adapters.config import config_to_json
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
    ) -> TenantSession:
        split = self.trunk.info.split
        as_json = "" if config is None else config_to_json(config)
        terms = OpenRequest("", split.start, split.end, as_json, seed)
        tenant = f"tenant{len(self.sessions)}"
        session = TenantSession(self.trunk, terms, limits, self.quotas.of(tenant))
        self.sessions.append(session)
        return session

    def together(self, *asked: tuple[TenantSession, ForwardRequest]) -> list[Outcome]:
        return self.decoding.run(asked)


@dataclass
class Stream:
    """What one client sends: a prompt, then a token at a time; the same however it is computed."""

    session: TenantSession
    rows: int = 1
    prompt: int = 7
    padded: int = 0
    seed: int = 0
    cache_id: str = "c"
    edits: dict[int, list[CacheEdit]] = field(default_factory=dict)
    """By the number of the token before which they come."""
    tokens: int = 0

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
        return ForwardRequest(hidden, mask, positions, cache_id=cache_id, cache_edits=edits)

    def alone(self, count: int) -> list[torch.Tensor]:
        self.session.caches.drop("alone")
        return [numbers(self.session.forward(self.ask(n, "alone"))) for n in range(count + 1)]

    def begin(self) -> torch.Tensor:
        self.session.caches.drop(self.cache_id)
        return numbers(self.session.forward(self.ask(0, self.cache_id)))


def numbers(answer: Any) -> torch.Tensor:
    assert isinstance(answer.hidden_BTD, torch.Tensor)
    return answer.hidden_BTD
