"""Every method of PEFT and its variants, three steps on a real trunk beside the whole model.

Where :mod:`benchmarks.parity` goes deep with a few methods, this goes wide with all.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from client_service import SplitModelForCausalLM
from client_service.local_trunk import local_trunk
from client_service.whole import gradients, largest_difference, load_whole, trained_weights
from shared.errors import (
    InvalidInputError,
    ModelMismatchError,
    ResourceExhaustedError,
    SharedWeightsError,
)
from shared.models import SplitRange
from shared.models.split_layout import write_split_layout
from shared.models.tensor_files import first_line
from tests.models import VOCAB, save_tiny_model
from tests.peft_rows import ROWS, Row

LOG = logging.getLogger("parity")
SPLIT, BLOCKS, STEPS, SEED, RATE = "1:3", 4, 3, 3, 1e-2
CLOSE = 1e-5
"""Where a library sums in another order."""

REFUSALS = (InvalidInputError, ModelMismatchError, ResourceExhaustedError, SharedWeightsError)
"""What says what was given and what is accepted."""


@dataclass(frozen=True)
class Base:
    """A tiny model, and how its weights are held on both sides."""

    family: str
    held: str = ""
    """``nf4``, ``int8`` or ``bfloat16``; float32 if empty."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.held == "bfloat16" else torch.float32

    @property
    def quantize(self) -> str:
        return "" if self.held == "bfloat16" else self.held

    @property
    def flags(self) -> list[str]:
        if not self.held:
            return []
        return ["--dtype" if self.held == "bfloat16" else "--quantize", self.held]


BASES = tuple(Base(f, held) for held in ("", "nf4", "int8", "bfloat16") for f in ("llama", "gpt2"))


@dataclass(frozen=True)
class Trained:
    """What came of a few steps."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    """Of the first step."""
    weights: dict[str, torch.Tensor]
    logits: torch.Tensor
    moved: bool
    """Whether any weight is another than before."""

    @property
    def says_something(self) -> bool:
        finite = all(math.isfinite(loss) for loss in self.losses)
        return finite and len(set(self.losses)) > 1 and self.moved

    def off(self, other: Trained) -> float:
        """Largest difference of anything; infinite where another tensor is trained."""
        if self.gradients.keys() != other.gradients.keys() or self.weights.keys() != (
            other.weights.keys()
        ):
            return math.inf
        pairs = zip(self.losses, other.losses, strict=True)
        found = [
            *(abs(a - b) for a, b in pairs),
            largest_difference(self.gradients, other.gradients),
            largest_difference(self.weights, other.weights),
            float((self.logits - other.logits).abs().max()),
        ]
        return math.inf if any(math.isnan(one) for one in found) else max(found)


def batch() -> dict[str, torch.Tensor]:
    """Padded on either side; the tokens that some rows name are among them."""
    ids = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(3))
    ids[:, 7:11] = torch.tensor([3, 4, 5, 6])
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: Any, row: Row) -> Trained:
    """Trains three steps on one batch, so that what changes the loss is the adapter."""
    given = batch() | row.inputs
    before = trained_weights(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses, first = [], None
    for step in range(STEPS):
        loss = model(**given).loss
        loss.backward()
        losses.append(float(loss.detach()))
        first = first or gradients(model)
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    after = trained_weights(model)
    with torch.no_grad():
        logits = model.eval()(**given).logits.float()
    moved = any(not torch.equal(before[n], after[n]) for n in before if n in after)
    return Trained(losses, first or {}, after, logits, moved)


def run_base(base: Base, only: Collection[str]) -> Iterator[dict[str, Any]]:
    """Runs the rows of one base, on a trunk that serves its matrices and on one that does not.

    The client has the ends alone, or it would read the trunk's matrices in its own copy.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # X-LoRA asks that no cache is used.
        changes = {"num_hidden_layers": BLOCKS, "use_cache": False}
        folder = save_tiny_model(base.family, Path(scratch) / "model", **changes)
        write_split_layout(folder, SplitRange.parse(SPLIT), Path(scratch) / "parts")
        ends = Path(scratch) / "parts"
        shutil.rmtree(ends / "trunk")
        wanted = [row for row in ROWS if not only or row.name in only]
        whole = {row.name: run_whole(base, folder, row) for row in wanted}
        # Those of a quantised trunk are not read anyway.
        for served in (False,) if base.held else (True, False):
            flags = [*base.flags, *(["--serve-weights"] if served else [])]
            with local_trunk(str(folder), SPLIT, flags=flags) as trunk:
                for row in wanted:
                    cell = run_split(base, ends, trunk, row, whole[row.name])
                    LOG.info("%s, %s, %s: %s", base, served, row.name, cell)
                    yield {
                        "row": row.name,
                        "family": base.family,
                        "held": base.held,
                        "served": served,
                        **cell,
                    }


def run_whole(base: Base, folder: Path, row: Row) -> Trained | str:
    """Trains the whole PEFT model; or tells in its words why it cannot be."""
    try:
        model, config = load_whole(folder, base.quantize, base.dtype), row.config(base.family)
        torch.manual_seed(SEED)
        adapted = get_peft_model(model, config)
        torch.manual_seed(SEED)
        found = train(adapted, row)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return found if found.says_something else f"its adapter does nothing: losses {found.losses}"


def run_split(base: Base, ends: Path, trunk: str, row: Row, whole: Trained | str) -> dict[str, Any]:
    """Trains the same on a trunk."""
    if isinstance(whole, str):
        return {"whole_fails": whole}
    model, started = None, {}
    try:
        model = SplitModelForCausalLM.from_pretrained(
            ends,
            trunk,
            peft_config=row.config(base.family),
            seed=SEED,
            dtype=base.dtype,
            quantize=base.quantize,
        )
        started = trained_weights(model)
        torch.manual_seed(SEED)
        found = train(model, row)
    except Exception as error:
        now = {} if model is None else trained_weights(model)
        untouched = all(torch.equal(started[n], now[n]) for n in started)
        if isinstance(error, REFUSALS) and untouched:
            return {"refused": first_line(error)}
        return {"fails": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        if model is not None:
            model.get_base_model().remote_trunk.close()
    return {"off": found.off(whole), "losses": found.losses}


FLOORS = {"llama": 49, "gpt2": 33}
"""Rows that are to be equal where the host serves its matrices."""

PAGE = """## Every method of PEFT, beside the whole PEFT model

Tiny models of {blocks} blocks split {split}; {steps} AdamW steps on a padded batch; the client has
the two ends alone. The number is the largest difference of any loss, gradient of the first step,
trained weight and logit after it: 0 means that no bit differs, and up to {close:g} is a sum that is
made in another order. A row counts only if the whole model's losses are finite and differ and its
adapter moved. "Serves" is a trunk with `--serve-weights`, the other columns are one without. nf4,
int8 and bfloat16 are trunks that hold their weights so, beside the whole model loaded so.

Equal where the host serves its matrices: {equal}.

| method | {columns} |
|---|{dashes}
{rows}

Refused, before anything is trained:

{refused}

Where the whole model itself fails, in its words:

{fails}

## Calls of PEFT and torch that are refused

Every other public call of `PeftModel`, of PEFT's tuner classes and of `peft.helpers` does to the
split model what it does to the whole one (`tests/integration/test_peft_calls.py` calls each).
`state_dict()` has all but the matrices of the trunk's blocks.

{calls}
"""


def holds(cell: dict[str, Any]) -> bool:
    """Whether a row is equal, refused, or none of ours."""
    return "fails" not in cell and cell.get("off", 0.0) <= CLOSE


def mark(cell: dict[str, Any]) -> str:
    """What the page says of a row."""
    if "off" not in cell:
        return next(w for k, w in _WORDS.items() if k in cell)
    shown = f"{cell['off']:.0e}" if cell["off"] else "0"
    return shown if holds(cell) else f"**fails** {shown}"


_WORDS = {"refused": "refused", "whole_fails": "whole fails", "fails": "**fails**"}


def count(cells: list[dict[str, Any]], family: str) -> int:
    """Rows that are equal in float32 where the host serves its matrices."""
    return sum(
        "off" in c and holds(c)
        for c in cells
        if c["family"] == family and c["served"] and not c["held"]
    )


def as_markdown(cells: list[dict[str, Any]], calls: dict[str, str]) -> str:
    """The page's part about these rows."""
    found = {(c["row"], _column(c)): c for c in cells}
    columns = list(dict.fromkeys(_column(c) for c in cells))
    names = list(dict.fromkeys(c["row"] for c in cells))
    return PAGE.format(
        blocks=BLOCKS,
        split=SPLIT,
        steps=STEPS,
        close=CLOSE,
        equal=", ".join(f"{count(cells, f)} rows on {f} (floor {FLOORS[f]})" for f in FLOORS),
        columns=" | ".join(columns),
        dashes="---|" * len(columns),
        rows="\n".join(
            f"| {n} | {' | '.join(mark(found[n, c]) for c in columns)} |" for n in names
        ),
        refused=_reasons(cells, "refused"),
        fails=_reasons(cells, "whole_fails"),
        calls="\n".join(f"* `{name}`: {why}" for name, why in calls.items()),
    )


def _column(cell: dict[str, Any]) -> str:
    more = [cell["held"], "serves" if cell["served"] else ""]
    return ", ".join([cell["family"], *(word for word in more if word)])


def _reasons(cells: list[dict[str, Any]], kind: str) -> str:
    """One line a row and reason: where names of modules differ alone, the first stands for all."""
    where: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in (c for c in cells if kind in c):
        plain = re.sub(r"\S*\b(h|layers)\.\d[^\s;]*|[\d.\[\],]+|\(\w+=.*?\)", "", cell[kind])
        where.setdefault((cell["row"], plain), []).append(cell)
    return "\n".join(
        f"* {row} ({'; '.join(_column(c) for c in found)}): {_short(found[0][kind])}"
        for (row, _), found in where.items()
    )


def _short(why: str) -> str:
    why = why if len(why) <= 300 else f"{why[:297]}..."
    return why.replace("|", "\\|").replace("<", "\\<")
