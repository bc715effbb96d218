"""The client's model: the family's ordinary ``…ForCausalLM`` with a hole where the trunk is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftConfig

from client_service.addresses import wait_for_trunk
from client_service.calls import SessionTerms
from client_service.hole import with_hole
from client_service.remote_trunk import RemoteTrunk
from client_service.session import RECONNECT_TIMEOUT_S, TrunkSession
from client_service.split_ends import TRUNK_ADAPTER, check_ends, train_ends
from client_service.split_peft import LoadedAdapter, SplitPeftModelForCausalLM, read_loaded
from client_service.wire_guard import WireGuard
from shared.adapters.config import config_to_json
from shared.adapters.joining import SplitShape
from shared.adapters.plan import AdapterPlan, plan_adapter
from shared.adapters.weights import Weights, read_adapter
from shared.adapters.wrap import wrap
from shared.errors import AdapterError
from shared.models import Checkpoint, SplitRange, open_checkpoint
from shared.models.digest import client_digest
from shared.wire.formats import WireFormat

logger = logging.getLogger(__name__)

TrunkPeft: TypeAlias = "PeftConfig | Literal['same'] | None"


class SplitModelForCausalLM:
    """Loads a split model, as ``AutoModelForCausalLM`` loads a whole one."""

    @staticmethod
    def from_pretrained(
        model: str | Path,
        trunk: str = "localhost:50052",
        *,
        split: str | None = None,
        peft_config: PeftConfig | None = None,
        trunk_peft_config: TrunkPeft = "same",
        peft_parts: str = "all",
        adapter: str | Path | None = None,
        seed: int = 0,
        dropout: float | None = None,
        dtype: torch.dtype = torch.float32,
        wire_format: str = "float32",
        gradient_wire_format: str | None = None,
        max_wire_drift: float | None = None,
        wire_check_every: int = 20,
        quantize: str = "",
        fused_loss: bool = False,
        onednn: bool = False,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Any:
        """Opens a session on a trunk and loads the two ends of a model around it.

        Args:
            model: Folder (whole or split layout) or hub id; only the ends' tensors are read.
            trunk: ``host:port`` of the trunk; several with commas are tried in turn.
            split: ``START:END`` that the trunk must serve; None takes what it serves.
            peft_config: Adapter of the model; without one the ends are trained themselves.
            trunk_peft_config: Adapter of the trunk's blocks: ``"same"`` as the ends, another
                configuration of the same method, or None for a frozen trunk.
            peft_parts: Which parts ``peft_config`` adapts: ``all``, ``bottom``, ``trunk``, ``top``
                or ``ends``; what it does not adapt is frozen. Without one, which ends are trained.
            adapter: Folder of a whole model's PEFT adapter to start from, cut onto the parts.
            seed: Fixes fresh adapter weights and the trunk's dropout.
            dropout: Replaces the probability of the model's own dropout layers, on both sides.
            dtype: What the ends are computed in.
            wire_format: How hidden states travel: ``float32``, ``bfloat16``, ``float16`` or
                ``int8``; the last ones lose digits (docs/performance.md tells what it does).
            gradient_wire_format: How gradients travel; None is as hidden states.
            max_wire_drift: Goes back to float32 when a training loss is further than this, in
                relation, from what it is with float32; None does not look.
            wire_check_every: Training forwards from one such look to the next.
            quantize: Holds the ends' base weights in ``"nf4"`` or ``"int8"`` (bitsandbytes).
            fused_loss: In training mode, makes the loss and its gradients without the logits, and
                only where a label counts (see :mod:`client_service.fused_loss`): faster in
                float32, the same up to rounding, and the output's ``logits`` are None.
            onednn: Lets oneDNN compute frozen float32 linear layers of the ends: faster on AMD
                CPUs, the same up to rounding (see :mod:`shared.models.onednn`).
            reconnect_timeout_s: How long to look for a trunk when one is lost; 0 gives up at once.

        Returns:
            The family's ``…ForCausalLM`` in evaluation mode, as a ``PeftModel`` if it has an
            adapter. ``model.remote_trunk`` is its session.

        Raises:
            TrunkUnavailableError: If no trunk answers within a few seconds.
            ModelMismatchError: If the trunk serves another model, split or weights.
            CheckpointError: If the model cannot be read.
            AdapterError: If an adapter is refused.
            InvalidInputError: If a wire format is unknown, a bound is not positive, or oneDNN is
                asked for in another dtype than float32.
        """
        checkpoint = open_checkpoint(model)
        served = SplitRange.parse(split) if split else _served_split(trunk)
        served.check(checkpoint.config.num_hidden_layers)
        shape = SplitShape(checkpoint.family, served, checkpoint.config.num_hidden_layers)
        plan, loaded = None, None
        if adapter is not None:
            if peft_config is not None:
                raise AdapterError("give peft_config or adapter, not both")
            plan, loaded = _plan_loaded(Path(adapter), checkpoint, shape)
        elif peft_config is not None:
            trunk_config = peft_config if trunk_peft_config == "same" else trunk_peft_config
            plan = plan_adapter(peft_config, trunk_config, checkpoint.config, served, peft_parts)
        trunk_json = "" if plan is None else plan.trunk_json
        beside = None
        if plan is None:
            check_ends(peft_parts)
            beside = _adapter_beside(model)
            alone = beside[0] if beside else trunk_peft_config
            trunk_json = config_to_json(alone) if isinstance(alone, PeftConfig) else ""
        digest = _digest(checkpoint, served)
        terms = SessionTerms(
            split=(served.start, served.end),
            weight_digest=digest,
            peft_config_json=trunk_json,
            seed=seed,
            dropout=dropout,
            activation_format=WireFormat.named(wire_format),
            gradient_format=WireFormat.named(gradient_wire_format or wire_format),
        )
        remote = RemoteTrunk(TrunkSession(trunk, terms, reconnect_timeout_s=reconnect_timeout_s))
        try:
            whole: Any = with_hole(
                checkpoint, served, remote, dtype, dropout, quantize, fused_loss, onednn
            )
            if max_wire_drift is not None:
                remote.guard = WireGuard(whole, remote, max_wire_drift, wire_check_every)
            if plan is not None:
                whole = wrap(whole, plan.client, seed, "client", SplitPeftModelForCausalLM)
                remote.proxy.requires_grad_(remote.trainable)
            else:
                train_ends(whole, peft_parts)
            if loaded is not None:
                whole.load_sides(str(adapter), loaded)
            if beside is not None:
                remote.restore(beside[1])
        except BaseException:
            remote.close()
            raise
        return whole.eval()


def _adapter_beside(model: str | Path) -> tuple[PeftConfig, Weights] | None:
    """The trunk's adapter in a folder of ends that were trained themselves."""
    folder = Path(model) / TRUNK_ADAPTER
    return read_adapter(folder) if folder.is_dir() else None


def _plan_loaded(
    folder: Path, checkpoint: Checkpoint, shape: SplitShape
) -> tuple[AdapterPlan, LoadedAdapter]:
    """An adapter that was saved whole, by side; one that leaves the trunk alone freezes it."""
    loaded = read_loaded(folder, shape)
    config = loaded.client.config
    trunk_config = loaded.trunk.config if loaded.trunk.weights else None
    parts = "all" if loaded.client.weights else "trunk"
    plan = plan_adapter(
        config if parts == "all" else loaded.trunk.config,
        trunk_config,
        checkpoint.config,
        shape.split,
        parts,
    )
    return plan, loaded


def _served_split(trunk: str) -> SplitRange:
    info = wait_for_trunk(trunk)
    return SplitRange(info.start_layer, info.end_layer)


def _digest(checkpoint: Checkpoint, split: SplitRange) -> str | None:
    digest = client_digest(checkpoint, split)
    if digest is None:
        logger.warning("%s does not say which trunk it belongs to: unchecked", checkpoint.source)
    return digest
