"""The family's ordinary ``…ForCausalLM`` whose middle blocks the trunk computes.

Every module is there under its own name, so stock PEFT, optimizers and savers find all adapter
parameters of all blocks; only the middle blocks' matrices are elsewhere.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from client_service.ends import mark_as_ends
from client_service.fused_loss import with_fused_loss
from client_service.session import TrunkSession
from client_service.trunk_blocks import Passage, put_in_place
from client_service.trunk_function import TrunkFunction
from shared.errors import InvalidInputError, SharedWeightsError
from shared.models import Checkpoint, SplitRange
from shared.models.dropout import set_dropout
from shared.models.families import Family, family_of
from shared.models.loading import Undrawn, fill
from shared.models.onednn import use_onednn
from shared.models.quantization import quantize as quantize_layers
from shared.models.stand_ins import GlobalLayers
from shared.skeleton import Fetch, Norms, RemoteTensor, skeleton_blocks
from shared.wire.dtypes import to_torch


def with_skeleton(
    checkpoint: Checkpoint,
    split: SplitRange,
    session: TrunkSession,
    dtype: torch.dtype,
    *,
    dropout: float | None = None,
    secret: bytes | None = None,
    quantize: str = "",
    fused_loss: bool = False,
    onednn: bool = False,
) -> Any:
    """Loads the two ends of a model around the trunk's blocks.

    Args:
        checkpoint: Whole or split; only the ends' tensors are read.
        split: Blocks of the trunk.
        session: On a trunk that serves them.
        dtype: What the ends are computed in.
        dropout: Replaces the probability of the model's own dropout layers.
        secret: Of dropout keys; None takes the user's own.
        quantize: Of the ends, a kind of :mod:`shared.models.quantization`; empty for none.
        fused_loss: See :mod:`client_service.fused_loss`.
        onednn: See :mod:`shared.models.onednn`.

    Returns:
        The family's ``…ForCausalLM`` in evaluation mode, of its own class name. ``passage`` leads
        to the trunk, ``remote_trunk`` is its session, ``split`` the trunk's blocks.

    Raises:
        CheckpointError: If a tensor is missing or damaged.
        InvalidInputError: If oneDNN is asked for in another dtype than float32.
        TrunklineError: If the trunk does not give the blocks' vectors.
    """
    family, config = checkpoint.family, checkpoint.config
    with Undrawn():
        model = _split_class(family.full_class, fused_loss)(_ends_config(config, split))
    base = getattr(model, family.base)
    below, above = _own_layers(list(getattr(base, family.layers)), checkpoint, split)
    setattr(base, family.layers, GlobalLayers([*below, *above]))
    fill(model, checkpoint, dtype)
    model.tie_weights()
    if quantize:
        quantize_layers(model, quantize)
    if onednn:
        use_onednn(model, dtype, model.device)
    # A copy of the trunk's own matrices, if the digest was compared that says so.
    compared = session.terms.weight_digest is not None and "ends" not in checkpoint.metadata
    copied = checkpoint.source if compared and checkpoint.layer_names(split) else ""
    blocks = _put_blocks(model, config, family, split, session, (below, above), secret, copied)
    for name, block in blocks.items():
        _take_trained_vectors(block, f"{family.layer_prefix}{name}", checkpoint)
    model.passage.watch_calls()
    if dropout is not None:
        set_dropout(model, dropout)
    if (Path(checkpoint.folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.config._name_or_path = checkpoint.source
    return model.eval()


def blocks_alone(session: TrunkSession) -> Any:
    """The trunk's blocks in the family's model, whose other modules have no numbers.

    Args:
        session: On a trunk.

    Returns:
        As :func:`with_skeleton`; it is not to be called.
    """
    info = session.info
    config = AutoConfig.for_model(**json.loads(info.config_json))
    family, split = family_of(config.model_type), SplitRange(info.start_layer, info.end_layer)
    with torch.device("meta"):
        model = _split_class(family.full_class, False)(_ends_config(config, split))
    _put_blocks(model, config, family, split, session)
    base = getattr(model, family.base)
    if (rotary := getattr(base, "rotary_emb", None)) is not None:
        base.rotary_emb = type(rotary)(config)  # an input of the blocks: it has numbers
    return model


def _put_blocks(
    model: Any,
    config: PreTrainedConfig,
    family: Family,
    split: SplitRange,
    session: TrunkSession,
    ends: tuple[list[tuple[str, Any]], list[tuple[str, Any]]] = ([], []),
    secret: bytes | None = None,
    copied: str = "",
) -> dict[str, nn.Module]:
    """Puts the trunk's hollow blocks into a model, between those of the ends."""
    vectors, linear = session.fetch([])
    theirs = to_torch(session.info.compute_dtype)
    function = TrunkFunction(session, vectors, theirs, copied)
    blocks = skeleton_blocks(
        config, family, split, vectors, theirs, _Fetches(function), linear=frozenset(linear)
    )
    below, above = ends
    named = [*below, *blocks, *above]
    # The family's own list, where its positions are the names.
    whole = len(named) == config.num_hidden_layers
    layers = nn.ModuleList([block for _, block in named]) if whole else GlobalLayers(named)
    setattr(getattr(model, family.base), family.layers, layers)
    _use_whole_config(model, layers, config)
    passage = Passage(model, family, split, function, secret)
    for index, block in blocks:
        put_in_place(block, passage, int(index))
    model.passage, model.remote_trunk, model.split = passage, function, split
    # DDP neither broadcasts nor reduces what is the trunk's.
    model._ddp_params_and_buffers_to_ignore = _TrunkNames(model)
    return dict(blocks)


class _Split:
    """Mixed into the family's class: what leaves the trunk's blocks out says so, or is refused."""

    remote_trunk: TrunkFunction
    split: SplitRange

    def close(self) -> None:
        """Ends the session; PEFT's model around this one has the call as well."""
        self.remote_trunk.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Writes the ends, in a folder that is read by ``SplitModelForCausalLM`` alone.

        Args:
            save_directory: Created if needed.
            is_main_process: As in transformers.
            **kwargs: As in transformers.
        """
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, **kwargs
        )
        if is_main_process:
            digest = self.remote_trunk.session.info.weight_digest
            mark_as_ends(save_directory, str(self.split), digest)

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """As of torch; refuses PEFT's merging, which begins with a list of all modules.

        Raises:
            SharedWeightsError: If PEFT asks in order to merge: nothing is merged yet.
        """
        _refuse_merging(sys._getframe(1))
        return super().named_modules(*args, **kwargs)  # type: ignore[misc]

    def modules(self) -> Any:
        """As :meth:`named_modules`."""
        _refuse_merging(sys._getframe(1))
        return super().modules()  # type: ignore[misc]

    def create_masks_for_generate(
        self, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor | None:
        """Leaves the mask to the forward, which makes the same one of it; the trunk needs this.

        Called by ``generate`` with a static cache.
        """
        return attention_mask

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
        made = type(self)
        return _again, (made.__bases__[1], "forward" in made.__dict__), self.__dict__


def _refuse_merging(caller: FrameType) -> None:
    name = caller.f_code.co_name
    if name not in ("merge_adapter", "_unload_and_optionally_merge"):
        return
    of_peft = caller.f_globals.get("__name__", "").startswith("peft.")
    if of_peft and caller.f_locals.get("merge", True):
        raise SharedWeightsError(
            "an adapter is not merged into a split model, whose middle weights are the trunk's, "
            "which its tenants share: accepted is `trunkline export --merge`"
        )


@functools.cache
def _split_class(plain: type, fused_loss: bool) -> Any:
    # Its own name: libraries decide by it.
    body: dict[str, Any] = {"__module__": plain.__module__, "__qualname__": plain.__qualname__}
    if fused_loss:
        body["forward"] = with_fused_loss(plain)
    return type(plain.__name__, (_Split, plain), body)


def _again(plain: type, fused_loss: bool) -> Any:
    return object.__new__(_split_class(plain, fused_loss))


@dataclass(frozen=True)
class _Fetches:
    """Reads the trunk's matrices."""

    function: TrunkFunction

    def __call__(self, name: str) -> tuple[Fetch, Norms]:
        of = self.function
        return _Fetched(of, name), (_Fetched(of, name, "rows"), _Fetched(of, name, "columns"))


@dataclass(frozen=True, eq=False)
class _Fetched:
    function: TrunkFunction
    name: str
    norms: str = ""
    """Of ``rows`` or ``columns``; empty for the matrix itself."""

    def __call__(self) -> torch.Tensor:
        return self.function.fetch(self.name, self.norms)

    def _key(self) -> tuple[object, ...]:
        info = self.function.session.info
        held = info.weight_digest, info.quantization, info.compute_dtype
        return (*held, self.name, self.norms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fetched) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True)
class _TrunkNames:
    """Names of a model's remote tensors, as seen from it and from PEFT's model around it."""

    model: nn.Module

    def __iter__(self) -> Any:
        names = [n for n, p in self.model.named_parameters() if isinstance(p, RemoteTensor)]
        return iter([prefix + name for name in names for prefix in ("", "base_model.model.")])


def _ends_config(config: PreTrainedConfig, split: SplitRange) -> PreTrainedConfig:
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
    """The client's blocks under their global names, below and above the trunk's."""
    below = [(str(i), layers[i]) for i in range(split.start)]
    above = [(str(split.end + i), layer) for i, layer in enumerate(layers[split.start + 1 :])]
    for name, layer in [*below, *above]:
        checkpoint.family.fix_layer(layer, 0, int(name))
    return below, above


def _take_trained_vectors(block: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Norms and biases of the trunk's blocks that were trained with the ends, and saved so."""
    if "ends" not in checkpoint.metadata:
        return
    with torch.no_grad():
        for name, parameter in block.named_parameters(prefix=prefix):
            if parameter.ndim < 2 and name in checkpoint:
                parameter.copy_(checkpoint.read(name))


def _use_whole_config(model: Any, layers: Any, config: Any) -> None:
    """Gives every module the whole model's number of layers, and each block its place in caches."""
    for index, block in enumerate(layers):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = index
    for own in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        own.num_hidden_layers = config.num_hidden_layers
        if getattr(config, "layer_types", None):
            own.layer_types = list(config.layer_types)
