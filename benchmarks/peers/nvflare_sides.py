"""The two sides of :mod:`benchmarks.peers.nvflare_peer`, which the simulator starts by class name.

Its server runs the loop and so holds the ends; its one client holds the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.collab import collab
from nvflare.fuel.utils import fobs

from benchmarks.peers import models
from benchmarks.peers.driving import Task

CALL_TIMEOUT_S = 120.0


class Remote(torch.autograd.Function):
    """The client's two functions as one with a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: torch.Tensor, trunk: Callable[[], Any]) -> torch.Tensor:
        ctx.trunk = trunk
        answer: torch.Tensor = trunk().forward(hidden_BTD.detach())
        return answer

    @staticmethod
    def backward(ctx: Any, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.trunk().backward(gradient_BTD), None


class Ends:
    """The server: does the steps that the harness asks for."""

    def __init__(self, model: str, adapter: str, host: str, port: int, threads: int) -> None:
        self.model, self.adapter, self.threads = model, adapter, threads
        self.host, self.port = host, port

    @collab.main
    def run(self) -> None:
        """Serves the harness until it is done."""
        fobs.register(TensorDecomposer)
        torch.set_num_threads(self.threads)
        paths = Path(self.model), Path(self.adapter)
        ends = models.Ends(*paths)
        client = collab.clients[0]

        def trunk() -> Any:
            return client(timeout=CALL_TIMEOUT_S)

        trunk().load()

        def step(ids: torch.Tensor) -> float:
            loss = ends.loss(ids, lambda hidden_BTD: Remote.apply(hidden_BTD, trunk))
            loss.backward()
            ends.optimizer.step()
            ends.optimizer.zero_grad()
            return float(loss.detach())

        Task(*paths, (self.host, self.port), self.threads).serve(step)


class Trunk:
    """The client: answers the server's calls."""

    def __init__(self, model: str, adapter: str, threads: int) -> None:
        self.model, self.adapter, self.threads = model, adapter, threads
        self._middle: models.Middle | None = None

    @collab.publish
    def load(self) -> None:
        """Loads the trunk, in the process that will answer."""
        fobs.register(TensorDecomposer)
        self._middle = models.Middle(Path(self.model), Path(self.adapter))

    @collab.publish
    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Carries hidden states up."""
        torch.set_num_threads(self.threads)  # of whichever thread answers
        assert self._middle is not None
        return self._middle.forward(hidden_BTD)

    @collab.publish
    def backward(self, gradient_BTD: torch.Tensor) -> torch.Tensor:
        """Carries a gradient down and steps, which spares a third call."""
        torch.set_num_threads(self.threads)
        assert self._middle is not None
        gradient_BTD = self._middle.backward(gradient_BTD)
        self._middle.step()
        return gradient_BTD
