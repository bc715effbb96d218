"""The family's ordinary ``…ForCausalLM`` whose middle blocks the trunk computes.

Every module is there under its own name, so stock PEFT, optimizers and savers find all adapter
parameters of all blocks; only the middle blocks' matrices are elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from client_service.hole import hole_config, own_layers
from client_service.session import TrunkSession
from client_service.trunk_blocks import Passage, put_in_place
from client_service.trunk_function import TrunkFunction
from shared.errors import InvalidInputError, SharedWeightsError
from shared.models import Checkpoint, SplitRange
from shared.models.loading import fill
from shared.models.stand_ins import GlobalLayers
from shared.skeleton import Fetch, RemoteTensor, skeleton_blocks
from shared.wire.dtypes import to_torch


def with_skeleton(
    checkpoint: Checkpoint, split: SplitRange, session: TrunkSession, dtype: torch.dtype
) -> Any:
    """Loads the two ends of a model around the trunk's blocks.

    Args:
        checkpoint: Whole or split; only the ends' tensors are read.
        split: Blocks of the trunk.
        session: On a trunk that serves them.
        dtype: What the ends are computed in.

    Returns:
        The family's ``…ForCausalLM`` in evaluation mode, of its own class name. ``model.passage``
        leads to the trunk.

    Raises:
        CheckpointError: If a tensor is missing or damaged.
        TrunklineError: If the trunk does not give the blocks' vectors.
    """
    family, config = checkpoint.family, checkpoint.config
    vectors, linear = session.fetch([])
    theirs = to_torch(session.info.compute_dtype)
    function = TrunkFunction(session, vectors, theirs)
    with no_init_weights():
        model = _split_class(family.full_class)(hole_config(config, split))
    base = getattr(model, family.base)
    below, above = own_layers(list(getattr(base, family.layers)), checkpoint, split)
    setattr(base, family.layers, GlobalLayers([*below, *above]))
    fill(model, checkpoint, dtype)
    model.tie_weights()
    blocks = skeleton_blocks(
        config, family, split, vectors, theirs, _Fetches(function), linear=frozenset(linear)
    )
    setattr(base, family.layers, GlobalLayers([*below, *blocks, *above]))
    _use_whole_config(model, config)
    passage = Passage(model, family, split, function)
    for index, (_, block) in enumerate(blocks):
        put_in_place(block, passage, first=index == 0)
    passage.watch_mask()
    if (Path(checkpoint.folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.config._name_or_path = checkpoint.source
    model.passage = passage
    # DDP neither broadcasts nor reduces what is the trunk's.
    model._ddp_params_and_buffers_to_ignore = _TrunkNames(model)
    return model.eval()


class _Split:
    """Mixed into the family's class: refuses what would leave the trunk's blocks out."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: what it would write loads elsewhere with random numbers in the trunk's blocks.

        Raises:
            SharedWeightsError: Always.
        """
        raise SharedWeightsError(
            "the trunk's blocks are not here, so this model cannot be saved whole: accepted is "
            "save_pretrained of the PEFT model around it, which writes its adapter"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: continuous batching keeps its cache in attention layers, which are the trunk's.

        Raises:
            InvalidInputError: Always.
        """
        raise InvalidInputError(
            "continuous batching needs the caches of all blocks here: accepted is generate()"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made as the program runs, so pickle is told how."""
        return _again, (type(self).__bases__[1],), self.__dict__


_classes: dict[type, type] = {}


def _split_class(plain: type) -> Any:
    if plain not in _classes:
        # Its own name: libraries decide by it.
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
        _classes[plain] = type(plain.__name__, (_Split, plain), body)
    return _classes[plain]


def _again(plain: type) -> Any:
    return object.__new__(_split_class(plain))


@dataclass(frozen=True)
class _Fetches:
    """Reads the trunk's matrices."""

    function: TrunkFunction

    def __call__(self, name: str, transposed: bool) -> Fetch:
        return _FetchOne(self.function, name)


@dataclass(frozen=True)
class _FetchOne:
    function: TrunkFunction
    name: str

    def __call__(self) -> torch.Tensor:
        return self.function.fetch(self.name)


@dataclass(frozen=True)
class _TrunkNames:
    """Names of a model's remote tensors, as seen from it and from PEFT's model around it."""

    model: nn.Module

    def __iter__(self) -> Any:
        names = [n for n, p in self.model.named_parameters() if isinstance(p, RemoteTensor)]
        return iter([prefix + name for name in names for prefix in ("", "base_model.model.")])


def _use_whole_config(model: Any, config: Any) -> None:
    """Gives every module the whole model's number of layers, and each block its place in caches."""
    layers: Any = next(m for m in model.modules() if isinstance(m, GlobalLayers))
    for index, block in enumerate(layers):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index
    for own in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        own.num_hidden_layers = config.num_hidden_layers
        if getattr(config, "layer_types", None):
            own.layer_types = list(config.layer_types)
