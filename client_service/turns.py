"""Whose turn it is to compute, while several micro-batches are on their way at once.

Each micro-batch runs in a thread of its own, and one of them computes at a time: a thread that
waits for the trunk lets another one go on. A micro-batch passes through stages (the bottom's
forward; the top with the loss and its backward; the bottom's backward), each of which ends with a
wait. Every stage is passed in the order of the micro-batches, so that sums over them are taken in
the same order, to the same bits, however the waits turn out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from client_service.random_state import random_tensors, restore_torch
from shared.seeding import seed_from

_FINISHED = 1 << 30


class AbandonedError(Exception):
    """Another micro-batch failed: this one is not needed any more."""


class Turns:
    """The order in which micro-batches compute.

    Args:
        count: Of micro-batches.
        in_flight: How many may have begun and not finished.
        seed: Of their random draws.
    """

    def __init__(self, count: int, in_flight: int, seed: int) -> None:
        self._changed = threading.Condition()
        self._passed = [0] * count
        self._wanting: set[int] = set()
        self._in_flight = in_flight
        self._busy = self._abandoned = False
        self._random = [_seeded(seed, micro) for micro in range(count)]

    def take(self, micro: int) -> None:
        """Waits until this micro-batch may compute its next stage.

        Raises:
            AbandonedError: If another one failed.
        """
        with self._changed:
            self._wanting.add(micro)
            self._changed.wait_for(lambda: self._abandoned or self._next() == micro)
            self._wanting.discard(micro)
            if self._abandoned:
                raise AbandonedError
            self._busy = True
            self._passed[micro] += 1
        self._swap_random(micro)

    def give(self, micro: int, finished: bool = False) -> None:
        """Lets another one compute."""
        self._swap_random(micro)
        with self._changed:
            self._busy = False
            if finished:
                self._passed[micro] = _FINISHED
            self._changed.notify_all()

    def abandon(self) -> None:
        """Ends all that wait: one of them failed."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def _swap_random(self, micro: int) -> None:
        """Exchanges a micro-batch's own generators' states with torch's."""
        before = random_tensors()
        restore_torch(self._random[micro])
        self._random[micro] = before

    def _next(self) -> int | None:
        """Who computes next: one that has not begun before one with a loss, before one below."""
        if self._busy:
            return None
        ready = [micro for micro in self._wanting if self._may(micro)]
        return min(ready, key=lambda micro: (self._passed[micro], micro), default=None)

    def _may(self, micro: int) -> bool:
        stage = self._passed[micro]
        if any(passed <= stage for passed in self._passed[:micro]):
            return False
        begun = sum(0 < passed < _FINISHED for passed in self._passed)
        return stage > 0 or begun < self._in_flight


def _seeded(seed: int, micro: int) -> dict[str, torch.Tensor]:
    """The states of a micro-batch's own generators."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_from("micro-batch", seed, micro))
        return random_tensors()


@dataclass(frozen=True)
class Turn:
    """A micro-batch of :class:`Turns`, as the thread that runs it knows it."""

    turns: Turns
    micro: int


_here = threading.local()


def current_turn() -> Turn | None:
    """The micro-batch that this thread runs; None outside of :func:`in_turn`."""
    return getattr(_here, "turn", None)


@contextmanager
def in_turn(turn: Turn) -> Iterator[None]:
    """Runs a micro-batch in this thread, from its first stage to its last."""
    turn.turns.take(turn.micro)
    _here.turn = turn
    try:
        yield
    except AbandonedError:
        raise  # whoever ended it has the turn
    except BaseException:
        turn.turns.abandon()
        turn.turns.give(turn.micro, finished=True)
        raise
    else:
        turn.turns.give(turn.micro, finished=True)
    finally:
        _here.turn = None


@contextmanager
def others_compute() -> Iterator[None]:
    """Lets the other micro-batches compute while this thread waits; nothing outside of a turn.

    A wait within a wait is part of it: whatever is asked again meanwhile, one stage has ended.
    """
    turn = current_turn()
    if turn is None:
        yield
        return
    turn.turns.give(turn.micro)
    _here.turn = None
    try:
        yield
    finally:
        turn.turns.take(turn.micro)
        _here.turn = turn
