"""Byte budgets: what is about to be held is reserved before it is computed."""

from __future__ import annotations

import contextlib
import threading

from shared.errors import ResourceExhaustedError


class ByteBudget:
    """A number of bytes to reserve from, within a parent's if there is one.

    Args:
        limit: Bytes in all.
        name: Whose budget it is, for messages.
        parent: A larger budget that every reservation counts against too.
    """

    def __init__(self, limit: int, name: str, parent: ByteBudget | None = None) -> None:
        self.limit = limit
        self._name = name
        self._parent = parent
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes reserved now."""
        return self._used

    def fits(self, count: int) -> bool:
        """Tells whether a reservation would succeed now."""
        inside = self._used + count <= self.limit
        return inside and (self._parent is None or self._parent.fits(count))

    def reserve(self, count: int) -> None:
        """Takes ``count`` bytes.

        Raises:
            ResourceExhaustedError: If they do not fit; nothing was taken.
        """
        with self._lock:
            if self._used + count > self.limit:
                # What all tenants hold together is no one tenant's business.
                held = f": {self._used} of {self.limit} are held" if self._parent else ""
                raise ResourceExhaustedError(
                    f"{count} bytes more than the {self._name} budget allows{held}"
                )
            if self._parent is not None:
                self._parent.reserve(count)
            self._used += count

    def try_reserve(self, count: int) -> bool:
        """Takes ``count`` bytes if they fit; tells whether they did."""
        if not self.fits(count):
            return False
        with contextlib.suppress(ResourceExhaustedError):  # another tenant may be faster
            self.reserve(count)
            return True
        return False

    def release(self, count: int) -> None:
        """Gives ``count`` reserved bytes back."""
        with self._lock:
            assert 0 <= count <= self._used, (self._name, count, self._used)
            self._used -= count
            if self._parent is not None:
                self._parent.release(count)
