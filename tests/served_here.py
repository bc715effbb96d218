"""A trunk served by this very process, so that a test sees into it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.models import SplitRange
from trunk_service.identity import Authenticator
from trunk_service.limits import Limits
from trunk_service.registry import SessionRegistry
from trunk_service.scheduler import Scheduler
from trunk_service.server import TrunkServer
from trunk_service.trunk import Trunk


@dataclass(frozen=True)
class Served:
    """What serves, and where."""

    registry: SessionRegistry
    address: str


@contextmanager
def served_here(
    model: Path, split: str, workers: int = 1, limits: Limits | None = None
) -> Iterator[Served]:
    """Serves a model's blocks as ``trunkd`` does, while it lasts."""
    trunk = Trunk.load(model, SplitRange.parse(split), torch.device("cpu"), torch.float32)
    registry = SessionRegistry(trunk, limits or Limits(), Scheduler(workers, 1))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="trunkd")
    thread.start()

    async def start() -> tuple[TrunkServer, int]:
        server = TrunkServer(registry, Authenticator())
        return server, await server.start("127.0.0.1:0")

    try:
        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield Served(registry, f"127.0.0.1:{port}")
        finally:
            asyncio.run_coroutine_threadsafe(server.drain(timeout_s=1.0), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
