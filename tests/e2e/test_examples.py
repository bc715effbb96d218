"""The examples as a person runs them, on a real daemon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from client_service.cli.options import load_tokenizer
from client_service.data import read_texts, token_blocks
from shared.bundled import model_dir, private_train_file
from tests.conftest import Daemon
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, daemon: Daemon, out: Path, *more: str) -> str:
    arguments = ["--trunk", daemon.address, "--out", str(out), *more]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"HF_DATASETS_CACHE": str(out / "cache")},
        cwd=out.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def loss_with(adapter: Path | None) -> float:
    """Of the whole model on the first texts, the adapter loaded by plain PEFT."""
    tokenizer = load_tokenizer(str(model_dir()))
    ids = token_blocks(read_texts(private_train_file()), tokenizer, 128)[:8]
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return float(model.eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    "name",
    [
        "own_loop.py",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hf_trainer.py", "trl_sft.py")),
    ],
)
def test_an_example_writes_an_adapter_of_the_whole_model(
    name: str, trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    if name != "own_loop.py":
        pytest.importorskip("trl")
        pytest.importorskip("datasets")
    out = tmp_path / "out"
    said = run(name, trunkd(), out, "--steps", "6")
    assert f"adapter: {out}/adapter" in said
    assert len(re.findall(r"\bloss\b", said)) >= 6
    assert loss_with(out / "adapter") < loss_with(None) - 0.05


@pytest.mark.slow
def test_the_example_by_hand_writes_an_adapter_of_every_part(
    trunkd: Callable[..., Daemon], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = run("train_with_peft.py", trunkd(), out, "--steps", "6")
    assert f"adapter: {out}" in said and said.count("loss") == 6
    # Their union is an adapter of the whole model.
    parts = [out / f"{part}_lora" for part in ("bottom", "trunk", "top")]
    weights = {}
    for part in parts:
        weights |= load_file(part / "adapter_model.safetensors")
    joined = tmp_path / "joined"
    joined.mkdir()
    save_file(weights, joined / "adapter_model.safetensors")
    config = json.loads((parts[0] / "adapter_config.json").read_text())
    (joined / "adapter_config.json").write_text(json.dumps(config))
    assert loss_with(joined) < loss_with(None) - 0.05
