"""A real pretrained chat model, SmolLM2-135M-Instruct out of a package, split 4:26."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from client_service import SplitModelForCausalLM
from client_service.cli.gguf import PACKAGE, from_gguf, packaged_file
from client_service.data import batches, read_texts, token_blocks
from client_service.export import export
from client_service.training import TrainingPlan, train
from shared.bundled import private_train_file
from shared.errors import CheckpointError
from shared.models.families import FAMILIES
from tests.conftest import Daemon

pytest.importorskip("gguf")
try:
    packaged_file()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MIB = 1024**2
E2E = Path(os.environ.get("TRUNKLINE_E2E_DATA", "../shared/data/e2e/valid.txt"))
QUESTION = [{"role": "user", "content": "Name three animals of the forest and say what they eat."}]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    done = from_gguf(folder)
    assert done.chat_template and done.num_layers == 30 and done.max_abs_reread_diff == 0
    with pytest.raises(CheckpointError, match="not an empty folder"):
        from_gguf(folder)
    return folder


@pytest.fixture
def daemon(smollm2: Path, trunkd: Callable[..., Daemon]) -> Daemon:
    return trunkd("--model", str(smollm2), "--split", "4:26")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("gguf", PACKAGE):
        with monkeypatch.context() as patch:
            find = importlib.util.find_spec
            patch.setattr(
                importlib.util, "find_spec", lambda n, m=module, f=find: None if n == m else f(n)
            )
            with pytest.raises(CheckpointError, match=r"pip install trunkline\[smollm\]"):
                from_gguf(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_chat_reply_equals_the_whole_models_token_by_token(smollm2: Path, daemon: Daemon) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    inputs = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    split = SplitModelForCausalLM.from_pretrained(smollm2, daemon.address)
    ours = split.generate(**inputs, **settings)
    split.remote_trunk.close()
    assert torch.equal(ours, whole(smollm2).generate(**inputs, **settings))
    reply = tokenizer.decode(ours[0, inputs["input_ids"].shape[1] :])
    print(f"\nSmolLM2 says: {reply}")  # noqa: T201
    assert "eat" in reply


def test_twenty_steps_lower_the_loss_and_export(
    smollm2: Path, daemon: Daemon, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    blocks = token_blocks(read_texts(E2E if E2E.is_file() else private_train_file()), tokenizer, 64)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=list(FAMILIES["llama"].linear_layers),
    )
    split = SplitModelForCausalLM.from_pretrained(smollm2, daemon.address, peft_config=config)
    plan = TrainingPlan(steps=20, lr=2e-3)
    metrics = list(train(split, batches(blocks, 4, seed=0), plan))
    losses = [m.loss for m in metrics]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    ids = blocks[:2, :32]
    with torch.no_grad():
        expected = split.eval()(input_ids=ids).logits
    split.save_pretrained(tmp_path / "run/adapter")
    split.remote_trunk.close()
    done = export(tmp_path / "run", tmp_path / "out", merge=True)
    assert done.base_model == str(smollm2)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(whole(smollm2), tmp_path / "out").eval()
        difference = float((plain(input_ids=ids).logits - expected).abs().max())
        merged = float(
            (whole(tmp_path / "out/merged")(input_ids=ids).logits - expected).abs().max()
        )
    client, trunk = (psutil.Process(pid).memory_info().rss for pid in (None, daemon.process.pid))
    seconds = sorted(m.seconds for m in metrics)[len(metrics) // 2]
    print(  # noqa: T201
        f"\nlosses {losses[0]:.3f} to {losses[-1]:.3f}, median step {seconds:.2f} s, "
        f"{metrics[-1].bytes_sent / MIB:.1f} MiB up a step, client {client / MIB:.0f} MiB (with "
        f"two whole models), trunk {trunk / MIB:.0f} MiB; logits: PEFT {difference:.1e}, "
        f"merged {merged:.1e} of {float(expected.abs().max()):.0f}, export itself "
        f"{done.max_abs_merged_logit_diff:.1e}"
    )
    assert difference <= 1e-4 and merged <= 2e-4
