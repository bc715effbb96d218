"""Dropout in the trunk's blocks, drawn from a key: the same for every retry, trunk and cut.

Each block draws from the key and its own index alone. Torch's dropout draws from the process's
generator; here each of its draws is given another one, so that threads need not wait for each
other.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import ProtocolError
from shared.seeding import keyed_generator

KEY_BYTES = 32


@contextlib.contextmanager
def keyed_draws(model: Any, key: bytes, device: torch.device) -> Iterator[None]:
    """Has a part's blocks draw from a key, while it lasts.

    Args:
        model: A part; its blocks are called by global names.
        key: As long as ``KEY_BYTES``.
        device: Where it is computed. CUDA's dropout takes no generator, so there the process's is
            seeded, and one forward draws at a time.

    Raises:
        ProtocolError: If the key has another length.
    """
    if len(key) != KEY_BYTES:
        raise ProtocolError(
            f"a dropout key of {len(key)} bytes, where dropout draws; accepted: {KEY_BYTES}"
        )
    draws = _Draws(key, device)
    layers: nn.Module = getattr(model.base, model.family.layers)
    hooks = [
        block.register_forward_pre_hook(partial(draws.begin, int(name)))
        for name, block in layers.named_children()
    ]
    alone = keyed_generator("dropout", device=device) if device.type == "cuda" else draws
    try:
        with alone:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Draws(TorchDispatchMode):
    """Gives every draw of this thread the generator of the block that runs."""

    def __init__(self, key: bytes, device: torch.device) -> None:
        super().__init__()
        self._key = key
        self._on_cuda = device.type == "cuda"
        self._generator = torch.Generator()

    def begin(self, index: int, *_: Any) -> None:
        """Lets a block begin."""
        mixed = hashlib.sha256(self._key + index.to_bytes(8, "little")).digest()
        # Torch's generators take 64 bits.
        seed = int.from_bytes(mixed[:8], "little") >> 1
        if self._on_cuda:
            torch.cuda.manual_seed(seed)
        else:
            self._generator.manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Computes one operation."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            if "generator" not in names and hasattr(func.overloadpacket, "generator"):
                func = func.overloadpacket.generator  # as torch.rand has it
                names.append("generator")
            given = dict(zip(names, args, strict=False)) | kwargs
            if "generator" in names:
                kwargs = kwargs | {"generator": given.get("generator") or self._generator}
            elif "dropout_p" not in names or given.get("dropout_p", 0.0) != 0:
                raise ProtocolError(f"{func} draws from no generator that could be keyed")
        return func(*args, **kwargs)
