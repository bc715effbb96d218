"""An ordinary training loop: nothing in it knows that the model is split."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from client_service.pipeline import accumulate, cut_batch
from shared.failpoints import reach

_OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
}


@dataclass(frozen=True)
class TrainingPlan:
    """How to train."""

    steps: int = 100
    batch_size: int = 8
    lr: float = 1e-3
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """torch's, of all parts."""
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    grad_accum: int = 1
    """Batches of one optimizer step."""
    micro_batches: int = 1
    """Pieces of every batch, on their way through the split at once."""
    schedule: str = "constant"
    """A name of transformers' schedules: constant, linear, cosine …"""
    warmup_steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean over the step's batches."""
    grad_norm: float
    """Global 2-norm before clipping, the trunk's part included."""
    lr: float
    tokens: int
    bytes_sent: int
    """By this step; 0 for a whole model."""
    bytes_received: int
    seconds: float

    def as_dict(self) -> dict[str, float]:
        """The metrics as a line of ``metrics.jsonl``."""
        return asdict(self)


@dataclass
class TrainingState:
    """A run between two of its steps: everything that the next step depends on, or has it."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    steps: int
    """Of the whole run."""
    step: int = 0
    """The last one that was done."""
    batches_taken: int = 0


def train(
    model: Any,
    batches: Iterator[torch.Tensor],
    plan: TrainingPlan,
    restore: Callable[[TrainingState], None] | None = None,
    save: Callable[[TrainingState], None] | None = None,
) -> Iterator[StepMetrics]:
    """Trains a causal-LM model, split or whole, yielding after every optimizer step.

    Args:
        model: A Hugging Face model; what requires gradients is trained.
        batches: Token ids [B, T]; those that a restored run has not taken yet.
        plan: How.
        restore: Puts the state of an earlier run in place, see :mod:`client_service.checkpoint`.
        save: Called after every step, once its metrics were taken: what it saves is then never
            ahead of what was written down about it.
    """
    model.train()
    torch.manual_seed(plan.seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = _OPTIMIZERS[plan.optimizer](trainable, lr=plan.lr, weight_decay=plan.weight_decay)
    allocates = getattr(model, "update_and_allocate", None)  # AdaLoRA
    schedule = get_scheduler(
        plan.schedule, optimizer, num_warmup_steps=plan.warmup_steps, num_training_steps=plan.steps
    )
    state = TrainingState(model, optimizer, schedule, plan.steps)
    if restore is not None:
        restore(state)
    for step in range(state.step + 1, plan.steps + 1):
        started, sent, received = time.perf_counter(), *traffic(model)
        loss_sum, tokens = 0.0, 0
        for _ in range(plan.grad_accum):
            input_ids = next(batches)
            loss_sum += _forward_backward(model, input_ids, plan)
            tokens += input_ids.numel()
        reach("client.step.before")
        limit = plan.grad_clip or float("inf")
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trainable, limit))
        lr = float(schedule.get_last_lr()[0])
        reach("client.optimizer.before")
        optimizer.step()
        reach("client.optimizer.after")
        if allocates is not None:
            allocates(step)  # reads the step's gradients, so before they are zeroed
        schedule.step()
        optimizer.zero_grad()
        state.step, state.batches_taken = step, state.batches_taken + plan.grad_accum
        reach("client.step.after")
        now_sent, now_received = traffic(model)
        yield StepMetrics(
            step=step,
            loss=loss_sum / plan.grad_accum,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            bytes_sent=now_sent - sent,
            bytes_received=now_received - received,
            seconds=time.perf_counter() - started,
        )
        if save is not None:
            save(state)


def _forward_backward(model: Any, ids_BT: torch.Tensor, plan: TrainingPlan) -> float:
    """Adds a batch's gradients, divided by the number of batches; returns its loss."""
    batch = {"input_ids": ids_BT, "labels": ids_BT}
    if plan.micro_batches > 1:
        pieces = cut_batch(batch, plan.micro_batches)
        return accumulate(model, pieces, len(pieces), scale=1.0 / plan.grad_accum)
    loss = model(**batch, use_cache=False).loss
    (loss / plan.grad_accum).backward()
    return float(loss.detach())


def traffic(model: Any) -> tuple[int, int]:
    """Bytes a split model has sent and received so far; zeros for a whole one."""
    remote = getattr(model, "remote_trunk", None)
    if remote is None:
        return 0, 0
    counted = remote.session.traffic
    return counted.bytes_sent, counted.bytes_received


@torch.no_grad()
def mean_loss(model: Any, blocks_NT: torch.Tensor, batch_size: int) -> float:
    """Mean cross-entropy per predicted token over blocks of token ids [N, T].

    Not the model's own loss: AdaLoRA adds its regularisation to that.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    for start in range(0, len(blocks_NT), batch_size):
        batch_BT = blocks_NT[start : start + batch_size]
        # Virtual tokens of prompt tuning stand in front of the block's own.
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, -batch_BT.shape[1] :]
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), batch_BT[:, 1:].flatten())
        total += float(loss) * len(batch_BT)
    model.train(was_training)
    return total / len(blocks_NT)
