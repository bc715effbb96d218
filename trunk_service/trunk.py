"""The trunk's blocks: one copy of the base weights, one module tree a tenant."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from shared.adapters.config import config_from_json
from shared.adapters.methods import method_of
from shared.adapters.numbers import largest_rank
from shared.adapters.wrap import check_modules_to_save, wrap
from shared.errors import AdapterError, ModelMismatchError, SharedWeightsError
from shared.models import SplitRange, get_part_class, load_part, open_checkpoint
from shared.models.digest import weight_digest
from shared.models.dropout import set_dropout
from shared.models.families import family_of
from shared.models.onednn import use_onednn
from shared.models.quantization import check_kind, dequantized, quantize, shared_tensors
from shared.models.single_row import spread_single_rows
from shared.versions import check_versions, library_versions
from trunk_service.adapter_build import TreeLimits
from trunk_service.limits import Limits
from trunk_service.offload import OffloadArea
from trunk_service.requests import AdapterRequest, OpenRequest
from trunk_service.tenant_tree import TenantTree

_MOST_POSITIONS = 2**31


@dataclass(frozen=True)
class TrunkInfo:
    """What a trunk serves."""

    model_type: str
    num_layers: int
    split: SplitRange
    hidden_size: int
    max_positions: int
    dtype: torch.dtype
    weight_digest: str
    quantization: str = ""
    config_json: str = ""
    """The whole model's configuration, as transformers writes it."""

    @property
    def position_limit(self) -> int:
        """One more than the largest position; rotary ones are computed, whatever their number."""
        learns = family_of(self.model_type).learns_positions
        return self.max_positions if learns else _MOST_POSITIONS


class Trunk:
    """The middle blocks of a model, shared by every tenant.

    Args:
        part: A trunk part; its parameters are frozen here and never change afterwards.
        info: What it is.
    """

    def __init__(self, part: Any, info: TrunkInfo) -> None:
        self.info = info
        self.offload: OffloadArea | None = None
        """Where held graphs may rest that do not fit into the memory."""
        self._part = part.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        model: str | Path,
        split: SplitRange,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str = "",
        onednn: bool = False,
    ) -> Trunk:
        """Loads the trunk's blocks of a whole or split checkpoint; nothing of the ends.

        Args:
            model: Folder or hub id.
            split: Blocks held.
            device: Where to compute.
            dtype: What to compute in, and what weights are held in unless quantised.
            quantization: ``"nf4"`` or ``"int8"`` by bitsandbytes; empty for none.
            onednn: Let oneDNN compute linear layers (see :mod:`shared.models.onednn`).

        Raises:
            CheckpointError: If the model cannot be read.
            SplitError: If the split does not fit it.
            QuantizationError: If the quantisation is unknown or not installed.
            InvalidInputError: If oneDNN is asked for but not for float32 on a CPU.
        """
        if quantization:
            check_kind(quantization)
        checkpoint = open_checkpoint(model)
        config = checkpoint.config
        split.check(config.num_hidden_layers)
        part_class = get_part_class(config.model_type, "trunk")
        part = load_part(
            part_class, checkpoint, start_layer=split.start, end_layer=split.end, dtype=dtype
        )
        info = TrunkInfo(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            split=split,
            hidden_size=config.hidden_size,
            max_positions=config.max_position_embeddings,
            dtype=dtype,
            weight_digest=weight_digest(checkpoint, split),
            quantization=quantization,
            config_json=json.dumps({**config.to_dict(), "_name_or_path": ""}),
        )
        part = part.to(device)
        if quantization:
            part = quantize(part, quantization)
        if onednn:
            use_onednn(part, dtype, device)
        spread_single_rows(part)
        return cls(part, info)

    @property
    def config(self) -> Any:
        """The part's own configuration, of as many blocks as live here."""
        return self._part.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self._part.parameters()).device
        return device

    def check(self, request: OpenRequest) -> None:
        """Refuses a client that holds another model, or builds it by other libraries.

        Raises:
            ModelMismatchError: Names both splits, digests or versions.
        """
        check_versions(request.library_versions, library_versions())
        asked = SplitRange(request.start_layer, request.end_layer)
        if asked != self.info.split:
            raise ModelMismatchError(
                f"the client is split {asked}, this trunk serves {self.info.split} of a "
                f"{self.info.model_type} with {self.info.num_layers} blocks"
            )
        if request.weight_digest and request.weight_digest != self.info.weight_digest:
            raise ModelMismatchError(
                f"the client expects trunk weights {request.weight_digest[:16]}…, this trunk "
                f"serves {self.info.weight_digest[:16]}…: another checkpoint"
            )

    def new_model(self, request: AdapterRequest, limits: Limits, dropout: float | None) -> Any:
        """Makes a tenant's own model around the shared weights.

        The module tree is the tenant's (its adapter, its training mode, its dropout), the base
        parameters are everyone's.

        Raises:
            AdapterError: If the adapter is refused, or larger than the limits allow.
        """
        config = None
        if request.peft_config_json:
            config = config_from_json(request.peft_config_json)
            self._check_adapter(config, limits)
        shared = shared_tensors(self._part)
        model = copy.deepcopy(self._part, {id(tensor): tensor for tensor in shared})
        if dropout is not None:
            set_dropout(model, dropout)
        if config is None:
            return model
        wrapped = wrap(model, config, request.seed, "trunk")
        self._check_size(sum(p.numel() for p in wrapped.parameters() if p.requires_grad), limits)
        return wrapped

    def new_tree(self, limits: TreeLimits) -> TenantTree:
        """Makes a tree for the adapters of one client around the shared weights."""
        return TenantTree(self._part, limits)

    def vectors(self) -> dict[str, torch.Tensor]:
        """The blocks' norms and biases, by full name."""
        return {n: p for n, p in self._part.named_parameters() if p.ndim < 2}

    def matrix(self, name: str) -> torch.Tensor:
        """A base matrix of the blocks by full name, in the dtype that is computed in.

        Raises:
            SharedWeightsError: If there is none of this name.
        """
        path, _, attribute = name.rpartition(".")
        layers = dict(self._part.named_modules())
        layer: Any = layers.get(path)
        weight = None if layer is None else layer._parameters.get(attribute)
        if weight is None:
            raise SharedWeightsError(f"{name[:120]!r} is no base matrix of the trunk's blocks")
        return dequantized(layer, weight).to(self.info.dtype)

    def linear_modules(self) -> list[str]:
        """Full names of the blocks' modules that are torch's ``Linear``."""
        return [n for n, m in self._part.named_modules() if isinstance(m, nn.Linear)]

    def _check_adapter(self, config: PeftConfig, limits: Limits) -> None:
        """Refuses an adapter before PEFT allocates it."""
        method = method_of(config.peft_type)
        if not method.on_trunk:
            raise AdapterError(f"{method.name} on a trunk: {method.why_not}")
        if method.name not in limits.peft_methods:
            raise AdapterError(
                f"this trunk does not accept {method.name}; accepted: "
                f"{', '.join(limits.peft_methods)}"
            )
        if (rank := largest_rank(config)) > limits.max_adapter_rank:
            raise AdapterError(
                f"adapter rank {rank}; this trunk accepts up to {limits.max_adapter_rank}"
            )
        check_modules_to_save(config, self._part)
        virtual = int(getattr(config, "num_virtual_tokens", None) or 0)
        if virtual >= self.info.max_positions:
            raise AdapterError(
                f"{virtual} virtual tokens; the model has {self.info.max_positions} positions"
            )
        layers = self.info.split.end - self.info.split.start
        width = 2 * layers * self.info.hidden_size
        inner = int(getattr(config, "encoder_hidden_size", None) or 0)
        self._check_size(virtual * width // 8 + inner * (self.info.hidden_size + width), limits)

    def _check_size(self, count: int, limits: Limits) -> None:
        if count > limits.max_adapter_parameters:
            raise AdapterError(
                f"adapter of {count} parameters; this trunk accepts up to "
                f"{limits.max_adapter_parameters}"
            )
