"""The client's model: the family's ordinary ``…ForCausalLM`` with a hole where the trunk is."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftConfig
from transformers import GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from client_service.connection import get_info, open_channel
from client_service.optimizer_hook import step_with
from client_service.remote_block import RemoteBlock
from client_service.remote_trunk import RemoteTrunk
from client_service.session import CONNECT_TIMEOUT_S, SessionTerms, TrunkSession
from client_service.split_peft import SplitPeftModelForCausalLM
from shared.adapters.config import check_config, config_to_json
from shared.adapters.weights import Weights, cut, load_adapter_weights, read_adapter
from shared.adapters.wrap import wrap
from shared.errors import AdapterError
from shared.models import Checkpoint, SplitRange, open_checkpoint
from shared.models.digest import client_digest
from shared.models.dropout import set_dropout
from shared.models.loading import fill
from shared.models.stand_ins import GlobalLayers

logger = logging.getLogger(__name__)

TrunkPeft: TypeAlias = "PeftConfig | Literal['same'] | None"


class SplitModelForCausalLM:
    """Loads a split model, as ``AutoModelForCausalLM`` loads a whole one."""

    @staticmethod
    def from_pretrained(
        model: str | Path,
        trunk: str = "localhost:50052",
        *,
        split: str | None = None,
        peft_config: PeftConfig | None = None,
        trunk_peft_config: TrunkPeft = "same",
        adapter: str | Path | None = None,
        seed: int = 0,
        dropout: float | None = None,
        dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype = torch.float32,
    ) -> Any:
        """Opens a session on a trunk and loads the two ends of a model around it.

        Args:
            model: Folder (whole or split layout) or hub id; only the ends' tensors are read.
            trunk: ``host:port`` of the trunk.
            split: ``START:END`` that the trunk must serve; None takes what it serves.
            peft_config: Adapter of the ends; None leaves the model without one.
            trunk_peft_config: Adapter of the trunk's blocks: ``"same"`` as the ends, another
                configuration, or None for a frozen trunk.
            adapter: Folder of a whole model's PEFT adapter to start from, cut onto the parts.
            seed: Fixes fresh adapter weights and the trunk's dropout.
            dropout: Replaces the probability of the model's own dropout layers, on both sides.
            dtype: What the ends are computed in.
            wire_dtype: What hidden states and gradients travel in.

        Returns:
            The family's ``…ForCausalLM`` in evaluation mode, as a ``PeftModel`` if it has an
            adapter. ``model.remote_trunk`` is its session.

        Raises:
            TrunkUnavailableError: If no trunk answers within a few seconds.
            ModelMismatchError: If the trunk serves another model, split or weights.
            CheckpointError: If the model cannot be read.
            AdapterError: If an adapter is refused.
        """
        weights: Weights | None = None
        if adapter is not None:
            if peft_config is not None:
                raise AdapterError("give peft_config or adapter, not both")
            peft_config, weights = read_adapter(adapter)
        trunk_config = peft_config if trunk_peft_config == "same" else trunk_peft_config
        for config in (peft_config, trunk_config):
            if config is not None:
                check_config(config)
        checkpoint = open_checkpoint(model)
        served = SplitRange.parse(split) if split else _served_split(trunk)
        served.check(checkpoint.config.num_hidden_layers)
        client_weights, trunk_weights = _cut(weights, checkpoint, served)
        if weights is not None and not trunk_weights:
            trunk_config = None  # an adapter of the ends alone
        terms = SessionTerms(
            split=(served.start, served.end),
            weight_digest=_digest(checkpoint, served),
            peft_config_json="" if trunk_config is None else config_to_json(trunk_config),
            seed=seed,
            dropout=dropout,
            wire_dtype=wire_dtype,
        )
        remote = RemoteTrunk(TrunkSession(trunk, terms))
        try:
            whole: Any = _with_hole(checkpoint, served, remote, dtype, dropout)
            if peft_config is not None:
                whole = wrap(whole, peft_config, seed, "client", SplitPeftModelForCausalLM)
                remote.proxy.requires_grad_(remote.trainable)
            if weights is not None:
                load_adapter_weights(whole, client_weights)
                if trunk_config is not None:
                    remote.session.restore(trunk_weights)
        except BaseException:
            remote.close()
            raise
        return whole.eval()


def _served_split(trunk: str) -> SplitRange:
    with open_channel(trunk) as channel:
        info = get_info(channel, trunk, CONNECT_TIMEOUT_S)
    return SplitRange(info.start_layer, info.end_layer)


def _digest(checkpoint: Checkpoint, split: SplitRange) -> str | None:
    digest = client_digest(checkpoint, split)
    if digest is None:
        logger.warning("%s does not say which trunk it belongs to: unchecked", checkpoint.source)
    return digest


def _cut(
    weights: Weights | None, checkpoint: Checkpoint, split: SplitRange
) -> tuple[Weights, Weights]:
    return ({}, {}) if weights is None else cut(weights, checkpoint.family, split)


def _with_hole(
    checkpoint: Checkpoint,
    split: SplitRange,
    remote: RemoteTrunk,
    dtype: torch.dtype,
    dropout: float | None,
) -> Any:
    family = checkpoint.family
    config = _hole_config(checkpoint.config, split)
    config._name_or_path = checkpoint.source
    with no_init_weights():
        model = family.full_class(config)
    base = getattr(model, family.base)
    block = RemoteBlock(remote, slot=split.start)
    below, above = _own_layers(list(getattr(base, family.layers)), checkpoint, split)
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
    model.remote_trunk = remote
    step_with(model, remote)
    return model


def _hole_config(config: PreTrainedConfig, split: SplitRange) -> PreTrainedConfig:
    """The whole model's configuration, with one layer for all of the trunk's."""
    trimmed = copy.deepcopy(config)
    count = config.num_hidden_layers
    if getattr(config, "layer_types", None):
        kept = config.layer_types
        trimmed.layer_types = [*kept[: split.start + 1], *kept[split.end :]]
    trimmed.num_hidden_layers = split.start + 1 + (count - split.end)
    return trimmed


def _own_layers(
    layers: list[Any], checkpoint: Checkpoint, split: SplitRange
) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """The client's blocks under their global names, below and above the hole."""
    below = [(str(i), layers[i]) for i in range(split.start)]
    above = [(str(split.end + i), layer) for i, layer in enumerate(layers[split.start + 1 :])]
    for name, layer in [*below, *above]:
        checkpoint.family.fix_layer(layer, 0, int(name))
    return below, above
