"""Watches what a lossy wire format does to the loss, and goes back to float32 when it is too much.

Every so many training forwards the same batch is carried through the split once more, in float32
and without gradients, with the same weights and the same dropout. How far the two losses are apart
is what the format costs at that step. It hooks into the model's forward, so any training loop has
it without a line.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from client_service.random_state import random_tensors, restore_torch
from client_service.trunk_function import TrunkFunction
from shared.errors import InvalidInputError

logger = logging.getLogger(__name__)


class WireGuard:
    """Compares losses, and raises the alarm once.

    Args:
        model: The family's ``…ForCausalLM``, around the session.
        remote: The session.
        bound: Largest relative difference of a loss to that in float32.
        every: Training forwards from one comparison to the next; the first one is compared.

    Raises:
        InvalidInputError: If the bound or the interval is not positive.
    """

    def __init__(self, model: Any, remote: TrunkFunction, bound: float, every: int) -> None:
        if not bound > 0 or every < 1:
            raise InvalidInputError(
                f"a wire drift of at most {bound} looked at every {every} forwards: both must be "
                f"positive"
            )
        self._remote, self._bound, self._every = remote, bound, every
        self._forwards = 0
        self._here = threading.local()
        self.drifts: list[float] = []
        """Relative difference of every loss that was compared, in order."""
        self.alarmed = False
        """Whether the bound was passed; everything travels in float32 since."""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.random = None
        trains = module.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        if not trains or self.alarmed or getattr(self._here, "comparing", False):
            return
        if self._forwards % self._every == 0:
            self._here.random = random_tensors()
        self._forwards += 1

    def _after(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        before, self._here.random = self._here.random, None
        if before is None:
            return
        after = random_tensors()
        self._here.comparing = True
        try:
            restore_torch(before)
            with torch.no_grad(), self._remote.in_float32():
                exact = module(*args, **kwargs | {"use_cache": False})
        finally:
            self._here.comparing = False
            restore_torch(after)
        loss, expected = _loss(output), _loss(exact)
        drift = abs(loss - expected) / max(abs(expected), torch.finfo(torch.float32).tiny)
        self.drifts.append(drift)
        if not drift <= self._bound:
            self._alarm(loss, expected)

    def _alarm(self, loss: float, expected: float) -> None:
        session = self._remote.session
        logger.warning(
            "loss %.6g with %s on the wire is further than %.3g from %.6g with float32: from now "
            "on everything travels in float32",
            *(loss, session.activation_format.value, self._bound, expected),
        )
        self._remote.in_full()
        self.alarmed = True


def _loss(output: Any) -> float:
    return float((output[0] if isinstance(output, tuple) else output.loss).detach())
