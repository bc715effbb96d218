"""Split against whole: both trained from one adapter on one data order, compared every step."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from transformers import AutoModelForCausalLM, get_scheduler

from client_service.split_model import SplitModelForCausalLM
from shared.adapters.weights import Weights, adapter_weights, read_adapter
from shared.adapters.wrap import wrap
from shared.errors import CheckpointError
from shared.models import open_checkpoint
from shared.models.dropout import set_dropout

LOSS_TOLERANCE = 1e-5
GRAD_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Largest differences between the split and the whole model, over all steps."""

    steps: int
    max_abs_loss_diff: float
    max_abs_grad_diff: float
    """Over every element of every adapter gradient, before clipping."""
    max_abs_adapter_diff: float
    """Over every adapter weight after the last step."""
    max_abs_grad_norm_diff: float
    final_loss: float

    @property
    def within_tolerance(self) -> bool:
        """Whether every difference is what float32 rounding explains."""
        return (
            self.max_abs_loss_diff <= LOSS_TOLERANCE
            and self.max_abs_grad_diff <= GRAD_TOLERANCE
            and self.max_abs_adapter_diff <= ADAPTER_TOLERANCE
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


@dataclass(frozen=True)
class _Recorded:
    losses: list[float]
    norms: list[float]
    gradients: list[Weights]
    adapter: Weights


def verify(
    model: str | Path,
    trunk: str,
    config: PeftConfig,
    batches: Iterator[dict[str, torch.Tensor]],
    plan: VerifyPlan,
    seed: int = 0,
    on_loss: Callable[[float], None] = lambda _: None,
) -> Difference:
    """Trains a split and the whole model alike and compares them.

    The whole model is loaded here, which a client otherwise never does. Dropout is off.

    Args:
        model: Folder or hub id of the whole model.
        trunk: ``host:port``.
        config: The adapter of all three parts.
        batches: Keyword arguments of a forward, labels included; ``plan.steps *
            plan.grad_accum`` are taken.
        plan: How to train.
        seed: Fixes the adapter both start from.
        on_loss: Told every loss of the split model.

    Raises:
        CheckpointError: If only the parts of the model are there.
        TrunklineError: As :meth:`SplitModelForCausalLM.from_pretrained`.
    """
    if open_checkpoint(model).metadata:
        raise CheckpointError(f"{model}: is split; verify needs the whole model beside it")
    data = list(itertools.islice(batches, plan.steps * plan.grad_accum))
    split = SplitModelForCausalLM.from_pretrained(
        model, trunk, peft_config=config, seed=seed, dropout=0.0
    )
    try:
        whole = _whole_model(model, split)
        ours = _train(split, data, plan)
        for loss in ours.losses:
            on_loss(loss)
    finally:
        split.remote_trunk.close()
    return _compare(ours, _train(whole, data, plan))


def _whole_model(model: str | Path, split: Any) -> Any:
    """The unsplit PEFT model with the very adapter that the split one starts from."""
    with tempfile.TemporaryDirectory() as folder:
        split.save_pretrained(folder)
        config, weights = read_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    base.loss_type = "ForCausalLM"
    set_dropout(base, 0.0)
    whole = wrap(base, config, 0, "whole", PeftModelForCausalLM)
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[_saved_name(name)])
    return whole


def _train(model: Any, data: list[dict[str, torch.Tensor]], plan: VerifyPlan) -> _Recorded:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    schedule = get_scheduler("linear", optimizer, plan.warmup_steps, plan.steps)
    recorded = _Recorded([], [], [], {})
    remaining = iter(data)
    for _ in range(plan.steps):
        for batch in itertools.islice(remaining, plan.grad_accum):
            loss = model(**batch, use_cache=False).loss
            (loss / plan.grad_accum).backward()
            recorded.losses.append(float(loss.detach()))
        recorded.gradients.append(_gradients(model))
        norm = torch.nn.utils.clip_grad_norm_(parameters, plan.grad_clip)
        recorded.norms.append(float(norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    recorded.adapter.update(_adapter(model))
    return recorded


def _gradients(model: Any) -> Weights:
    remote = getattr(model, "remote_trunk", None)
    found = {} if remote is None else remote.session.gradients()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not name.endswith(".proxy"):
            found[_saved_name(name)] = parameter.grad.clone()
    return dict(found)


def _adapter(model: Any) -> Weights:
    remote = getattr(model, "remote_trunk", None)
    return adapter_weights(model) | ({} if remote is None else remote.session.adapter())


def _saved_name(name: str) -> str:
    return name.replace(".default.", ".")


def _compare(ours: _Recorded, theirs: _Recorded) -> Difference:
    return Difference(
        steps=len(ours.norms),
        max_abs_loss_diff=_largest(ours.losses, theirs.losses),
        max_abs_grad_diff=max(
            _largest_weight(mine, other)
            for mine, other in zip(ours.gradients, theirs.gradients, strict=True)
        ),
        max_abs_adapter_diff=_largest_weight(ours.adapter, theirs.adapter),
        max_abs_grad_norm_diff=_largest(ours.norms, theirs.norms),
        final_loss=ours.losses[-1],
    )


def _largest(mine: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, other, strict=True))


def _largest_weight(mine: Weights, other: Weights) -> float:
    # A name on one side only would make the comparison say less than it claims.
    assert mine.keys() == other.keys(), sorted(mine.keys() ^ other.keys())[:3]
    return max(float((mine[n] - other[n]).abs().max()) for n in mine)
