"""What a trunk was last sent of the adapters in its blocks, and what has changed since.

Contents are compared: ``.data.copy_`` and optimizers that write by kernels of their own leave no
mark on a tensor's version counter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from shared.adapters.state_push import StatePush
from shared.adapters.structure import Structure, Value

Tensors = Sequence[tuple[Value, torch.Tensor]]


class SentState:
    """The adapters as the trunk has them. Not thread-safe.

    Args:
        base: Tensors that the trunk has of itself, by name: need not be sent as long as they are
            the same and frozen.
    """

    def __init__(self, base: Mapping[str, torch.Tensor]) -> None:
        self._base = base
        self._versions = itertools.count(1)
        self.forget()

    def forget(self) -> None:
        """Takes the trunk to have nothing: the next push is all there is."""
        self.version = 0
        self._structure, self._values = Structure(), tuple[Value, ...]()
        self._pushed: dict[str, Value] = {}
        self._numbers: dict[str, torch.Tensor] = dict(self._base)

    def content(self) -> tuple[Structure, tuple[Value, ...], tuple[torch.Tensor, ...]]:
        """Structure, values and their numbers, none of them to be written."""
        numbers = tuple(self._numbers[value.names[0]] for value in self._values)
        return self._structure, self._values, numbers

    def push(self, structure: Structure, tensors: Tensors) -> StatePush | None:
        """Notes what the adapters are now; returns what to send, or None if nothing has changed."""
        self._forget_absent({value.names[0] for value, _ in tensors})
        changed = [(value, tensor) for value, tensor in tensors if self._differs(value, tensor)]
        self._values = tuple(value for value, _ in tensors)
        same_structure = structure == self._structure and self.version > 0
        if same_structure and not changed:
            return None
        since, self.version = self.version, next(self._versions)
        copies = [tensor.detach().to("cpu", copy=True).contiguous() for _, tensor in changed]
        for (value, _), copied in zip(changed, copies, strict=True):
            self._pushed[value.names[0]] = value
            self._numbers[value.names[0]] = copied
        self._structure = structure
        return StatePush(
            self.version,
            since,
            None if same_structure else structure,
            tuple(value for value, _ in changed),
            tuple(copies),
        )

    def replay(
        self, structure: Structure, values: tuple[Value, ...], numbers: tuple[torch.Tensor, ...]
    ) -> StatePush:
        """A push of all there was at another time; the next one is all there is now."""
        self.forget()
        return StatePush(next(self._versions), 0, structure, values, numbers)

    def _forget_absent(self, names: set[str]) -> None:
        """The trunk drops what is of no adapter any more; what comes again is sent again."""
        for name in self._pushed.keys() - names:
            del self._pushed[name], self._numbers[name]
            if name in self._base:
                self._numbers[name] = self._base[name]

    def _differs(self, value: Value, tensor: torch.Tensor) -> bool:
        known = self._numbers.get(value.names[0])
        if known is None or not same_numbers(known, tensor):
            return True
        # A base tensor is sent once it is to be trained: its gradient is wanted.
        sent = self._pushed.get(value.names[0], Value(value.names, is_buffer=value.is_buffer))
        return sent != value


def same_numbers(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether a tensor is, to the bit, what was sent; NaNs are compared by their bits too."""
    if known.shape != tensor.shape or known.dtype != tensor.dtype:
        return False
    here = tensor.detach().cpu()
    return torch.equal(known, here) or _same_bits(known, here)


def _same_bits(known: torch.Tensor, tensor: torch.Tensor) -> bool:
    if not known.is_floating_point() or not bool(known.isnan().any()):
        return False
    pairs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (known, tensor))
    return torch.equal(*pairs)
