"""The trunk's blocks: one copy of the base weights, one module tree a tenant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.errors import ModelMismatchError, SharedWeightsError
from shared.models import SplitRange, get_part_class, load_part, open_checkpoint
from shared.models.digest import weight_digest
from shared.models.families import family_of
from shared.models.onednn import use_onednn
from shared.models.quantization import check_kind, dequantized, quantize
from shared.versions import check_versions, library_versions
from trunk_service.adapter_build import TreeLimits
from trunk_service.offload import OffloadArea
from trunk_service.requests import OpenRequest
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

    def norms(self, name: str, of_columns: bool) -> torch.Tensor:
        """The 2-norm of each row, or column, of a base matrix, in float32: DoRA's fresh magnitudes.

        Raises:
            SharedWeightsError: If there is no such matrix.
        """
        matrix = self.matrix(name).float()
        if matrix.ndim != 2:
            raise SharedWeightsError(f"{name[:120]!r} is no base matrix of the trunk's blocks")
        norms: torch.Tensor = torch.linalg.norm(matrix.T if of_columns else matrix, dim=1)
        return norms

    def linear_modules(self) -> list[str]:
        """Full names of the blocks' modules that are torch's ``Linear``."""
        return [n for n, m in self._part.named_modules() if isinstance(m, nn.Linear)]
