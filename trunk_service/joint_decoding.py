"""Forwards of one token each, of several sessions, computed as one.

A token's forward reads all weights for a single row: with more rows at once they are read once for
all. Every request is checked and its cache is made ready alone, then what is fine is computed
together; what is not, or cannot be put beside others, is computed alone as ever, and so is
everything if computing together fails.

Dimension letters: N rows of all, B rows of a session, T tokens, S tokens with those in the cache,
D model dimension.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from shared.errors import ResourceExhaustedError, TrunklineError
from trunk_service.budget import ByteBudget
from trunk_service.mixed_adapters import MixedAdapters
from trunk_service.packed_rows import PackedRows
from trunk_service.requests import ForwardAnswer, ForwardRequest
from trunk_service.session import TenantSession
from trunk_service.stacked_rows import StackedRows
from trunk_service.trunk import Trunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of a forward."""

    give: Callable[[], ForwardAnswer]
    """Gives the answer, or raises; computes it first where that is done alone."""
    joint: bool = False
    """Whether it was computed together with others."""


_MAX_STACKS = 4  # so that sessions that take turns in two groups do not undo each other's


@dataclass(frozen=True)
class _Begun:
    """A forward whose cache has room for its token and every edit behind it."""

    session: TenantSession
    request: ForwardRequest
    input_B1D: torch.Tensor
    rows: PackedRows

    def alone(self) -> ForwardAnswer:
        return self.session.forward(replace(self.request, cache_edits=[]))


class JointDecoding:
    """Computes forwards of several sessions together. One call at a time.

    Args:
        trunk: The shared blocks.
        budget: What working copies of caches are reserved from.
    """

    def __init__(self, trunk: Trunk, budget: ByteBudget) -> None:
        self._trunk, self._budget = trunk, budget
        self._mixed = MixedAdapters(trunk)
        self._stacks: list[StackedRows] = []

    def run(self, asked: Sequence[tuple[TenantSession, ForwardRequest]]) -> list[Outcome]:
        """Computes what can be computed together.

        Args:
            asked: Forwards of different sessions.

        Returns:
            The outcome of each, in the same order.
        """
        with torch.inference_mode():  # as caches were made, when each was computed alone
            return self._run(asked)

    def _run(self, asked: Sequence[tuple[TenantSession, ForwardRequest]]) -> list[Outcome]:
        begun = [self._begin(session, request) for session, request in asked]
        together = [b for b in begun if b is not None]
        answers: dict[int, ForwardAnswer] = {}
        if len(together) > 1:
            try:
                with self._mixed.in_use:
                    answers = self._compute(together)
            except ResourceExhaustedError as error:
                logger.debug("no room to compute together: %s", error)
            except Exception:
                logger.exception("computing together failed; each is computed alone")
        outcomes: list[Outcome] = []
        for one, (session, request) in zip(begun, asked, strict=True):
            if one is None:
                outcomes.append(Outcome(partial(session.forward, request)))
            elif (answer := answers.get(id(one))) is not None:
                outcomes.append(Outcome(partial(_given, answer), joint=True))
            else:
                outcomes.append(Outcome(one.alone))
        return outcomes

    def _begin(self, session: TenantSession, request: ForwardRequest) -> _Begun | None:
        """Makes a forward ready; None if it is to be computed, or refused, alone."""
        if not joinable(request):
            return None
        try:
            ready = session.begin_decoding(request)
        except TrunklineError:
            return None  # it will be said when it is done alone
        return None if ready is None else _Begun(session, request, *ready)

    def _compute(self, begun: list[_Begun]) -> dict[int, ForwardAnswer]:
        admitted = self._mixed.admit(b.session.client for b in begun)
        # In the order of the stack there is, if it is one of the same rows.
        begun = sorted(
            (b for b in begun if b.session.client in admitted), key=lambda b: b.rows.number
        )
        if len(begun) < 2:
            return {}
        stack = self._stack([b.rows for b in begun])
        info = self._trunk.info
        input_N1D = torch.cat([b.input_B1D for b in begun])
        output_N1D = self._mixed.run(
            list(itertools.chain.from_iterable([b.session.client] * b.rows.rows for b in begun)),
            inputs_embeds=input_N1D,
            attention_mask=stack.mask([self._seen(b.request) for b in begun], info.dtype),
            position_ids=torch.cat([self._positions(b) for b in begun]),
            past_key_values=stack,
            use_cache=True,
        )
        stack.commit()
        # Copies: an answer that is kept must not keep those of others.
        return {
            id(b): b.session.answer(b.request, output_N1D[rows].clone())
            for b, rows in zip(begun, stack.rows, strict=True)
        }

    def _stack(self, members: list[PackedRows]) -> StackedRows:
        self._stacks = [stack for stack in self._stacks if stack.members]
        for stack in self._stacks:
            if stack.serves(members):
                self._stacks.remove(stack)
                self._stacks.append(stack)
                return stack
        if len(self._stacks) == _MAX_STACKS:
            self._stacks.pop(0).free()
        made = StackedRows(members, self._budget)
        self._stacks.append(made)
        return made

    def _seen(self, request: ForwardRequest) -> torch.Tensor | None:
        mask = request.attention_mask
        return None if mask is None else mask.to(self._trunk.device, torch.bool)

    def _positions(self, begun: _Begun) -> torch.Tensor:
        rows = begun.rows
        given = begun.request.position_ids
        if given is None:
            given = torch.tensor([[rows.tokens]])
        return given.to(self._trunk.device).expand(rows.rows, 1)


def joinable(request: ForwardRequest) -> bool:
    """Whether a request is one for a single token whose mask is an ordinary one."""
    if not request.cache_id or request.keep_graph or request.training or request.push:
        return False
    if request.hidden_BTD.ndim != 3 or request.hidden_BTD.shape[1] != 1:
        return False
    mask = request.attention_mask
    # A row that may look at nothing at all would be given what pads it.
    return mask is None or (mask.ndim == 2 and bool((mask != 0).any(dim=-1).all()))


def _given(answer: ForwardAnswer) -> ForwardAnswer:
    return answer
