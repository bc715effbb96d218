"""``make bench``: the split beside the whole model in one run, written to ``benchmarks/results``.

``python -m benchmarks [--e2e FOLDER]``: with a folder that holds the E2E NLG data (``valid.txt``),
the loss comparison runs on it; without, on the bundled notes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from client_service.data import batches, read_texts, token_blocks
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from client_service.verify import VerifyPlan, verify
from shared.adapters.wrap import wrap
from shared.bundled import model_dir, private_train_file

LOG = logging.getLogger("benchmarks")
RESULTS = Path(__file__).parent / "results"
MIB = 1024**2
PAIRS, BATCH, TOKENS = 15, 4, 128
IDLE_S = 4.0  # an idle trunk gives freed memory back within two seconds


def lora() -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["c_attn", "c_fc", "c_proj"]
    )


def gpt2_small(folder: Path) -> Path:
    """GPT-2 small's shape (124M parameters) with seeded random weights."""
    torch.manual_seed(0)
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def one_step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    model.train()
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def trunk_process() -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    return next(c for c in children if "trunk_service" in " ".join(c.cmdline()))


def step_time(folder: Path) -> dict[str, Any]:
    """Steps of split and whole in turn, and the trunk's memory beside what it should hold."""
    with local_trunk(str(folder), "2:10") as address:
        trunk = trunk_process()
        idle = trunk.memory_info().rss
        split = SplitModelForCausalLM.from_pretrained(folder, address, peft_config=lora())
        whole = wrap(GPT2LMHeadModel.from_pretrained(folder), lora(), 0, "whole")
        sides = [(model, optimizer_of(model)) for model in (split, whole)]
        generator = torch.Generator().manual_seed(0)
        seconds: list[list[float]] = [[], []]
        peak = 0
        for pair in range(PAIRS + 2):
            ids = torch.randint(0, 50257, (BATCH, TOKENS), generator=generator)
            for side, (model, optimizer) in enumerate(sides):
                taken = one_step(model, optimizer, ids)
                if pair >= 2:
                    seconds[side].append(taken)
            peak = max(peak, trunk.memory_info().rss)
        held = split(input_ids=ids, labels=ids, use_cache=False)
        time.sleep(IDLE_S)
        rss_held = trunk.memory_info().rss
        del held
        with torch.no_grad():  # releases of dropped graphs travel with the next call
            split(input_ids=ids, use_cache=False)
        time.sleep(IDLE_S)
        after = trunk.memory_info().rss
        adapter = sum(t.nbytes for t in split.remote_trunk.session.adapter().values())
        split.remote_trunk.close()
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    block_bytes = sum(p.numel() * 4 for n, p in whole.named_parameters() if _in_trunk(n))
    return {
        "pairs": PAIRS,
        "split_step_s_median": statistics.median(seconds[0]),
        "whole_step_s_median": statistics.median(seconds[1]),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "trunk_rss_idle_mib": idle / MIB,
        "trunk_rss_between_steps_peak_mib": peak / MIB,
        "trunk_rss_holding_one_forward_idle_mib": rss_held / MIB,
        "trunk_rss_holding_nothing_idle_mib": after / MIB,
        "libraries_rss_mib": _libraries_rss() / MIB,
        "trunk_blocks_mib": block_bytes / MIB,
        "trunk_adapter_mib": adapter / MIB,
    }


def _libraries_rss() -> int:
    """Resident memory of a process that has only imported what a trunk imports."""
    code = "import psutil, trunk_service.__main__ as m; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def _in_trunk(name: str) -> bool:
    parts = name.split(".")
    return "h" in parts and 2 <= int(parts[parts.index("h") + 1]) < 10 and "lora" not in name


def loss_run(e2e: Path | None, steps: int) -> dict[str, Any]:
    """The bundled model on real text, split and whole, step by step."""
    model = model_dir()
    tokenizer = AutoTokenizer.from_pretrained(model)
    file = private_train_file()
    if e2e is not None:
        file = e2e / "e2e" / "valid.txt"
        real_bpe = e2e / "gpt2-tokenizer" / "tokenizer.json"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(real_bpe), eos_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as scratch:
        folder = model if e2e is None else _bundled_shape(Path(scratch), len(tokenizer))
        blocks = token_blocks(read_texts(file), tokenizer, 64)
        losses: list[float] = []
        with local_trunk(str(folder), "2:10") as address:
            plan = VerifyPlan(steps=steps, grad_accum=1, grad_clip=1.0, warmup_steps=10)
            ordered = _labelled(batches(blocks, 4, 0))
            found = verify(folder, address, lora(), ordered, plan, on_loss=losses.append)
    window = max(1, steps // 10)
    return {
        "data": "E2E NLG valid.txt" if e2e is not None else "bundled notes",
        **found.as_dict(),
        "mean_loss_first_tenth": statistics.mean(losses[:window]),
        "mean_loss_last_tenth": statistics.mean(losses[-window:]),
    }


def _bundled_shape(folder: Path, vocab: int) -> Path:
    """The bundled model's blocks with seeded embeddings for another vocabulary."""
    torch.manual_seed(0)
    bundled = GPT2LMHeadModel.from_pretrained(model_dir())
    bundled.resize_token_embeddings(vocab, mean_resizing=False)
    bundled.save_pretrained(folder)
    return folder


def _labelled(ordered: Iterator[torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    for ids in ordered:
        yield {"input_ids": ids, "labels": ids}


def main() -> None:
    """Runs the benchmarks and writes one JSON file."""
    logging.basicConfig(level="INFO", format="%(message)s")
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--e2e", type=Path, help="folder with e2e/ and gpt2-tokenizer/")
    arguments.add_argument("--steps", type=int, default=200)
    given = arguments.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    machine = f"{platform.machine()}, {cores} cores, torch {torch.__version__}"
    results: dict[str, Any] = {"machine": machine}
    results["loss"] = loss_run(given.e2e, given.steps)
    LOG.info("%s", json.dumps(results["loss"], indent=2))
    with tempfile.TemporaryDirectory() as scratch:
        results["gpt2_small_step"] = step_time(gpt2_small(Path(scratch)))
    LOG.info("%s", json.dumps(results["gpt2_small_step"], indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "latest.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
