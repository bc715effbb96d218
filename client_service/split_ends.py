"""Saving the ends of a split model that were trained themselves, without a PEFT adapter on them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from client_service.fused_loss import with_fused_loss
from client_service.remote_trunk import RemoteTrunk
from shared.adapters.config import config_from_json
from shared.adapters.methods import PARTS
from shared.adapters.weights import Provenance, write_adapter
from shared.errors import AdapterError
from shared.models.families import Family, family_of
from shared.models.split_range import SplitRange

TRUNK_ADAPTER = "trunk_adapter"
_WEIGHT_FILE = "model.safetensors"
_STEP = f"{TRUNK_ADAPTER}.committed_step"


class SplitEnds:
    """Mixed into the family's class: what :meth:`save_pretrained` writes is said to be the ends.

    ``config.json`` is the whole model's, with ``trunkline_split``; ``model.safetensors`` lacks the
    trunk's blocks. :meth:`SplitModelForCausalLM.from_pretrained` reads such a folder; a model that
    is loaded from it elsewhere is told by transformers that blocks are missing.
    """

    remote_trunk: RemoteTrunk
    whole_config: Any
    split: Any

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        save_function: Callable[..., None] = torch.save,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the ends' weights and, if the trunk has an adapter, that beside them.

        Args:
            save_directory: Created if needed.
            is_main_process: Accepted for the Trainer's sake.
            state_dict: Accepted for the Trainer's sake; the model's own is written.
            save_function: Accepted for the Trainer's sake; safetensors are written.
            push_to_hub: As in transformers.
            **kwargs: As in transformers.
        """
        super().save_pretrained(  # type: ignore[misc]
            save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs
        )
        folder = Path(save_directory)
        session, config = self.remote_trunk.session, self.whole_config.to_dict()
        config["trunkline_split"] = str(self.split)
        config["trunkline_weight_digest"] = session.info.weight_digest
        type(self.whole_config).from_dict(config).save_pretrained(folder)
        if self.remote_trunk.trainable:
            self._save_trunk_adapter(folder)

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the ends and, if it is there, the trunk's adapter, as the Trainer's resuming does.

        Args:
            state_dict: What is in a folder that :meth:`save_pretrained` wrote, or the ends alone.
            strict: As in torch.
            assign: As in torch.
        """
        prefix = f"{TRUNK_ADAPTER}."
        ends = {n: t for n, t in state_dict.items() if not n.startswith(prefix)}
        adapter = {n.removeprefix(prefix): t for n, t in state_dict.items() if n not in ends}
        loaded = super().load_state_dict(ends, strict, assign)  # type: ignore[misc]
        if adapter:
            step = adapter.pop(_STEP.removeprefix(prefix))
            self.remote_trunk.restore(adapter, step=int(step))
        return loaded

    def _save_trunk_adapter(self, folder: Path) -> None:
        """Writes it twice: for PEFT, and among the ends' weights, where the Trainer reads."""
        session, step = self.remote_trunk.session, self.remote_trunk.next_step - 1
        weights, config = session.adapter(), config_from_json(session.adapter_config_json())
        noted = Provenance(str(self.split), session.info.weight_digest, step)
        base = str(self.whole_config._name_or_path)
        write_adapter(folder / TRUNK_ADAPTER, config, weights, base, noted)
        tensors = load_file(folder / _WEIGHT_FILE)
        tensors |= {f"{TRUNK_ADAPTER}.{n}": t for n, t in weights.items()}
        tensors[_STEP] = torch.tensor(step)
        save_file(tensors, folder / _WEIGHT_FILE, metadata={"format": "pt"})


@functools.cache
def split_class(full_class: Any, fused_loss: bool = False) -> Any:
    """The family's class with :class:`SplitEnds` in it; still a subclass of the family's."""
    members: dict[str, Any] = {"__module__": __name__}
    if fused_loss:
        members["forward"] = with_fused_loss(full_class)
    return type(f"Split{full_class.__name__}", (SplitEnds, full_class), members)


def check_ends(parts: str) -> None:
    """Refuses to train other weights than the ends' own.

    Raises:
        AdapterError: If the trunk is named, or no part is.
    """
    if parts not in PARTS:
        raise AdapterError(f"parts {parts!r} are not accepted; accepted: {', '.join(PARTS)}")
    if parts == "trunk":
        raise AdapterError(
            "the trunk's own weights are shared by all tenants and never trained: give it an "
            "adapter (peft_config with peft_parts='trunk', or trunk_peft_config)"
        )


def train_ends(model: Any, parts: str) -> None:
    """Freezes the end that is not named; a head tied to the embedding belongs to the bottom."""
    if parts not in ("bottom", "top"):
        return
    family = family_of(model.whole_config.model_type)
    for name, parameter in model.named_parameters():
        if not name.endswith(".proxy"):
            parameter.requires_grad_(end_of(name, family, model.split) == parts)


def end_of(name: str, family: Family, split: SplitRange) -> str:
    """Which end a parameter of the family's ``…ForCausalLM`` belongs to, by its name."""
    if name.startswith(family.layer_prefix):
        index = int(name.removeprefix(family.layer_prefix).split(".")[0])
        return "bottom" if index < split.start else "top"
    top = (f"{family.base}.{family.norm}.", "lm_head.")
    return "top" if name.startswith(top) else "bottom"
