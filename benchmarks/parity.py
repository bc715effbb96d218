"""``make parity``: PEFT's methods on the parts of every family, against the unsplit model.

Writes ``docs/parity.md`` and ``benchmarks/results/parity.json``. Each cell is a real run: a trunk
daemon as a process, tiny seeded models of 12 blocks split 2:10, 20 AdamW steps with warm-up, linear
schedule and clipping, float32. :mod:`benchmarks.peft_rows` adds every method there is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from transformers.utils import logging as transformers_logging

from benchmarks import peft_rows
from client_service.local_trunk import local_trunk
from client_service.verify import (
    ADAPTER_TOLERANCE,
    GRAD_TOLERANCE,
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    VerifyPlan,
    verify,
)
from shared.errors import AdapterError
from shared.models import FAMILIES, family_of
from tests.models import VOCAB, save_tiny_model
from tests.peft_calls import REFUSED

LOG = logging.getLogger("parity")
ROOT = Path(__file__).parent.parent
STEPS, SPLIT = 20, "2:10"
PARTS = ("bottom", "trunk", "top", "all")
RATES = {"IA3": 5e-2, "prefix tuning": 5e-2, "prompt tuning": 5e-2, "p-tuning": 2e-2}


def methods(family: str) -> dict[str, tuple[PeftConfig | None, str]]:
    """Configuration and quantisation of each row."""
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    targets = list(family_of(family).linear_layers)
    tuned: dict[str, Any] = {**task, "r": 8, "lora_alpha": 16, "target_modules": targets}
    pattern = {targets[0]: 3}
    adalora = AdaLoraConfig(
        **task,
        init_r=6,
        target_r=3,
        total_step=STEPS,
        tinit=3,
        tfinal=5,
        deltaT=2,
        target_modules=targets,
    )
    ia3 = IA3Config(**task, target_modules=targets[:2], feedforward_modules=targets[1:2])
    p_tuning = PromptEncoderConfig(**task, num_virtual_tokens=5, encoder_hidden_size=32)
    return {
        "LoRA": (LoraConfig(**tuned), ""),
        "LoRA, rank and alpha patterns": (
            LoraConfig(**tuned, rank_pattern=pattern, alpha_pattern=pattern),
            "",
        ),
        "rsLoRA": (LoraConfig(**tuned, use_rslora=True), ""),
        "DoRA": (LoraConfig(**tuned, use_dora=True), ""),
        "AdaLoRA": (adalora, ""),
        "IA3": (ia3, ""),
        "prefix tuning": (PrefixTuningConfig(**task, num_virtual_tokens=5), ""),
        "prompt tuning": (PromptTuningConfig(**task, num_virtual_tokens=5), ""),
        "p-tuning": (p_tuning, ""),
        "own weights, frozen trunk": (None, ""),
        "QLoRA (NF4)": (LoraConfig(**tuned), "nf4"),
        "LoRA on int8": (LoraConfig(**tuned), "int8"),
    }


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Two padded batches, over and over."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for side in (slice(0, 7), slice(-7, None)):
        ids = torch.randint(3, VOCAB, (3, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, side] = 0
        made.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": ids.masked_fill(mask == 0, -100),
            }
        )
    return itertools.cycle(made)


def run_cell(folder: Path, trunk: str, name: str, parts: str, quantize: str) -> dict[str, Any]:
    config, _ = methods(json.loads((folder / "config.json").read_text())["model_type"])[name]
    plan = VerifyPlan(steps=STEPS, grad_accum=1, lr=RATES.get(name, 5e-3), warmup_steps=1)
    try:
        found = verify(folder, trunk, config, batches(), plan, parts=parts, quantize=quantize)
    except AdapterError as refused:
        return {"refused": str(refused)}
    return {
        **found.as_dict(),
        "loss_fell": found.final_loss < found.first_loss,
    }


def run_family(family: str, only: set[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_tiny_model(family, Path(scratch) / "model", num_hidden_layers=12)
        wanted = {n: q for n, (_, q) in methods(family).items() if not only or n in only}
        for quantize in sorted(set(wanted.values())):
            flags = ["--quantize", quantize] if quantize else []
            with local_trunk(str(folder), SPLIT, flags=flags) as trunk:
                for name, parts in itertools.product(wanted, PARTS):
                    if wanted[name] != quantize:
                        continue
                    cell = run_cell(folder, trunk, name, parts, quantize)
                    LOG.info("%s, %s, %s: %s", family, name, parts, cell)
                    yield {"family": family, "method": name, "parts": parts, **cell}


def mark(cell: dict[str, Any]) -> str:
    if "refused" in cell:
        return "refused"
    worst = max(cell["max_abs_loss_diff"], cell["max_abs_adapter_diff"])
    shown = f"{worst:.0e}" if worst else "0"
    shown += "*" if cell["max_abs_grad_diff"] > GRAD_TOLERANCE else ""
    return shown if holds(cell) else f"**fails** {shown}"


def holds(cell: dict[str, Any]) -> bool:
    """What the page says of a cell that does not fail."""
    return bool(
        cell["max_abs_loss_diff"] <= LOSS_TOLERANCE
        and cell["max_abs_adapter_diff"] <= ADAPTER_TOLERANCE
        and first_step(cell) <= GRAD_TOLERANCE
        and cell["max_abs_reloaded_logit_diff"] <= LOGIT_TOLERANCE
        and cell["differing_ranks"] == 0
        and cell["loss_fell"]
    )


PAGE = """# Parity: every method, part and family against the unsplit model

Made by `make parity`; do not edit. Each cell is a run on a real trunk daemon: tiny seeded models of
12 blocks split {split}, {steps} AdamW steps (warm-up, linear schedule, clipping) on padded batches
in float32, beside the unsplit PEFT model from the same adapter. The number is the largest
difference of any step's loss and of any trained weight; 0 means that no bit of these differs. A
cell without **fails** also means: loss within {loss:g}, trained weights within {adapter:g}, every
gradient of the first step within {grad:g}, AdaLoRA's ranks the same in every matrix, the loss fell,
and plain PEFT with the saved adapter gives the same logits within {logit:g}. Gradients of later
steps, which are at weights that rounding has moved, are reported: cells marked * have one that
differs by more than {grad:g}, which `trunkline verify` would not pass. Quantised rows are compared
with the whole model that transformers itself quantised so.

{summary}

| method | part | {families} |
|---|---|{dashes}
{rows}

Refused, before anything is trained:

{refused}

{methods}"""


def as_markdown(
    cells: list[dict[str, Any]], rows_of_peft: list[dict[str, Any]], machine: str
) -> str:
    families = list(dict.fromkeys(c["family"] for c in cells))
    found = {(c["method"], c["parts"], c["family"]): mark(c) for c in cells}
    rows = [
        f"| {method} | {parts} | {' | '.join(found[method, parts, f] for f in families)} |"
        for method, parts in dict.fromkeys((c["method"], c["parts"]) for c in cells)
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if "refused" in cell:
            key = cell["method"], cell["refused"].partition(": ")[2]
            reasons.setdefault(key, []).append(cell["parts"])
    refused = [
        f"* {method} on {', '.join(dict.fromkeys(parts))}: {why}"
        for (method, why), parts in reasons.items()
    ]
    return PAGE.format(
        split=SPLIT,
        steps=STEPS,
        grad=GRAD_TOLERANCE,
        loss=LOSS_TOLERANCE,
        adapter=ADAPTER_TOLERANCE,
        logit=LOGIT_TOLERANCE,
        summary=summary([c for c in cells if "refused" not in c], machine),
        families=" | ".join(families),
        dashes="---|" * len(families),
        rows="\n".join(rows),
        refused="\n".join(refused),
        methods=peft_rows.as_markdown(rows_of_peft, REFUSED),
    )


def summary(compared: list[dict[str, Any]], machine: str) -> str:
    worst = {
        "loss": max((c["max_abs_loss_diff"] for c in compared), default=0.0),
        "gradient of the first step": max((first_step(c) for c in compared), default=0.0),
        "gradient of any step": max((c["max_abs_grad_diff"] for c in compared), default=0.0),
        "trained weight": max((c["max_abs_adapter_diff"] for c in compared), default=0.0),
        "reloaded logits": max((c["max_abs_reloaded_logit_diff"] for c in compared), default=0.0),
    }
    failed = sum(mark(c).startswith("**") for c in compared)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    ranks = sum(c["differing_ranks"] for c in compared)
    return (
        f"{len(compared)} runs, of which {failed} fail. Largest differences: {differences}; "
        f"matrices with other ranks: {ranks}. {machine}."
    )


def first_step(cell: dict[str, Any]) -> float:
    """Of a run from before the first step was noted apart: that of any step, which is no less."""
    return float(cell.get("first_step_grad_diff", cell["max_abs_grad_diff"]))


Key = Callable[[dict[str, Any]], Any]


def cell_key(cell: dict[str, Any]) -> Any:
    return cell["family"], cell["method"], cell["parts"]


def row_key(cell: dict[str, Any]) -> Any:
    return cell["row"], cell["family"], cell["held"], cell["served"]


def replaced(
    before: list[dict[str, Any]], cells: list[dict[str, Any]], key: Key
) -> list[dict[str, Any]]:
    """The cells of an earlier run of everything, with those of this run in their places."""
    new = {key(c): c for c in cells}
    return [new.get(key(c), c) for c in before] if before else cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), default=[])
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--row", action="append", default=[], help="of tests/peft_rows.py")
    parser.add_argument("--only", choices=["families", "rows", "page"], help="the rest is kept")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder with docs/ and benchmarks/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # the libraries' own; a difference is what counts here
    results = arguments.out / "benchmarks" / "results" / "parity.json"
    before = json.loads(results.read_text()) if results.is_file() else {}
    cells, rows = before.get("cells", []), before.get("rows", [])
    if arguments.only in (None, "families"):
        families = arguments.family or list(FAMILIES)
        found = [c for f in families for c in run_family(f, set(arguments.method))]
        some = bool(arguments.family or arguments.method)
        cells = replaced(cells if some else [], found, cell_key)
    if arguments.only in (None, "rows"):
        found = [c for base in peft_rows.BASES for c in peft_rows.run_base(base, arguments.row)]
        rows = replaced(rows if arguments.row else [], found, row_key)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results.parent.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine, "cells": cells, "rows": rows}
    results.write_text(json.dumps(kept, indent=1) + "\n")
    page = arguments.out / "docs" / "parity.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(as_markdown(cells, rows, machine), encoding="utf-8")
    too_few = [f for f, floor in peft_rows.FLOORS.items() if peft_rows.count(rows, f) < floor]
    failed = [row_key(c) for c in rows if not peft_rows.holds(c)]
    failed += [cell_key(c) for c in cells if mark(c).startswith("**")]
    if failed or too_few:
        raise SystemExit(f"fail: {failed}; too few rows are equal: {too_few}")


if __name__ == "__main__":
    main()
