"""How a forward will be held, decided and reserved before it is computed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from trunk_service.budget import ByteBudget
from trunk_service.offload import OffloadArea, OffloadedGraph
from trunk_service.requests import HeldMode

logger = logging.getLogger(__name__)


class Room:
    """Reserved bytes for one forward: its graph here, its graph elsewhere, or its input alone.

    Args:
        budget: The session's byte budget.
        graph_bytes: What the graph will hold.
        boundary: Bytes of the hidden states that come in; they stay in any case.
        offload: Where a graph may rest that does not fit; None for nowhere.

    Raises:
        ResourceExhaustedError: If not even the boundary fits.
    """

    def __init__(
        self, budget: ByteBudget, graph_bytes: int, boundary: int, offload: OffloadArea | None
    ) -> None:
        self._budget = budget
        self.offloaded: OffloadedGraph | None = None
        self.mode = HeldMode.RECOMPUTED
        self.reserved_bytes = boundary
        if budget.try_reserve(boundary + graph_bytes):
            self.mode, self.reserved_bytes = HeldMode.RETAINED, boundary + graph_bytes
            return
        budget.reserve(boundary)
        if offload is not None:
            self.offloaded = offload.open(graph_bytes)
        if self.offloaded is not None:
            self.mode = HeldMode.OFFLOADED

    @property
    def keeps_graph(self) -> bool:
        """Whether autograd should record."""
        return self.mode is not HeldMode.RECOMPUTED

    def catch(self, weights: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
        """Where the forward is computed in, if its graph is to rest elsewhere."""
        return contextlib.nullcontext() if self.offloaded is None else self.offloaded.catch(weights)

    def settle(self) -> None:
        """Takes the graph away, once the forward is done; if that fails it will be recomputed."""
        if self.offloaded is None:
            return
        try:
            self.offloaded.take_away()
        except OSError as error:
            logger.warning("a graph could not be offloaded, it will be recomputed: %s", error)
            self.give_up_graph()

    def give_up_graph(self) -> None:
        """Lets go of a graph that rests elsewhere."""
        if self.offloaded is not None:
            self.offloaded.close()
            self.offloaded, self.mode = None, HeldMode.RECOMPUTED

    def close(self) -> None:
        """Gives everything back; may be called again."""
        self.give_up_graph()
        self._budget.release(self.reserved_bytes)
        self.reserved_bytes = 0
