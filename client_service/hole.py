"""The family's ordinary ``…ForCausalLM`` with one :class:`RemoteBlock` where the trunk's are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from client_service.optimizer_hook import step_with
from client_service.remote_block import RemoteBlock
from client_service.remote_trunk import RemoteTrunk
from client_service.split_ends import split_class
from shared.models import Checkpoint, SplitRange
from shared.models.dropout import set_dropout
from shared.models.loading import fill
from shared.models.onednn import use_onednn
from shared.models.quantization import quantize as quantize_layers
from shared.models.single_row import spread_single_rows
from shared.models.stand_ins import GlobalLayers


def with_hole(
    checkpoint: Checkpoint,
    split: SplitRange,
    remote: RemoteTrunk,
    dtype: torch.dtype,
    dropout: float | None,
    quantize: str = "",
    fused_loss: bool = False,
    onednn: bool = False,
) -> Any:
    """Loads the two ends of a model around a session.

    Args:
        checkpoint: Whole or split; only the ends' tensors are read.
        split: Blocks of the trunk.
        remote: The session.
        dtype: What the ends are computed in.
        dropout: Replaces the probability of the model's own dropout layers.
        quantize: Kind of :mod:`shared.models.quantization`; empty for none.
        fused_loss: See :mod:`client_service.fused_loss`.
        onednn: See :mod:`shared.models.onednn`.

    Returns:
        The family's ``…ForCausalLM``; ``remote_trunk``, ``whole_config`` and ``split`` are its
        session, the whole model's configuration and the trunk's blocks.

    Raises:
        CheckpointError: If a tensor is missing or damaged.
        InvalidInputError: If oneDNN is asked for in another dtype than float32.
    """
    family = checkpoint.family
    config = hole_config(checkpoint.config, split)
    config._name_or_path = checkpoint.source
    with no_init_weights():
        model = split_class(family.full_class, fused_loss)(config)
    base = getattr(model, family.base)
    block = RemoteBlock(remote, slot=split.start)
    below, above = own_layers(list(getattr(base, family.layers)), checkpoint, split)
    setattr(base, family.layers, GlobalLayers([*below, *above]))
    fill(model, checkpoint, dtype)
    model.tie_weights()
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning
    setattr(base, family.layers, GlobalLayers([*below, ("remote", block), *above]))
    block.watch_mask(base)
    if dropout is not None:
        set_dropout(model, dropout)
    if (Path(checkpoint.folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    if quantize:
        quantize_layers(model, quantize)
    if onednn:
        use_onednn(model, dtype, model.device)
    spread_single_rows(model)
    model.remote_trunk = remote
    model.whole_config, model.split = checkpoint.config, split
    step_with(model, remote)
    return model


def hole_config(config: PreTrainedConfig, split: SplitRange) -> PreTrainedConfig:
    """The whole model's configuration, with one layer for all of the trunk's."""
    trimmed = copy.deepcopy(config)
    count = config.num_hidden_layers
    if getattr(config, "layer_types", None):
        kept = config.layer_types
        trimmed.layer_types = [*kept[: split.start + 1], *kept[split.end :]]
    trimmed.num_hidden_layers = split.start + 1 + (count - split.end)
    return trimmed


def own_layers(
    layers: list[Any], checkpoint: Checkpoint, split: SplitRange
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The client's blocks under their global names, below and above the hole."""
    below = [(str(i), layers[i]) for i in range(split.start)]
    above = [(str(split.end + i), layer) for i, layer in enumerate(layers[split.start + 1 :])]
    for name, layer in [*below, *above]:
        checkpoint.family.fix_layer(layer, 0, int(name))
    return below, above
