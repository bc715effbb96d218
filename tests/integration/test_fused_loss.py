"""The fused loss through a real trunk, against the unsplit model with its ordinary loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import Trainer, TrainingArguments

from client_service import SplitModelForCausalLM
from client_service.whole import gradients, largest_difference, whole_twin
from tests.conftest import Daemon
from tests.integration.test_equivalence import lora, padded_batches
from tests.models import save_tiny_model

pytestmark = pytest.mark.numeric

Start = Callable[..., Daemon]

CONFIGS: dict[str, PeftConfig | None] = {
    "lora": lora("gpt2"),
    "dora": lora("gpt2", use_dora=True),
    "adalora": AdaLoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_fc", "c_proj"],
        init_r=6,
        target_r=3,
        tinit=1,
        tfinal=1,
        total_step=10,
        fan_in_fan_out=True,
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32
    ),
    "full ends, tied": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("gpt2", tmp_path_factory.mktemp("fused") / "model")


BY_ONEDNN = ("lora", "full ends, tied")


@pytest.mark.parametrize(
    ("method", "onednn"),
    [
        *(pytest.param(m, False, id=m) for m in CONFIGS),
        *(pytest.param(m, True, id=f"{m}, onednn") for m in BY_ONEDNN),
    ],
)
def test_loss_and_gradients_are_the_whole_model_s(
    method: str, onednn: bool, trunkd: Start, folder: Path
) -> None:
    split = SplitModelForCausalLM.from_pretrained(
        folder,
        trunkd("--model", str(folder), *["--onednn"] * onednn).address,
        peft_config=CONFIGS[method],
        dropout=0.0,
        fused_loss=True,
        onednn=onednn,
    )
    try:
        whole = whole_twin(folder, split)
        for model in (split, whole):
            model.train()
        for batch, _ in zip(padded_batches(), range(2), strict=False):
            # As the Trainer does: what the labels of all accumulated micro-batches are.
            ours, theirs = (
                m(**batch, use_cache=False, num_items_in_batch=torch.tensor(117))
                for m in (split, whole)
            )
            assert ours.logits is None
            assert abs(float((ours.loss - theirs.loss).detach())) <= 1e-5
            ours.loss.backward()
            theirs.loss.backward()
        assert largest_difference(gradients(split), gradients(whole)) <= 1e-5
    finally:
        split.remote_trunk.close()


def test_the_trainer_logs_the_same_losses(trunkd: Start, folder: Path, tmp_path: Path) -> None:
    address = trunkd("--model", str(folder)).address
    data = [
        {name: column[row] for name, column in batch.items()}
        for batch, _ in zip(padded_batches(), range(6), strict=False)
        for row in range(3)
    ]

    def trained(fused: bool) -> list[float]:
        model = SplitModelForCausalLM.from_pretrained(
            folder, address, peft_config=lora("gpt2"), seed=1, fused_loss=fused
        )
        try:
            return _logged_losses(model, data, tmp_path / str(fused))
        finally:
            model.remote_trunk.close()

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=1e-4)


def _logged_losses(model: Any, data: list[dict[str, torch.Tensor]], out: Path) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses
