"""The U written out by hand: bottom, trunk, top, loss, and back.

For people who want to see and change it. Whoever only wants to train uses
:class:`client_service.SplitModelForCausalLM` with any ordinary loop.

Dimension letters: B batch, T tokens, D model dimension, V vocabulary.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model

from client_service.adapter_files import (
    adapter_weights,
    load_adapter_weights,
    read_adapter,
    write_adapter,
)
from client_service.by_peft import by_peft, seeded
from client_service.training_client import TrainingClient


def default_lora_config() -> LoraConfig:
    """LoRA of rank 8 on the linear layers of GPT-2's blocks."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_fc", "c_proj"],
        fan_in_fan_out=True,
    )


class PEFTSplitLearningTrainer:
    """Trains adapters on a bottom and a top, and the trunk's through its client.

    Args:
        bottom_model: A bottom part, such as ``GPT2BottomModel``.
        top_model: A top part, such as ``GPT2TopModel``.
        trunk_client: A session on the trunk, with its own adapter or none.
        lora_config: Adapter of bottom and top; :func:`default_lora_config` if None.
        learning_rate: Of AdamW, on all three parts.
        seed: Of torch's generator while the fresh adapters are drawn.

    Raises:
        AdapterError: If the adapter does not fit the parts.
    """

    def __init__(
        self,
        bottom_model: Any,
        top_model: Any,
        trunk_client: TrainingClient,
        lora_config: PeftConfig | None = None,
        learning_rate: float = 1e-4,
        seed: int = 0,
    ) -> None:
        config = lora_config or default_lora_config()
        self.bottom = bottom_model
        self.top = top_model
        self.trunk_client = trunk_client
        with by_peft("PEFT cannot put this adapter on the parts"), seeded(seed):
            self.bottom_peft: Any = get_peft_model(bottom_model, copy.deepcopy(config)).train()
            self.top_peft: Any = get_peft_model(top_model, copy.deepcopy(config)).train()
        parts = (self.bottom_peft, trunk_client, self.top_peft)
        trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
        self.global_step = 0

    def train_step(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, float]:
        """Takes one optimizer step on all three parts.

        Args:
            input_ids: Token ids [B, T]; they stay here.
            labels: Token ids [B, T], -100 ignored; shifted inside. They stay here.
            attention_mask: [B, T] of zeros and ones; sent to the trunk.

        Returns:
            ``loss`` of the step.

        Raises:
            TrunklineError: What the trunk answered, if it refused.
        """
        self.optimizer.zero_grad()

        # Forward. What the trunk is sent is detached: its graph is kept over there.
        hidden_1 = self.bottom_peft(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        hidden_2 = self.trunk_client.forward(hidden_1, attention_mask=attention_mask)
        loss = self.top_peft(
            inputs_embeds=hidden_2, attention_mask=attention_mask, labels=labels, use_cache=False
        ).loss

        # Backward. hidden_2 is a leaf, so the top's gradient stops and is collected there.
        loss.backward()
        assert hidden_2.grad is not None
        gradient_1 = self.trunk_client.backward(hidden_2.grad)
        hidden_1.backward(gradient_1)

        # One optimizer holds the parameters of all three parts.
        self.optimizer.step()
        self.global_step += 1
        return {"loss": float(loss.detach())}

    def save_lora_weights(self, save_dir: str | Path) -> None:
        """Writes ``bottom_lora/``, ``trunk_lora/`` (if it has an adapter) and ``top_lora/``."""
        save_dir = Path(save_dir)
        parts = {"bottom": self.bottom_peft, "top": self.top_peft}
        if self.trunk_client.parameters():
            parts["trunk"] = self.trunk_client.model
        for name, part in parts.items():
            config = part.peft_config["default"]
            write_adapter(save_dir / f"{name}_lora", config, adapter_weights(part), "")
        state = json.dumps({"global_step": self.global_step})
        (save_dir / "trainer_state.json").write_text(state, encoding="utf-8")

    def load_lora_weights(
        self,
        bottom_lora_path: str | Path,
        top_lora_path: str | Path,
        trunk_lora_path: str | Path | None = None,
    ) -> None:
        """Reads what :meth:`save_lora_weights` wrote into the parts of this trainer.

        Raises:
            AdapterError: If an adapter is damaged or does not fit; parts read before are loaded.
        """
        load_adapter_weights(self.bottom_peft, read_adapter(bottom_lora_path)[1])
        load_adapter_weights(self.top_peft, read_adapter(top_lora_path)[1])
        if trunk_lora_path is not None:
            load_adapter_weights(self.trunk_client.model, read_adapter(trunk_lora_path)[1])
