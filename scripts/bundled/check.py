"""Checks the bundled model: sample text, and what LoRA fine-tuning on the notes does.

Run from the repository root::

    python -m scripts.bundled.check
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from shared import bundled

LOG = logging.getLogger(__name__)

PROMPTS = ("Once there was a little", "One cold morning,", "Dear", "To make", "Bed 12.")
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 0.8": {"do_sample": True, "temperature": 0.8, "top_k": 0},
}
BLOCK, BATCH = 128, 8


def blocks_of(path: Path, tokenizer: Any) -> Tensor:
    """Join the lines of a file with the end-of-text token and cut them into blocks."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [tokenizer.eos_token_id, *tokenizer(line)["input_ids"]]
    usable = len(ids) // BLOCK * BLOCK
    return torch.tensor(ids[:usable]).view(-1, BLOCK)


@torch.no_grad()
def perplexity(model: Any, blocks: Tensor) -> float:
    """Perplexity over all blocks."""
    model.eval()
    total = 0.0
    for batch in torch.split(blocks, 16):
        total += float(model(input_ids=batch, labels=batch).loss) * len(batch)
    model.train()
    return math.exp(total / len(blocks))


def show_samples(model: GPT2LMHeadModel, tokenizer: Any) -> None:
    """Log a greedy and a random continuation of every prompt.

    The end-of-text token goes first, as it does before every text of the pre-training.
    """
    for prompt in PROMPTS:
        inputs = tokenizer(tokenizer.eos_token + prompt, return_tensors="pt")
        for name, options in SAMPLING.items():
            torch.manual_seed(0)
            out = model.generate(**inputs, max_new_tokens=110, **options)
            LOG.info("%s | %s", name, tokenizer.decode(out[0], skip_special_tokens=True))


def fine_tune(model: Any, blocks: Tensor, steps: int, lr: float) -> None:
    """Train the adapters on random batches with AdamW."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check_lora(model: GPT2LMHeadModel, tokenizer: Any, steps: int) -> None:
    """Log the held-out perplexities before and after fine-tuning with LoRA."""
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True
    )
    tuned = get_peft_model(model, config)
    notes = blocks_of(bundled.private_heldout_file(), tokenizer)
    general = blocks_of(bundled.general_heldout_file(), tokenizer)
    before = perplexity(tuned, notes), perplexity(tuned, general)
    start = time.monotonic()
    fine_tune(tuned, blocks_of(bundled.private_train_file(), tokenizer), steps, lr=2e-3)
    took = time.monotonic() - start
    after = perplexity(tuned, notes), perplexity(tuned, general)
    LOG.info("%d LoRA steps in %.0f s", steps, took)
    LOG.info("notes perplexity %.2f -> %.2f", before[0], after[0])
    LOG.info("general perplexity %.2f -> %.2f", before[1], after[1])


def main() -> None:
    """Run the checks."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(bundled.model_dir())
    model = GPT2LMHeadModel.from_pretrained(bundled.model_dir())
    LOG.info(
        "%s, %d parameters, dtype %s", model.config.model_type, model.num_parameters(), model.dtype
    )
    show_samples(model, tokenizer)
    check_lora(model, tokenizer, arguments.steps)


if __name__ == "__main__":
    main()
