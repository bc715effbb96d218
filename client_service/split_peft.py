"""A ``PeftModel`` of a split model: saving it writes one adapter of the whole model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModelForCausalLM
from torch.nn.modules.module import _IncompatibleKeys

from client_service.remote_trunk import RemoteTrunk
from shared.adapters.config import config_from_json
from shared.adapters.weights import (
    Weights,
    adapter_weights,
    load_adapter_weights,
    read_adapter,
    write_adapter,
)
from shared.errors import AdapterError


class SplitPeftModelForCausalLM(PeftModelForCausalLM):  # type: ignore[misc]
    """PEFT's own model class; only :meth:`save_pretrained` knows of the trunk."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Writes the adapter of the whole model: the client's weights and the trunk's.

        Args:
            save_directory: Created if needed.
            *args: Refused.
            **kwargs: Only PEFT's defaults of its own arguments are accepted.

        Raises:
            AdapterError: If something else than safetensors of the one adapter is asked for.
        """
        accepted = {"safe_serialization": True, "is_main_process": True, "state_dict": None}
        odd = {k: v for k, v in kwargs.items() if accepted.get(k, v) != v}
        if args or odd.get("safe_serialization") is False:
            raise AdapterError(f"save_pretrained takes only a directory; given: {args} {odd}")
        trunk: RemoteTrunk = self.get_base_model().remote_trunk
        weights = adapter_weights(self) | trunk.session.adapter()
        config = joined_config(self.peft_config["default"], trunk, weights)
        base = str(self.get_base_model().config._name_or_path)
        write_adapter(Path(save_directory), config, weights, base)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Loads a whole model's adapter into the ends and, through the session, the trunk.

        Args:
            model_id: Folder of the adapter.
            adapter_name: Only ``"default"``: a session has one adapter.
            *args: As in PEFT.
            **kwargs: As in PEFT.

        Raises:
            AdapterError: If it is another name, or the adapter does not fit this session's.
        """
        if adapter_name != "default":
            raise AdapterError(f"adapter {adapter_name!r}: a split model has one, 'default'")
        _, weights = read_adapter(Path(model_id))
        own = adapter_weights(self).keys()
        trunk: RemoteTrunk = self.get_base_model().remote_trunk
        others = {name: weight for name, weight in weights.items() if name not in own}
        if others and not trunk.trainable:
            raise AdapterError(f"{model_id}: has weights for the trunk, which is frozen here")
        load_adapter_weights(self, {n: w for n, w in weights.items() if n in own})
        if trunk.trainable:
            trunk.session.restore(others)
        return _IncompatibleKeys([], [])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the ends without their adapter; refused while the trunk has one.

        Raises:
            AdapterError: The trunk's adapter cannot be switched off within its session.
        """
        if self.get_base_model().remote_trunk.trainable:
            raise AdapterError("the trunk's adapter cannot be switched off within its session")
        with super().disable_adapter():
            yield


def joined_config(config: PeftConfig, trunk: RemoteTrunk, weights: Weights) -> PeftConfig:
    """The configuration of the whole model's adapter.

    Where the trunk's adapter has another rank or alpha than the client's, or none, that is written
    down per module, so that plain PEFT builds exactly these matrices.
    """
    joined = copy.deepcopy(config)
    session = trunk.session
    if not trunk.trainable:
        kept = range(session.info.num_layers)
        held = range(session.info.start_layer, session.info.end_layer)
        if joined.layers_to_transform is None:
            joined.layers_to_transform = [i for i in kept if i not in held]
        return joined
    trunk_config = config_from_json(session.terms.peft_config_json)
    if trunk_config.target_modules and isinstance(joined.target_modules, set | list):
        joined.target_modules = set(joined.target_modules) | set(trunk_config.target_modules)
    if (trunk_config.r, trunk_config.lora_alpha) != (config.r, config.lora_alpha):
        _write_patterns(joined, trunk_config, session.adapter())
    return joined


def _write_patterns(joined: PeftConfig, trunk_config: PeftConfig, trunk_weights: Weights) -> None:
    modules = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trunk_weights}
    for module in sorted(modules):
        pattern = module.replace(".", r"\.")
        joined.rank_pattern[pattern] = trunk_config.r
        joined.alpha_pattern[pattern] = trunk_config.lora_alpha
