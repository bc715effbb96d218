"""Loading a split model: the family's ordinary class, whose middle blocks a trunk computes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model

from client_service.adapter_base import tell_other_base
from client_service.adapter_files import read_adapter
from client_service.addresses import wait_for_trunk
from client_service.by_peft import by_peft, seeded
from client_service.calls import SessionTerms
from client_service.dropout_key import user_secret
from client_service.ends import train_ends
from client_service.fresh_ends import redraw_ends
from client_service.placement import TrunkPeft, check_parts, placed
from client_service.session import RECONNECT_TIMEOUT_S, TrunkSession
from client_service.skeleton_model import with_skeleton
from client_service.wire_guard import WireGuard
from shared.errors import AdapterError
from shared.models import Checkpoint, SplitRange, open_checkpoint
from shared.models.digest import client_digest
from shared.wire.formats import WireFormat

logger = logging.getLogger(__name__)


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
        seed: int | None = None,
        secret_ends: bool = False,
        dropout: float | None = None,
        dropout_secret: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        wire_format: str = "float32",
        gradient_wire_format: str | None = None,
        adapter_wire_format: str = "float32",
        max_wire_drift: float | None = None,
        wire_check_every: int = 20,
        quantize: str = "",
        fused_loss: bool = False,
        onednn: bool = False,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Any:
        """Opens a session on a trunk and loads the two ends of a model around its blocks.

        What comes back is an ordinary model: ``get_peft_model(model, config)``,
        ``PeftModel.from_pretrained(model, folder)``, optimizers and trainers do to it what they do
        to the whole one. The arguments about adapters only say the first two of these in short.

        Args:
            model: Folder (whole or split layout) or hub id; only the ends' tensors are read.
            trunk: ``host:port`` of the trunk; several with commas are tried in turn.
            split: ``START:END`` that the trunk must serve; None takes what it serves.
            peft_config: As in ``get_peft_model``; without one the ends are trained themselves.
            trunk_peft_config: Adapter of the trunk's blocks: ``"same"`` as the ends, another rank
                or alpha of the same configuration, or None for a frozen trunk.
            peft_parts: Which parts ``peft_config`` adapts: ``all``, ``bottom``, ``trunk``, ``top``
                or ``ends``; what it does not adapt is frozen. Without one, which ends are trained.
            adapter: As in ``PeftModel.from_pretrained(model, folder, is_trainable=True)``; virtual
                tokens, which PEFT loads for inference alone, are to be trained as well.
            seed: Of torch's generator while a fresh adapter is drawn; None draws from it as it is.
            secret_ends: Draws the ends' half of a fresh adapter from the system's randomness, see
                :func:`client_service.redraw_ends`.
            dropout: Replaces the probability of the model's own dropout layers, on both sides.
            dropout_secret: File of the secret of the trunk's dropout masks; None is the user's own.
            dtype: What the ends are computed in.
            wire_format: How hidden states travel: ``float32``, ``bfloat16``, ``float16`` or
                ``int8``; the last ones lose digits (docs/performance.md tells what it does).
            gradient_wire_format: How gradients of hidden states travel; None is as they do.
            adapter_wire_format: How the adapter's tensors travel to the trunk's blocks, where they
                are float32, and their gradients back; the trunk computes with what arrives.
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
            AdapterError: If an adapter is refused, here, by PEFT or by the trunk.
            InvalidInputError: If a wire format is unknown, a bound is not positive, or oneDNN is
                asked for in another dtype than float32.
        """
        checkpoint, prompt = open_checkpoint(model), False
        if adapter is not None:
            if peft_config is not None:
                raise AdapterError("give peft_config or adapter, not both")
            # Names what is missing or damaged, before anything is opened.
            prompt = read_adapter(adapter)[0].is_prompt_learning
        check_parts(peft_parts)
        if peft_config is None and trunk_peft_config not in ("same", None):
            raise AdapterError(
                "trunk_peft_config without peft_config: accepted is peft_config with peft_parts="
                "'trunk', and modules_to_save for what is trained whole"
            )
        served = SplitRange.parse(split) if split else _served_split(trunk)
        served.check(checkpoint.config.num_hidden_layers)
        if peft_config is not None:
            config = checkpoint.config
            peft_config = placed(peft_config, trunk_peft_config, peft_parts, config, served)
        secret = None if dropout_secret is None else user_secret(Path(dropout_secret))
        terms = SessionTerms(
            split=(served.start, served.end),
            weight_digest=_digest(checkpoint, served),
            activation_format=WireFormat.named(wire_format),
            gradient_format=WireFormat.named(gradient_wire_format or wire_format),
            adapter_format=WireFormat.named(adapter_wire_format),
        )
        session = TrunkSession(trunk, terms, reconnect_timeout_s=reconnect_timeout_s)
        try:
            base: Any = with_skeleton(
                checkpoint,
                served,
                session,
                dtype,
                dropout=dropout,
                secret=secret,
                quantize=quantize,
                fused_loss=fused_loss,
                onednn=onednn,
            )
            if max_wire_drift is not None:
                base.wire_guard = WireGuard(
                    base, base.remote_trunk, max_wire_drift, wire_check_every
                )
            whole = base
            if peft_config is not None:
                with by_peft("PEFT cannot put this adapter on the model"), seeded(seed):
                    whole = get_peft_model(base, peft_config)
                if secret_ends:
                    redraw_ends(whole)
            elif adapter is not None:
                with by_peft(f"{adapter}: PEFT cannot load it on this model"):
                    whole = PeftModel.from_pretrained(base, str(adapter), is_trainable=not prompt)
                    if prompt:
                        whole.prompt_encoder.requires_grad_(True)
                tell_other_base(adapter, session.info)
            else:
                train_ends(base, peft_parts)
            if whole is not base:
                base.passage.check()
        except BaseException:
            session.close()
            raise
        return whole.eval()


def _served_split(trunk: str) -> SplitRange:
    info = wait_for_trunk(trunk)
    return SplitRange(info.start_layer, info.end_layer)


def _digest(checkpoint: Checkpoint, split: SplitRange) -> str | None:
    digest = client_digest(checkpoint, split)
    if digest is None:
        logger.warning("%s does not say which trunk it belongs to: unchecked", checkpoint.source)
    return digest
