"""What of an adapter goes where: the client's configuration, the trunk's, and what each adapts.

PEFT decides which modules a configuration means; it is asked on a copy of each part without
weights (on torch's ``meta`` device), so that an adapter that misses a part is known before anything
is loaded.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from transformers import PreTrainedConfig

from shared.adapters.config import check_config, config_to_json
from shared.adapters.methods import Method, check_parts, method_of
from shared.adapters.wrap import present_modules
from shared.errors import AdapterError
from shared.models.parts import build_part
from shared.models.split_layout import part_bounds
from shared.models.split_range import SplitRange

_ROLES = {
    "all": ("bottom", "trunk", "top"),
    "bottom": ("bottom",),
    "trunk": ("trunk",),
    "top": ("top",),
    "ends": ("bottom", "top"),
}

# What may differ between the two sides, because the joined adapter says it module by module, or
# because it is no part of a trained adapter.
_MAY_DIFFER = frozenset(
    {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "feedforward_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "lora_dropout",
        "init_lora_weights",
        "init_ia3_weights",
        "fan_in_fan_out",
        "base_model_name_or_path",
        "inference_mode",
        "task_type",
        "revision",
        "peft_version",
        "auto_mapping",
        "runtime_config",
    }
)


@dataclass(frozen=True)
class AdapterPlan:
    """One adapter of the whole model, by side."""

    client: PeftConfig
    """Adapts nothing (:func:`adapts_nothing`) where the adapter is on the trunk alone."""
    trunk: PeftConfig | None
    """None leaves the trunk frozen."""

    @property
    def trunk_json(self) -> str:
        """The trunk's configuration as it travels; empty for a frozen trunk."""
        return "" if self.trunk is None else config_to_json(self.trunk)


def plan_adapter(
    config: PeftConfig,
    trunk_config: PeftConfig | None,
    model: PreTrainedConfig,
    split: SplitRange,
    parts: str = "all",
) -> AdapterPlan:
    """Divides an adapter between client and trunk.

    Args:
        config: The adapter of the ends, and of the trunk unless that has another.
        trunk_config: The trunk's; the same object as ``config`` where there is one for all.
        model: The whole model's configuration.
        split: Blocks of the trunk.
        parts: A name of :data:`shared.adapters.methods.PARTS`.

    Raises:
        AdapterError: If the method cannot work on these parts, the two sides could not become one
            adapter, or nothing of the model would be adapted.
    """
    method = check_adapter(config, trunk_config, parts)
    if method.name in ("PROMPT_TUNING", "P_TUNING"):
        return AdapterPlan(copy.deepcopy(config), None)
    if method.name == "PREFIX_TUNING":
        return AdapterPlan(copy.deepcopy(config), copy.deepcopy(trunk_config))
    roles = _ROLES[parts]
    skeletons = {role: _skeleton(model, role, split) for role in _ROLES["all"]}
    given = {role: trunk_config if role == "trunk" else config for role in roles}
    targets = {
        role: [] if (wanted := given.get(role)) is None else _targets(wanted, skeletons[role])
        for role in skeletons
    }
    if not any(targets.values()) and not config.modules_to_save:
        raise AdapterError(
            f"{method.name}: target_modules {config.target_modules!r} name no module of "
            f"{' or '.join(roles)}"
        )
    ours = [*targets["bottom"], *targets["top"]]
    client = _part_of(config, ours, narrowed=not {"bottom", "top"} <= set(roles))
    client.modules_to_save = _saved_on(config, [skeletons[r] for r in ("bottom", "top")])
    trunk = None
    if trunk_config is not None and targets["trunk"]:
        trunk = copy.deepcopy(trunk_config)
        trunk.modules_to_save = _saved_on(trunk_config, [skeletons["trunk"]])
    return AdapterPlan(client, trunk)


def check_adapter(config: PeftConfig, trunk_config: PeftConfig | None, parts: str) -> Method:
    """Refuses what no split of any model could have as its adapter; returns the method.

    Args:
        config: As of :func:`plan_adapter`.
        trunk_config: As of :func:`plan_adapter`.
        parts: As of :func:`plan_adapter`.

    Raises:
        AdapterError: If the method cannot work on these parts, or the two sides could not become
            one adapter.
    """
    method = method_of(config.peft_type)
    check_config(config)
    check_parts(method, parts)
    if trunk_config is not None and trunk_config is not config:
        _check_joinable(config, trunk_config)
    if method.name == "PREFIX_TUNING" and trunk_config is None:
        raise AdapterError(f"{method.name} with a frozen trunk: {method.why_not}")
    if parts == "trunk" and trunk_config is None and not config.modules_to_save:
        raise AdapterError("an adapter of the trunk alone, and none on it, would adapt nothing")
    return method


def adapts_nothing(config: PeftConfig) -> bool:
    """Tells whether a client's configuration only stands for the trunk's adapter."""
    return bool(getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES)


def with_targets(config: PeftConfig, names: list[str]) -> PeftConfig:
    """The same adapter on exactly these modules, by their full names."""
    narrowed = copy.deepcopy(config)
    if feedforward := getattr(narrowed, "feedforward_modules", None):
        suffixes = (feedforward,) if isinstance(feedforward, str) else tuple(feedforward)
        narrowed.feedforward_modules = {n for n in names if n.endswith(suffixes)}
    narrowed.target_modules = set(names)
    narrowed.exclude_modules = None
    for name in ("layers_to_transform", "layers_pattern"):
        if hasattr(narrowed, name):
            setattr(narrowed, name, None)
    return narrowed


def _part_of(config: PeftConfig, names: list[str], narrowed: bool) -> PeftConfig:
    if not names:
        carrier = with_targets(config, [])
        carrier.target_modules = DUMMY_TARGET_MODULES
        return carrier
    return with_targets(config, names) if narrowed else copy.deepcopy(config)


def _skeleton(model: PreTrainedConfig, role: str, split: SplitRange) -> Any:
    with torch.device("meta"):
        return build_part(model, role, *part_bounds(role, split, model.num_hidden_layers))


def _targets(config: PeftConfig, skeleton: Any) -> list[str]:
    """Full names of the modules that PEFT adapts in a part; empty if there are none."""
    config = copy.deepcopy(config)
    config.modules_to_save = None
    if getattr(config, "rank_pattern", None):
        config.rank_pattern = None if hasattr(config, "init_r") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say, it says again on the real model
        try:
            wrapped: Any = get_peft_model(copy.deepcopy(skeleton), config)
        except ValueError as error:
            if type(error).__name__ == "NoMatchingPeftModuleError":
                return []
            raise AdapterError(f"PEFT refuses this adapter: {error}") from error
        except (TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise AdapterError(f"PEFT refuses this adapter: {error}") from error
    return list(wrapped.base_model.targeted_module_names)


def _saved_on(config: PeftConfig, skeletons: list[Any]) -> list[str] | None:
    wanted = config.modules_to_save
    found = set().union(*(present_modules(wanted, skeleton) for skeleton in skeletons))
    return [name for name in wanted or () if name in found] or None


def _check_joinable(config: PeftConfig, trunk_config: PeftConfig) -> None:
    check_config(trunk_config)
    if method_of(config.peft_type) is not method_of(trunk_config.peft_type):
        raise AdapterError(
            f"{method_of(config.peft_type).name} on the ends and "
            f"{method_of(trunk_config.peft_type).name} on the trunk are not one adapter: accepted "
            f"is one method for all parts"
        )
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(trunk_config, field.name)
        if field.name not in _MAY_DIFFER and ours != theirs:
            raise AdapterError(
                f"{field.name} is {ours!r} on the ends and {theirs!r} on the trunk: one adapter "
                f"has one value"
            )
