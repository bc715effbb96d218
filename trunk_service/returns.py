"""Whom it is worth waiting for: sessions that come back soon after every answer.

A client that generates sends its next token a few milliseconds after it was answered. After a joint
forward the first of them to be back would be computed alone, and the others, who come while it is,
after it: so the worker waits a moment for those who are known to be quick.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHARE = 0.75
"""Computed without the others, a forward takes nearly as long as with them, and they another one:
to wait for up to a whole one is no loss. With a quarter, eight streams fell apart into two or three
groups that each waited for the other: 200 tokens/s instead of 300."""

_LONGEST_S = 0.25
_FORGOTTEN_AFTER_S = 60.0


@dataclass
class _Session:
    answered_at: float
    patience_s: float
    """How long it is waited for: a share of what its last forward took."""
    returned_after_s: float = 0.0
    """How long it was away the last time; at first it is believed to be quick."""


class Returns:
    """When sessions were answered and how long they stay away."""

    def __init__(self) -> None:
        self._sessions: dict[str, _Session] = {}

    def answered(self, session: str, now: float, took_s: float) -> None:
        """Notes that a session was answered after a forward that took so long."""
        before = self._sessions.get(session)
        away_s = 0.0 if before is None else before.returned_after_s
        patience_s = min(_SHARE * took_s, _LONGEST_S)
        self._sessions[session] = _Session(now, patience_s, away_s)

    def came(self, session: str, now: float, joint: bool = True) -> None:
        """Notes that a session has asked again; for a joint forward, or for something else."""
        if (known := self._sessions.get(session)) is not None:
            known.patience_s = 0.0  # it is here
            if joint:
                known.returned_after_s = now - known.answered_at

    def wait_s(self, now: float) -> float:
        """How long to wait for those who are due; 0 if nobody is."""
        for session, known in list(self._sessions.items()):
            if now - known.answered_at > _FORGOTTEN_AFTER_S:
                del self._sessions[session]
        left = [
            known.answered_at + known.patience_s - now
            for known in self._sessions.values()
            if known.returned_after_s <= known.patience_s
        ]
        return max(0.0, max(left, default=0.0))
