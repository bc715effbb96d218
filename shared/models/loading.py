"""Loading one part, reading only the tensors that part needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from shared.errors import CheckpointError
from shared.models.checkpoint import Checkpoint, open_checkpoint
from shared.models.families import HEAD

LM_HEAD = f"{HEAD}.weight"

_DRAWING = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")


class Undrawn(TorchFunctionMode):
    """Draws no fresh weights, in this thread, for who reads them from a file.

    What transformers has for this replaces torch's functions in all threads of the process, which
    then make adapters of whatever the memory held.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Leaves a tensor as it is, or does what was asked."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWING:  # torch's, or what stands in its place
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_part(
    cls: Any,
    model: str | Path | Checkpoint,
    *,
    start_layer: int | None = None,
    end_layer: int | None = None,
    dtype: torch.dtype = torch.float32,
    config: PreTrainedConfig | None = None,
) -> Any:
    """Loads a part from a whole or split checkpoint.

    Args:
        cls: A class of :mod:`shared.models.parts`.
        model: Folder, hub id, or an opened checkpoint.
        start_layer: First block held; None for the bottom, or what a split layout says.
        end_layer: First block above; None for the top, or what a split layout says.
        dtype: What the weights are converted to.
        config: Replaces the checkpoint's configuration.

    Returns:
        The part in evaluation mode, every parameter loaded.

    Raises:
        CheckpointError: If the checkpoint lacks a tensor, a shape differs, or a file is damaged.
        SplitError: If the model has no such blocks.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if checkpoint.family is not cls.family:
        raise CheckpointError(
            f"{checkpoint.source}: holds a {checkpoint.family.model_type} model, "
            f"{cls.__name__} takes {cls.family.model_type}"
        )
    described = checkpoint.metadata.get(cls.role, {})
    config = config or checkpoint.config
    start = _first(start_layer, described.get("start_layer"), 0)
    end = _first(end_layer, described.get("end_layer"), config.num_hidden_layers)
    with Undrawn():
        part = cls.for_range(config, start, end)
    fill(part, checkpoint, dtype)
    return part.eval()


def fill(module: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Gives every parameter and persistent buffer of a module its value from a checkpoint.

    Names that end up on one shared parameter (tied embeddings) are read once. A tied checkpoint
    lacks the head's weight, which is then that of the embedding.

    Raises:
        CheckpointError: If a tensor is missing or its shape differs; the module is then unusable.
    """
    state = module.state_dict()
    loaded = {name: _read(checkpoint, name, like, dtype) for name, like in state.items()}
    module.load_state_dict(loaded, strict=True, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)


def _read(
    checkpoint: Checkpoint, name: str, like: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    stored_name = name
    tied = checkpoint.config.tie_word_embeddings
    if name == LM_HEAD and name not in checkpoint and tied:
        stored_name = checkpoint.family.embedding_key
    stored = checkpoint.read(stored_name)
    if stored.shape != like.shape:
        raise CheckpointError(
            f"{checkpoint.source}: {stored_name} has shape {tuple(stored.shape)}, "
            f"the configuration asks for {tuple(like.shape)}"
        )
    # A copy, so that nothing keeps leaning on the mapped file, which may change under a daemon.
    target = dtype if stored.is_floating_point() else stored.dtype
    return stored.to(target, copy=True)


def _first(*values: int | None) -> int:
    return int(next(v for v in values if v is not None))
