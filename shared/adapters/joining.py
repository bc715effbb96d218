"""One adapter of the whole model, cut onto the two sides and joined again.

Blocks keep their global names on both sides, so most of it is a union or a choice by name; what
PEFT keeps for all modules in one place (a prefix, AdaLoRA's rank pattern) is handled here.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from peft import PeftConfig, PromptTuningConfig

from shared.adapters.methods import method_of
from shared.adapters.plan import adapts_nothing, with_targets
from shared.adapters.prefix import KEY, cut_prefix, join_prefix
from shared.adapters.weights import Weights, is_trunk_weight
from shared.models.families import Family
from shared.models.split_range import SplitRange


@dataclass(frozen=True)
class Side:
    """An adapter's configuration and weights on one side."""

    config: PeftConfig
    weights: Weights


@dataclass(frozen=True)
class SplitShape:
    """What joining has to know of the model."""

    family: Family
    split: SplitRange
    num_layers: int


def cut_adapter(config: PeftConfig, weights: Weights, shape: SplitShape) -> tuple[Side, Side]:
    """Divides a whole model's adapter into the client's side and the trunk's.

    A side's weights are empty where the adapter does not touch it. What PEFT saves of an encoder of
    virtual tokens is what the encoder gives, not the encoder; training goes on from that.

    Raises:
        AdapterError: If the weights are not those of such a model.
    """
    client, trunk = copy.deepcopy(config), copy.deepcopy(config)
    if method_of(config.peft_type).name == "PREFIX_TUNING" and KEY in weights:
        client.prefix_projection = trunk.prefix_projection = False
        ours, theirs = cut_prefix(weights[KEY], shape.split, shape.num_layers)
        return Side(client, {KEY: ours}), Side(trunk, {KEY: theirs})
    if method_of(config.peft_type).name == "P_TUNING":
        client = PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens
        )
        return Side(client, weights), Side(client, {})

    def theirs_(name: str) -> bool:
        return is_trunk_weight(name, shape.family, shape.split)

    if method_of(config.peft_type).name == "ADALORA" and config.rank_pattern:
        pattern = config.rank_pattern
        client.rank_pattern = {n: v for n, v in pattern.items() if not theirs_(n)} or None
        trunk.rank_pattern = {n: v for n, v in pattern.items() if theirs_(n)} or None
    return (
        Side(client, {n: w for n, w in weights.items() if not theirs_(n)}),
        Side(trunk, {n: w for n, w in weights.items() if theirs_(n)}),
    )


def join_adapter(client: Side, trunk: Side | None, shape: SplitShape) -> Side:
    """Makes one adapter of the whole model out of both sides.

    Args:
        client: The client's; its configuration may adapt nothing.
        trunk: The trunk's; None for a frozen trunk.
        shape: Of the model.

    Returns:
        A configuration and weights that plain PEFT loads on the whole model.
    """
    method = method_of(client.config.peft_type).name
    joined = copy.deepcopy(client.config)
    if method in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"):
        joined.num_layers = shape.num_layers
        if method != "PREFIX_TUNING" or trunk is None:
            return Side(joined, client.weights)
        joined.prefix_projection = False  # what is saved is what the projection gives
        whole = join_prefix(client.weights[KEY], trunk.weights[KEY], shape.split)
        return Side(joined, {KEY: whole})
    theirs = {} if trunk is None else trunk.weights
    weights = client.weights | theirs
    ours, other = _modules(client.weights), _modules(theirs)
    if trunk is None or adapts_nothing(client.config) or not _alike(client.config, trunk.config):
        base = joined if trunk is None or not adapts_nothing(client.config) else trunk.config
        joined = with_targets(base, sorted({*ours, *other}))
    elif isinstance(joined.target_modules, set | list):
        joined.target_modules = {*joined.target_modules, *trunk.config.target_modules}
    if trunk is not None and method == "LORA":
        _write_patterns(joined, trunk.config, other)
    if trunk is not None and method == "ADALORA":
        joined.rank_pattern = {
            **(client.config.rank_pattern or {}),
            **(trunk.config.rank_pattern or {}),
        } or None
    saved = [*(client.config.modules_to_save or ())]
    saved += [] if trunk is None else (trunk.config.modules_to_save or ())
    joined.modules_to_save = sorted(set(saved)) or None
    return Side(joined, weights)


def _alike(config: PeftConfig, trunk_config: PeftConfig) -> bool:
    """Whether both sides chose their modules by one rule, apart from what PEFT spelled out."""
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    same = all(getattr(config, n, None) == getattr(trunk_config, n, None) for n in names)
    kinds = {type(config.target_modules), type(trunk_config.target_modules)}
    if kinds == {str}:
        return same and config.target_modules == trunk_config.target_modules
    full_names = any("." in n for c in (config, trunk_config) for n in c.target_modules)
    return same and str not in kinds and not full_names


def _modules(weights: Weights) -> list[str]:
    """Full names of the adapted modules, from the names of their weights."""
    pattern = re.compile(r"^base_model\.model\.(.+)\.(?:lora|ia3)_[A-Za-z_0-9]+(?:\.weight)?$")
    return sorted({m[1] for name in weights if (m := pattern.match(name))})


def _write_patterns(joined: PeftConfig, trunk_config: PeftConfig, modules: list[str]) -> None:
    """Writes down ranks and alphas per module where the trunk's differ from the client's."""
    for attribute, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        ours, theirs = getattr(joined, attribute), getattr(trunk_config, attribute)
        patterns = dict(getattr(joined, pattern) or {})
        trunk_patterns = dict(getattr(trunk_config, pattern) or {})
        if ours == theirs and patterns == trunk_patterns:
            continue
        for module in modules:
            value = next(
                (v for p, v in trunk_patterns.items() if re.match(rf"(.*\.)?({p})$", module)),
                theirs,
            )
            # PEFT takes the first that matches, so those of the trunk's modules come first.
            patterns = {re.escape(module): value, **patterns}
        setattr(joined, pattern, patterns)
