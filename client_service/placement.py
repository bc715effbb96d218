"""``peft_parts`` and ``trunk_peft_config``: where an adapter is, said in PEFT's own words.

What comes out is one configuration that stock PEFT takes for the whole model as well.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Literal, TypeAlias

import torch
from peft import PeftConfig, PeftType
from transformers import PreTrainedConfig

from shared.errors import AdapterError
from shared.models import SplitRange
from shared.models.families import HEAD, Family, family_of

TrunkPeft: TypeAlias = "PeftConfig | Literal['same'] | None"

PARTS = {
    "all": ("bottom", "trunk", "top"),
    "bottom": ("bottom",),
    "trunk": ("trunk",),
    "top": ("top",),
    "ends": ("bottom", "top"),
}
"""Where an adapter can be put, and the parts that this means."""

_OF_THE_TRUNK = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Fields that may be others on the trunk, and PEFT's own words for that."""


def check_parts(parts: str) -> None:
    """Refuses what is no word for parts of a model.

    Raises:
        AdapterError: Names those that are.
    """
    if parts not in PARTS:
        raise AdapterError(f"parts {parts!r} are not accepted; accepted: {', '.join(PARTS)}")


def part_of(name: str, family: Family, split: SplitRange) -> str:
    """Which part a module or parameter of the family's ``…ForCausalLM`` belongs to, by its name.

    A head tied to the embedding belongs to the bottom.
    """
    if name.startswith(family.layer_prefix):
        index = int(name.removeprefix(family.layer_prefix).split(".")[0])
        return "bottom" if index < split.start else "trunk" if index < split.end else "top"
    of_top = (f"{family.base}.{family.norm}.", f"{HEAD}.")
    return "top" if f"{name}.".startswith(of_top) else "bottom"


def placed(
    config: PeftConfig,
    trunk_config: TrunkPeft,
    parts: str,
    model: PreTrainedConfig,
    split: SplitRange,
) -> PeftConfig:
    """One configuration of the whole model that puts an adapter on some parts alone.

    Args:
        config: Of the adapter.
        trunk_config: Of the trunk's blocks: ``"same"``, None for no adapter there, or one of
            other ranks and alphas.
        parts: A word of :data:`PARTS`.
        model: Of the whole model.
        split: The trunk's blocks.

    Returns:
        A copy; of everything, it is as it was.

    Raises:
        AdapterError: If stock PEFT has no words for it.
    """
    wanted = wanted_parts(config, trunk_config, parts)
    config = copy.deepcopy(config)
    if isinstance(trunk_config, PeftConfig) and "trunk" in wanted:
        _set_trunk(config, trunk_config, model, split)
    if wanted == set(PARTS["all"]) or config.is_prompt_learning:
        return config
    kept = _pattern(wanted, model, split)
    leave_out(config, rf"(?!(?:{kept})$).*")
    if config.modules_to_save:
        config.modules_to_save = _in_parts(config.modules_to_save, kept, model)
    return config


def wanted_parts(config: PeftConfig, trunk_config: TrunkPeft, parts: str) -> set[str]:
    """The parts that are to have an adapter, whatever the model and its split.

    Args:
        config: Of the adapter.
        trunk_config: As in :func:`placed`.
        parts: A word of :data:`PARTS`.

    Raises:
        AdapterError: If there are none, or the method cannot be on them alone.
    """
    check_parts(parts)
    wanted = set(PARTS[parts])
    if trunk_config is None:
        wanted.discard("trunk")
    if not wanted:
        raise AdapterError("peft_parts 'trunk' without an adapter on the trunk: nothing is left")
    if wanted != set(PARTS["all"]) and config.is_prompt_learning:
        _check_prompt(config, wanted)
    if getattr(config, "trainable_token_indices", None) and "bottom" not in wanted:
        raise AdapterError(f"trainable_token_indices on {parts!r}: the embedding is the bottom's")
    return wanted


def leave_out(config: PeftConfig, pattern: str) -> None:
    """Excludes modules by a pattern of their full names, besides those that are excluded already.

    Raises:
        AdapterError: If PEFT excludes none for this method.
    """
    if "exclude_modules" not in {field.name for field in dataclasses.fields(config)}:
        raise AdapterError(
            f"{config.peft_type.value} on some parts: PEFT has no exclude_modules for it; accepted "
            f"is 'all'"
        )
    theirs = config.exclude_modules
    if theirs and not isinstance(theirs, str):
        theirs = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, theirs))})"
    config.exclude_modules = f"(?:{pattern})|(?:{theirs})" if theirs else pattern


def _check_prompt(config: PeftConfig, wanted: set[str]) -> None:
    if config.peft_type == PeftType.PREFIX_TUNING:
        raise AdapterError(
            "PREFIX_TUNING on some parts: its prefix is one tensor over every block of the model, "
            "which has no way to leave blocks out: accepted is 'all'"
        )
    if "bottom" not in wanted:
        raise AdapterError(
            f"{config.peft_type.value} without the bottom: its virtual tokens enter the model as "
            f"embeddings, before the first block; accepted are 'all', 'ends' and 'bottom'"
        )


def _set_trunk(
    config: PeftConfig, trunk_config: PeftConfig, model: PreTrainedConfig, split: SplitRange
) -> None:
    """Writes another rank and alpha of the trunk's blocks into patterns.

    Raises:
        AdapterError: If anything else differs.
    """
    differing = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(trunk_config, field.name, None)
    }
    fields = {field.name for field in dataclasses.fields(config)}
    said = {name for name in _OF_THE_TRUNK if _OF_THE_TRUNK[name] in fields}
    if type(config) is not type(trunk_config) or differing - said:
        raise AdapterError(
            f"trunk_peft_config differs in {', '.join(sorted(differing)) or 'its method'}, which "
            f"PEFT cannot say of one model: accepted are 'same', None, and another "
            f"{' and '.join(sorted(said)) or 'nothing'}"
        )
    indices = "|".join(str(i) for i in range(split.start, split.end))
    key = rf"{re.escape(family_of(model.model_type).layer_prefix)}(?:{indices})\..*"
    for name in differing:
        pattern = {key: getattr(trunk_config, name)}
        setattr(config, _OF_THE_TRUNK[name], pattern | getattr(config, _OF_THE_TRUNK[name]))


def _pattern(wanted: set[str], model: PreTrainedConfig, split: SplitRange) -> str:
    """Matches the full names of the modules in some parts."""
    family = family_of(model.model_type)
    prefix, norm = re.escape(family.layer_prefix), re.escape(f"{family.base}.{family.norm}")
    blocks = [
        str(i)
        for i in range(model.num_hidden_layers)
        if part_of(f"{family.layer_prefix}{i}", family, split) in wanted
    ]
    kept = [rf"{prefix}(?:{'|'.join(blocks)})\..*"] if blocks else []
    if "bottom" in wanted:
        kept.append(rf"(?!{prefix}|{norm}$|{HEAD}$).*")
    if "top" in wanted:
        kept += [norm, HEAD]
    return "|".join(kept)


def _in_parts(wanted: list[str], kept: str, config: PreTrainedConfig) -> list[str]:
    """The full names of the modules to save that are in some parts.

    Raises:
        AdapterError: If one of them is in none.
    """
    with torch.device("meta"):
        model = family_of(config.model_type).full_class(config)
    names = [name for name, _ in model.named_modules() if re.fullmatch(kept, name)]
    found = {name for name in names for w in wanted if f".{name}".endswith(f".{w}")}
    if absent := [w for w in wanted if not any(f".{n}".endswith(f".{w}") for n in found)]:
        raise AdapterError(
            f"modules_to_save {absent} are not in these parts: nothing would be trained there"
        )
    return sorted(found)
