"""A ``PeftModel`` of a split model: its adapters are on both sides, saving writes whole ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraModel, PeftConfig, PeftModelForCausalLM
from torch.nn.modules.module import _IncompatibleKeys

from client_service.remote_trunk import RemoteTrunk
from client_service.split_adalora import SplitAdaLoraModel
from shared.adapters.config import config_from_json
from shared.adapters.joining import Side, SplitShape, cut_adapter, join_adapter
from shared.adapters.plan import plan_adapter
from shared.adapters.prefix import join_prefix
from shared.adapters.weights import (
    Provenance,
    adapter_weights,
    load_adapter_weights,
    read_adapter,
    read_provenance,
    write_adapter,
)
from shared.adapters.wrap import fitted
from shared.errors import AdapterError
from shared.models.families import family_of
from shared.models.split_range import SplitRange
from shared.seeding import keyed_generator


@dataclass(frozen=True)
class LoadedAdapter:
    """A whole model's adapter, read and cut."""

    config: PeftConfig
    client: Side
    trunk: Side
    noted: Provenance


def read_loaded(folder: Path, shape: SplitShape) -> LoadedAdapter:
    """Reads an adapter of the whole model and cuts it onto the two sides.

    Raises:
        AdapterError: If it is unreadable, or not of such a model.
    """
    config, weights = read_adapter(folder)
    client, trunk = cut_adapter(config, weights, shape)
    return LoadedAdapter(config, client, trunk, read_provenance(folder))


class SplitPeftModelForCausalLM(PeftModelForCausalLM):  # type: ignore[misc]
    """PEFT's own model class; what is done with an adapter here is done on the trunk too."""

    _built = False

    def __init__(
        self,
        model: Any,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, peft_config, adapter_name, **kwargs)
        self._built = True
        self.remote.saved_by_peft = True
        self._follow_adapter(adapter_name)

    @property
    def remote(self) -> RemoteTrunk:
        """The session that holds the other side."""
        trunk: RemoteTrunk = self.get_base_model().remote_trunk
        return trunk

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes adapters of the whole model: the client's weights and the trunk's.

        Args:
            save_directory: Created if needed; other adapters than ``default`` get folders in it.
            *args: Refused.
            selected_adapters: Names; all by default.
            **kwargs: Only PEFT's defaults of its own arguments are accepted.

        Raises:
            AdapterError: If something else than safetensors is asked for, or there is no such
                adapter.
        """
        accepted = {"safe_serialization": True, "is_main_process": True, "state_dict": None}
        odd = {k: v for k, v in kwargs.items() if accepted.get(k, v) != v}
        if args or odd:
            raise AdapterError(f"save_pretrained takes only a directory; given: {args} {odd}")
        for name in selected_adapters or list(self.peft_config):
            self._check_known(name)
            folder = Path(save_directory)
            self._save_one(name, folder if name == "default" else folder / name)

    def joined_adapter(self, adapter_name: str = "default") -> Side:
        """An adapter of the whole model, fetched from the trunk and joined here."""
        trunk_name = _on_trunk(adapter_name)
        client = Side(self.peft_config[adapter_name], adapter_weights(self, adapter_name))
        trunk = None
        if config_json := self.remote.session.adapter_config_json(trunk_name):
            weights = self.remote.session.adapter(trunk_name)
            trunk = Side(config_from_json(config_json), weights)
        return join_adapter(client, trunk, self._shape)

    def join_columns(self, client: torch.Tensor, trunk: torch.Tensor) -> torch.Tensor:
        """One tensor over all blocks, out of both sides' of prefix tuning."""
        return join_prefix(client, trunk, self._shape.split)

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Adds a fresh adapter on both sides; PEFT's arguments.

        Args:
            adapter_name: Not used yet.
            peft_config: Of the method that the model has already.
            *args: As in PEFT.
            **kwargs: As in PEFT.

        Raises:
            AdapterError: If it is refused here or by the trunk.
        """
        if not self._built:  # PEFT's own constructor calls this for prompt learning
            super().add_adapter(adapter_name, peft_config, *args, **kwargs)
            return
        if adapter_name in self.peft_config:
            raise AdapterError(f"this model has an adapter {adapter_name!r} already")
        whole = self.get_base_model().whole_config
        plan = plan_adapter(peft_config, peft_config, whole, self._shape.split)
        client = fitted(plan.client, self.get_base_model(), "client")
        seed = self.remote.session.terms.seed
        self.remote.add_adapter(_on_trunk(adapter_name), plan.trunk_json, seed)
        try:
            with keyed_generator("adapter", seed, f"client {adapter_name}"):
                super().add_adapter(adapter_name, client, *args, **kwargs)
        except BaseException:
            self.remote.remove_adapter(_on_trunk(adapter_name))
            raise

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Uses another adapter, on both sides.

        Args:
            adapter_name: Of this model.
            inference_mode: Freezes it on the client.
        """
        super().set_adapter(adapter_name, inference_mode)
        self._follow_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Frees an adapter on both sides.

        Args:
            adapter_name: Any but ``default``, which is the session's own.

        Raises:
            AdapterError: If it is ``default``.
        """
        if adapter_name == "default":
            raise AdapterError("'default' is the session's own adapter: it ends with the session")
        super().delete_adapter(adapter_name)
        self.remote.remove_adapter(_on_trunk(adapter_name))
        self._follow_adapter(self.active_adapter)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Loads a whole model's adapter into the ends and, through the session, the trunk.

        Args:
            model_id: Folder of the adapter.
            adapter_name: Replaced if this model has it, else added.
            is_trainable: Training goes on: the trunk's count of steps is that of the folder too.
            *args: As in PEFT.
            **kwargs: As in PEFT.

        Raises:
            AdapterError: If the folder is unreadable or the adapter does not fit; of a model with
                this adapter nothing was changed.
        """
        loaded = read_loaded(Path(model_id), self._shape)
        if adapter_name not in self.peft_config:
            self.add_adapter(adapter_name, loaded.config)
        self.load_sides(str(model_id), loaded, adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def load_sides(
        self,
        source: str,
        loaded: LoadedAdapter,
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> None:
        """Gives an adapter that this model has the weights of one that was read.

        Args:
            source: Where it was read from, for messages.
            loaded: What was read.
            adapter_name: Of this model.
            is_trainable: Takes the count of the trunk's steps too.

        Raises:
            AdapterError: If it does not fit one of the sides; nothing was changed.
        """
        self._check_known(adapter_name)
        active = self.active_adapter
        self.remote.use_adapter(_on_trunk(adapter_name))
        try:
            if loaded.trunk.weights and not self.remote.trainable:
                raise AdapterError(f"{source}: has weights for the trunk, which is frozen here")
            before = adapter_weights(self, adapter_name)
            load_adapter_weights(self, loaded.client.weights, adapter_name)
            try:
                if self.remote.trainable:
                    step = loaded.noted.committed_step if is_trainable else None
                    same = loaded.noted.split == str(self._shape.split)
                    digest = loaded.noted.weight_digest if same else ""
                    self.remote.restore(loaded.trunk.weights, digest, step)
            except BaseException:
                load_adapter_weights(self, before, adapter_name)
                raise
        finally:
            self.remote.use_adapter(_on_trunk(active))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs both sides without their adapter."""
        with super().disable_adapter(), self.remote.without_adapter():
            yield

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a trunk's weights are everyone's.

        Raises:
            AdapterError: Always; says what merges instead.
        """
        raise AdapterError(
            "an adapter cannot be merged through the split, the trunk's weights are shared: save "
            "it and run `trunkline export ADAPTER --merge`"
        )

    merge_and_unload = unload = merge_adapter

    @property
    def _shape(self) -> SplitShape:
        info = self.remote.session.info
        split = SplitRange(info.start_layer, info.end_layer)
        return SplitShape(family_of(info.model_type), split, info.num_layers)

    def _save_one(self, name: str, folder: Path) -> None:
        joined = self.joined_adapter(name)
        info = self.remote.session.info
        step = next(
            (a.committed_step for a in self.remote.session.adapters() if a.name == _on_trunk(name)),
            0,
        )
        noted = Provenance(str(self._shape.split), info.weight_digest, step)
        base = str(self.get_base_model().config._name_or_path)
        write_adapter(folder, joined.config, joined.weights, base, noted)

    def _follow_adapter(self, name: str) -> None:
        """Lets the hole and the trunk use the adapter that PEFT uses now."""
        self.remote.use_adapter(_on_trunk(name))
        config = self.peft_config[name]
        prefixed = config.is_prompt_learning and config.peft_type.value == "PREFIX_TUNING"
        self.remote.prefix_tokens = config.num_virtual_tokens if prefixed else 0
        if type(self.base_model) is AdaLoraModel:
            SplitAdaLoraModel.take_over(self.base_model, self.remote)

    def _check_known(self, name: str) -> None:
        if name not in self.peft_config:
            raise AdapterError(
                f"this model has no adapter {name!r}; it has: {', '.join(self.peft_config)}"
            )


def _on_trunk(name: str) -> str:
    """PEFT's ``default`` is the adapter that the session was opened with."""
    return "" if name == "default" else name
