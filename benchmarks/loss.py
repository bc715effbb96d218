"""The split against the whole model on real text, step by step; and lossy wire formats likewise.

``python -m benchmarks.loss [--e2e FOLDER]``: with a folder that holds the E2E NLG data
(``e2e/valid.txt`` and ``gpt2-tokenizer/``) the bundled blocks are trained on it, with GPT-2's own
vocabulary; without, the bundled model on the bundled notes.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.gpt2_small import SPLIT, lora
from benchmarks.report import Claim, Section, log_sections
from client_service.data import batches, read_texts, token_blocks
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from client_service.verify import VerifyPlan, verify
from shared.bundled import model_dir, private_train_file

BATCH, TOKENS, STEPS = 4, 64, 200
LAST = 20
"""Steps at the end whose mean loss is compared: one batch's loss alone is mostly that batch."""


class Data:
    """The bundled blocks and text for them."""

    def __init__(self, e2e: Path | None, scratch: Path) -> None:
        self.model: Path = model_dir()
        tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        file = private_train_file()
        self.name = "bundled notes"
        if e2e is not None:
            self.name, file = "E2E NLG valid.txt", e2e / "e2e" / "valid.txt"
            real_bpe = str(e2e / "gpt2-tokenizer" / "tokenizer.json")
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=real_bpe, eos_token="<|endoftext|>")
            self.model = _bundled_shape(scratch, len(tokenizer))
        self._blocks = token_blocks(read_texts(file), tokenizer, TOKENS)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        for ids in batches(self._blocks, BATCH, 0):
            yield {"input_ids": ids, "labels": ids}


def _bundled_shape(folder: Path, vocab: int) -> Path:
    """The bundled model's blocks with seeded embeddings for another vocabulary."""
    torch.manual_seed(0)
    bundled = GPT2LMHeadModel.from_pretrained(model_dir())
    bundled.resize_token_embeddings(vocab, mean_resizing=False)
    bundled.save_pretrained(folder)
    return folder


def measure(quick: bool = False, e2e: Path | None = None) -> list[Section]:
    """Both comparisons, at equal steps with equal batches."""
    steps = 40 if quick else STEPS
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(e2e, Path(scratch))
        with local_trunk(str(data.model), SPLIT) as address:
            return [_exactness(data, address, steps), _formats(data, address, steps)]


def _exactness(data: Data, address: str, steps: int) -> Section:
    plan = VerifyPlan(steps=steps, grad_accum=1, grad_clip=1.0, warmup_steps=10)
    found = verify(data.model, address, lora(), data.batches(), plan).as_dict()
    section = Section("exact", f"Split against whole, {steps} steps on {data.name}, float32")
    section.rows = [{"largest difference of": name, "value": v} for name, v in found.items()]
    section.claims = [
        Claim("loss", float(found["max_abs_loss_diff"]), 1e-5),
        Claim("gradients", float(found["max_abs_grad_diff"]), 1e-5),
        Claim("adapter weights", float(found["max_abs_adapter_diff"]), 1e-4),
    ]
    return section


def _formats(data: Data, address: str, steps: int) -> Section:
    section = Section("formats", f"Wire formats, {steps} steps on {data.name}")
    losses = {name: _train(data, address, steps, name) for name in ("float32", "bfloat16", "int8")}
    exact = losses["float32"]
    for name, (found, sent) in losses.items():
        apart = [abs(a - b) / b for a, b in zip(found, exact[0], strict=True)]
        last, expected = statistics.mean(found[-LAST:]), statistics.mean(exact[0][-LAST:])
        section.rows.append(
            {
                "format": name,
                "first loss": found[0],
                f"mean of last {LAST}": last,
                "its drift": abs(last - expected) / expected,
                "drift of the last step": apart[-1],
                "largest drift of a step": max(apart),
                "bytes per token and step": sent,
            }
        )
    drifts = {row["format"]: row for row in section.rows}
    for name, bound in (("bfloat16", 0.001), ("int8", 0.005)):
        for key in ("its drift", "drift of the last step"):
            what = f"mean of the last {LAST} losses" if key == "its drift" else "last loss"
            text = f"{name} against float32 at {steps} steps, {what}"
            section.claims.append(Claim(text, drifts[name][key], bound))
    return section


def _train(data: Data, address: str, steps: int, wire_format: str) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model: Any = SplitModelForCausalLM.from_pretrained(
        data.model, address, peft_config=lora(), wire_format=wire_format
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _, batch in zip(range(steps), data.batches(), strict=False):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    counted = model.remote_trunk.session.traffic
    model.remote_trunk.close()
    sent = (counted.bytes_sent + counted.bytes_received) / (steps * BATCH * TOKENS)
    return losses, sent


def main() -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--e2e", type=Path, help="folder with e2e/ and gpt2-tokenizer/")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    log_sections(measure(given.quick, given.e2e))


if __name__ == "__main__":
    main()
