"""Split against whole: both trained from one adapter on one data order, compared every step."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import get_scheduler

from client_service.adapter_files import Weights
from client_service.split_model import SplitModelForCausalLM
from client_service.whole import (
    gradients,
    largest_difference,
    load_whole,
    trained_weights,
    whole_twin,
)
from shared.errors import CheckpointError
from shared.models import open_checkpoint

LOSS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Largest differences between the split and the whole model, over all steps."""

    steps: int
    max_abs_loss_diff: float
    max_abs_grad_diff: float
    """Over every element of every gradient, before clipping."""
    first_step_grad_diff: float
    """The same of the first step alone, where both have the very same weights."""
    max_abs_adapter_diff: float
    """Over every trained weight after the last step."""
    max_abs_grad_norm_diff: float
    max_abs_reloaded_logit_diff: float
    """Between the split model and plain PEFT with the saved adapter; 0 without an adapter."""
    differing_ranks: int
    """Matrices in which AdaLoRA keeps other singular values; 0 for another method."""
    first_loss: float
    """Mean over the first tenth of the batches."""
    final_loss: float
    """Mean over the last tenth of the batches."""

    @property
    def within_tolerance(self) -> bool:
        """Whether every difference is what float32 rounding explains."""
        return (
            self.max_abs_loss_diff <= LOSS_TOLERANCE
            and self.max_abs_grad_diff <= GRAD_TOLERANCE
            and self.max_abs_adapter_diff <= ADAPTER_TOLERANCE
            and self.max_abs_reloaded_logit_diff <= LOGIT_TOLERANCE
            and self.differing_ranks == 0
        )

    def as_dict(self) -> dict[str, float]:
        """The differences by name."""
        return asdict(self)


@dataclass(frozen=True)
class VerifyPlan:
    """How both are trained: AdamW, linear schedule with warm-up, clipping, accumulation."""

    steps: int = 20
    grad_accum: int = 2
    grad_clip: float = 0.3
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 3


@dataclass
class _Recorded:
    losses: list[float]
    norms: list[float]
    gradients: list[Weights]
    trained: Weights
    ranks: dict[str, list[bool]] = field(default_factory=dict)
    reloaded: float = 0.0


def verify(
    model: str | Path,
    trunk: str,
    config: PeftConfig | None,
    batches: Iterator[dict[str, torch.Tensor]],
    plan: VerifyPlan,
    seed: int = 0,
    on_loss: Callable[[float], None] = lambda _: None,
    *,
    parts: str = "all",
    quantize: str = "",
) -> Difference:
    """Trains a split and the whole model alike and compares them.

    The whole model is loaded here, which a client otherwise never does. Dropout is off.

    Args:
        model: Folder or hub id of the whole model.
        trunk: ``host:port``.
        config: The adapter; None trains the ends' own weights beside a frozen trunk.
        batches: Keyword arguments of a forward, labels included; ``plan.steps *
            plan.grad_accum`` are taken.
        plan: How to train.
        seed: Fixes the adapter both start from.
        on_loss: Told every loss of the split model.
        parts: Where the adapter is.
        quantize: How the base weights of both are held; the trunk must hold its own so.

    Raises:
        CheckpointError: If only the parts of the model are there.
        TrunklineError: As :meth:`SplitModelForCausalLM.from_pretrained`.
    """
    if open_checkpoint(model).metadata:
        raise CheckpointError(f"{model}: is split; verify needs the whole model beside it")
    data = list(itertools.islice(batches, plan.steps * plan.grad_accum))
    split = SplitModelForCausalLM.from_pretrained(
        model,
        trunk,
        peft_config=config,
        peft_parts=parts,
        seed=seed,
        dropout=0.0,
        quantize=quantize,
    )
    try:
        whole = whole_twin(model, split, quantize)
        ours = _train(split, data, plan)
        for loss in ours.losses:
            on_loss(loss)
        ours.reloaded = _reloaded_difference(split, model, data[0], quantize)
    finally:
        split.remote_trunk.close()
    return _compare(ours, _train(whole, data, plan))


def _train(model: Any, data: list[dict[str, torch.Tensor]], plan: VerifyPlan) -> _Recorded:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    schedule = get_scheduler("linear", optimizer, plan.warmup_steps, plan.steps)
    recorded = _Recorded([], [], [], {})
    allocates = is_adalora(model)
    remaining = iter(data)
    for step in range(1, plan.steps + 1):
        for batch in itertools.islice(remaining, plan.grad_accum):
            loss = model(**batch, use_cache=False).loss
            (loss / plan.grad_accum).backward()
            recorded.losses.append(float(loss.detach()))
        recorded.gradients.append(gradients(model))
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.grad_clip)
        recorded.norms.append(float(norm))
        optimizer.step()
        if allocates:
            model.update_and_allocate(step)
        schedule.step()
        optimizer.zero_grad()
    recorded.trained.update(trained_weights(model))
    if allocates:
        recorded.ranks = ranks_of(model)
    return recorded


def is_adalora(model: Any) -> bool:
    """Tells whether a model's adapter is AdaLoRA, whose ranks the loop has to allocate."""
    configs = getattr(model, "peft_config", {}).values()
    return any(config.peft_type == PeftType.ADALORA for config in configs)


def ranks_of(model: Any) -> dict[str, list[bool]]:
    """Which singular values AdaLoRA keeps, of a whole or split model, by matrix."""
    return dict(model.peft_config["default"].rank_pattern or {})


@torch.no_grad()
def _reloaded_difference(
    split: Any, model: str | Path, batch: dict[str, torch.Tensor], quantize: str
) -> float:
    """Largest difference of logits once plain PEFT has loaded the saved adapter on the whole."""
    if not hasattr(split, "peft_config"):
        return 0.0
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with tempfile.TemporaryDirectory() as folder:
        split.save_pretrained(folder)
        whole = PeftModel.from_pretrained(load_whole(model, quantize), folder).eval()
    # A quantised layer's evaluation and training differ; both sides are asked alike.
    was_training = split.training
    ours, theirs = (m(**inputs, use_cache=False).logits for m in (split.eval(), whole))
    split.train(was_training)
    return float((ours - theirs).abs().max())


def _compare(ours: _Recorded, theirs: _Recorded) -> Difference:
    tenth = max(1, len(ours.losses) // 10)
    differences = [
        largest_difference(mine, other)
        for mine, other in zip(ours.gradients, theirs.gradients, strict=True)
    ]
    return Difference(
        steps=len(ours.norms),
        max_abs_loss_diff=_largest(ours.losses, theirs.losses),
        max_abs_grad_diff=max(differences),
        first_step_grad_diff=differences[0],
        max_abs_adapter_diff=largest_difference(ours.trained, theirs.trained),
        max_abs_grad_norm_diff=_largest(ours.norms, theirs.norms),
        max_abs_reloaded_logit_diff=ours.reloaded,
        differing_ranks=sum(ours.ranks.get(n) != k for n, k in theirs.ranks.items())
        + len(ours.ranks.keys() - theirs.ranks.keys()),
        first_loss=sum(ours.losses[:tenth]) / tenth,
        final_loss=sum(ours.losses[-tenth:]) / tenth,
    )


def _largest(mine: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, other, strict=True))
