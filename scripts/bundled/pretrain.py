"""Pre-training of the bundled model on packed blocks of generated text."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from scripts.bundled.tokenizer import eos_id

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: Number of optimizer steps.
        batch: Blocks in a step.
        block: Tokens in a block; also the number of positions of the model.
        peak_lr: Highest learning rate.
        warmup: Steps until the peak.
        final_share: Share of the peak that is left at the last step.
        weight_decay: AdamW's decay of the matrices.
        seed: Seed of the weights and of the order of the blocks.
        threads: CPU threads; the weights are the same only for the same number.
        report_every: Steps between a held-out evaluation and a published checkpoint.
    """

    steps: int
    batch: int = 8
    block: int = 256
    peak_lr: float = 4e-3
    warmup: int = 100
    final_share: float = 0.02
    weight_decay: float = 0.05
    seed: int = 7
    threads: int = 2
    report_every: int = 200

    def lr(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        return self.peak_lr * (self.final_share + (1 - self.final_share) * cosine)


def new_model(vocab_size: int, eos: int, positions: int) -> GPT2LMHeadModel:
    """Make the untrained model: GPT-2 with 12 narrow blocks.

    Args:
        vocab_size: Number of tokens.
        eos: Token that stands for begin, end and padding.
        positions: Longest sequence.

    Returns:
        The model, without dropout.
    """
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=positions,
        n_embd=128,
        n_layer=12,
        n_head=4,
        initializer_range=0.06,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        tie_word_embeddings=True,
    )
    return GPT2LMHeadModel(config)


def pack(texts: list[str], tokenizer: Tokenizer, block: int) -> Tensor:
    """Join texts with the end-of-text token and cut them into blocks.

    Args:
        texts: The texts.
        tokenizer: The tokenizer.
        block: Tokens in a block.

    Returns:
        Token ids, shape ``(blocks, block)``; what is left over is dropped.
    """
    eos = eos_id(tokenizer)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [eos, *encoding.ids]
    usable = len(ids) // block * block
    return torch.tensor(ids[:usable], dtype=torch.int32).view(-1, block)


def batches(blocks: Tensor, plan: Plan) -> Iterator[Tensor]:
    """Yield one batch a step; each pass over the blocks has its own order."""
    order = torch.Generator().manual_seed(plan.seed)
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(plan.steps):
        if len(queue) < plan.batch:
            queue = torch.cat([queue, torch.randperm(len(blocks), generator=order)])
        yield blocks[queue[: plan.batch]].long()
        queue = queue[plan.batch :]


def make_optimizer(model: GPT2LMHeadModel, plan: Plan) -> torch.optim.Optimizer:
    """AdamW that decays the matrices and leaves biases and norms alone."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.95), fused=True)


def loss_of(model: GPT2LMHeadModel, batch: Tensor) -> Tensor:
    """Mean loss of a batch, with bfloat16 matrix products, which are faster on this CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: Tensor) -> float:
    """Mean loss over held-out blocks."""
    losses = [float(loss_of(model, part.long())) * len(part) for part in torch.split(blocks, 8)]
    return sum(losses) / len(blocks)


def step_once(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, batch: Tensor, lr: float
) -> float:
    """Do one optimizer step and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = loss_of(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def pretrain(
    model: GPT2LMHeadModel,
    blocks: Tensor,
    held_out: Tensor,
    plan: Plan,
    publish: Callable[[GPT2LMHeadModel], None],
) -> None:
    """Train the model.

    Args:
        model: The new model, changed in place.
        blocks: Training blocks.
        held_out: Held-out blocks.
        plan: How to train.
        publish: Called with the model at every report and at the end.
    """
    optimizer = make_optimizer(model, plan)
    start, recent = time.monotonic(), 0.0
    for step, batch in enumerate(batches(blocks, plan)):
        loss = step_once(model, optimizer, batch, plan.lr(step))
        recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
        done = step + 1
        if done % 50 == 0:
            rate = done * plan.batch * plan.block / (time.monotonic() - start)
            LOG.info(
                "step %d of %d: train loss %.4f, %.0f tokens/s", done, plan.steps, recent, rate
            )
        if done % plan.report_every == 0 or done == plan.steps:
            LOG.info("step %d: held-out loss %.4f", done, held_out_loss(model, held_out))
            publish(model)
