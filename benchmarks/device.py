"""A trunk on a CUDA device: the same step as the whole model's there, in time and in numbers.

Everything is in turn within one run: the whole model and the split with both its sides on the
device, in float32 and bfloat16; the whole model on the CPU, and a client on the CPU whose trunk is
on the device; the ways to hold a forward; ``generate``.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpt2_small import SPLIT, VOCABULARY, WIDTH, adapted, gpt2_small, lora
from benchmarks.memory import step_seconds
from benchmarks.peers.driving import adamw
from benchmarks.processes import MIB
from benchmarks.report import Claim, Row, Section, Spread, run_alone
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from client_service.whole import largest_difference, trained_weights
from trunk_service.transfer import to_device, to_host

LOG = logging.getLogger("benchmarks")
DEVICE = torch.device("cuda")
SHAPES = ((4, 128), (16, 512))
PROMPT, TOKENS = 16, 64
LOSS_BOUND, WEIGHT_BOUND = 1e-5, 2e-5
"""Of float32, after as many steps as are measured: sums on a device come in another order where a
gradient is gathered from both sides."""
TRUNK = ("--device", "cuda")


@dataclass
class Model:
    """A model that trains, and what its steps took and gave."""

    model: Any
    device: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.to(self.device).train()
        self._optimizer = adamw(self.model.parameters())

    def step(self, ids_BT: torch.Tensor) -> None:
        """One step, timed until its loss is known here and the device has nothing left to do."""
        ids_BT = ids_BT.to(self.device)
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = self.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


@contextmanager
def pair(
    folder: Path, dtype: torch.dtype, client: str, whole: str
) -> Iterator[tuple[Model, Model]]:
    """The whole model and a split one over a trunk on the device, with equal adapters.

    Args:
        folder: The model's.
        dtype: Of all base weights and of the wire.
        client: Device of the split model's ends.
        whole: Device of the whole model.
    """
    name = str(dtype).removeprefix("torch.")
    with local_trunk(str(folder), SPLIT, flags=(*TRUNK, "--dtype", name)) as address:
        split: Any = SplitModelForCausalLM.from_pretrained(
            folder, address, peft_config=lora(), seed=0, dtype=dtype, wire_format=name
        )
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        try:
            yield Model(adapted(plain), whole), Model(split, client)
        finally:
            split.remote_trunk.close()


def steps(whole: Model, split: Model, shape: tuple[int, int], count: int) -> None:
    """Steps of both in turn on the same batches; the first is to warm up."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1 + count):
        if number == 1:
            whole.seconds.clear()
            split.seconds.clear()
        ids_BT = torch.randint(0, VOCABULARY, shape, generator=generator)
        for model in (whole, split):
            model.step(ids_BT)


def training(folder: Path, turns: int) -> Section:
    """A step of the split over the same step of the whole model."""
    section = Section(
        "device", "A training step with the trunk on a CUDA device, ÷ the whole model"
    )
    places = [
        (torch.float32, "cuda", "cuda"),
        (torch.bfloat16, "cuda", "cuda"),
        (torch.float32, "cpu", "cpu"),
    ]
    for dtype, client, whole_on in places:
        for shape in SHAPES if whole_on == "cuda" else SHAPES[:1]:
            with pair(folder, dtype, client, whole_on) as (whole, split):
                steps(whole, split, shape, turns)
                section.rows.append(_row(dtype, client, whole_on, shape, whole, split))
                if (dtype, client) == (torch.float32, "cuda"):
                    section.claims += _exact(shape, whole, split)
    section.notes = [
        f"GPT-2 small's size, split {SPLIT}, LoRA r=8, plain loss; the wire has the dtype of the "
        f"weights. Steps of both in turn, the first left out; medians (least to most, n={turns}). "
        "Client and trunk are two processes on one device; each waits for the other.",
    ]
    return section


def _row(
    dtype: torch.dtype,
    client: str,
    whole_on: str,
    shape: tuple[int, int],
    whole: Model,
    split: Model,
) -> Row:
    ratios = [a / b for a, b in zip(split.seconds, whole.seconds, strict=True)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "whole on": whole_on,
        "client on": client,
        "batch": "x".join(map(str, shape)),
        "whole ms": Spread.of([1e3 * s for s in whole.seconds]),
        "split ms": Spread.of([1e3 * s for s in split.seconds]),
        "split ÷ whole": Spread.of(ratios),
        "loss difference": f"{_loss_difference(whole, split):.1e}",
    }


def _exact(shape: tuple[int, int], whole: Model, split: Model) -> list[Claim]:
    found, expected = trained_weights(split.model), trained_weights(whole.model)
    worst = largest_difference(found, expected)
    which = f"float32, {shape[0]}x{shape[1]}, {len(whole.losses)} steps"
    return [
        Claim(f"{which}: largest loss difference", _loss_difference(whole, split), LOSS_BOUND),
        Claim(f"{which}: largest difference of an adapter weight", worst, WEIGHT_BOUND),
    ]


def _loss_difference(whole: Model, split: Model) -> float:
    return max(abs(a - b) for a, b in zip(whole.losses, split.losses, strict=True))


def holding(folder: Path, pairs: int) -> Section:
    """What each way to hold a forward costs on a device."""
    small = ("--session-held-bytes", str(64 * MIB))
    kinds = {
        "retained": TRUNK,
        "recomputed": (*TRUNK, *small),
        "offloaded to pinned memory": (*TRUNK, *small, "--offload-bytes", str(4096 * MIB)),
    }
    seconds = step_seconds(str(folder), kinds, pairs)
    rows: list[Row] = [
        {"mode": name, "step ms": 1e3 * s, "of retained": s / seconds["retained"]}
        for name, s in seconds.items()
    ]
    note = f"Forward, backward and step of 4x128 tokens on the trunk alone, medians of {pairs}."
    return Section("device_held", "Ways to hold a forward on a CUDA device", rows, notes=[note])


def transfers(repeats: int) -> Section:
    """A batch's hidden states to the device and back: pinned on a side stream, and plainly."""
    section = Section("device_transfer", "Hidden states to the device and back")
    for shape in SHAPES:
        hidden_BTD = torch.randn(*shape, WIDTH)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "plain": lambda h=hidden_BTD: h.to(DEVICE).cpu(),  # type: ignore[misc]
            "pinned": lambda h=hidden_BTD: to_host(to_device(h, DEVICE, h.dtype)),  # type: ignore[misc]
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(3 + repeats):
            for name, way in ways.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                way()
                if number >= 3:
                    taken[name].append(time.perf_counter() - started)
        row: Row = {"MB": hidden_BTD.nbytes / 1e6}
        row |= {f"{name} ms": Spread.of([1e3 * s for s in took]) for name, took in taken.items()}
        section.rows.append(
            row | {"pinned ÷ plain": median(taken["pinned"]) / median(taken["plain"])}
        )
    return section


def decoding(folder: Path, repeats: int) -> Section:
    """Greedy ``generate`` of one prompt and of eight."""
    section = Section("device_decoding", "Greedy generate on a CUDA device")
    with pair(folder, torch.float32, "cuda", "cuda") as (whole, split):
        for rows in (1, 8):
            ids_BT = torch.randint(0, VOCABULARY, (rows, PROMPT), device=DEVICE)
            rates: dict[str, list[float]] = {"whole": [], "split": []}
            answers = {}
            for number in range(1 + repeats):
                for name, one in (("whole", whole), ("split", split)):
                    started = time.perf_counter()
                    answers[name] = _generated(one.model.eval(), ids_BT)
                    if number:
                        rates[name].append(rows * TOKENS / (time.perf_counter() - started))
            ratios = [a / b for a, b in zip(rates["split"], rates["whole"], strict=True)]
            row: Row = {"prompts": rows}
            row |= {f"{name}, tokens/s": Spread.of(found) for name, found in rates.items()}
            row["split ÷ whole"] = Spread.of(ratios)
            row["same tokens"] = torch.equal(answers["whole"], answers["split"])
            section.rows.append(row)
    return section


def _generated(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return found


def measure(quick: bool = False) -> list[Section]:
    """Training, held state, transfers and decoding.

    Raises:
        RuntimeError: If there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark is of a CUDA device, and torch finds none here")
    turns = 3 if quick else 15
    with tempfile.TemporaryDirectory() as scratch:
        folder = gpt2_small(Path(scratch) / "model")
        return [
            training(folder, turns),
            holding(folder, turns),
            transfers(turns),
            decoding(folder, 1 if quick else 3),
        ]


if __name__ == "__main__":
    run_alone(measure, __doc__)
