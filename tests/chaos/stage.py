"""What every experiment stands on: a tiny model with a tokenizer, text, and processes that end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from client_service.dropout_key import SECRET_VARIABLE
from shared.bundled import model_dir, private_train_file
from tests.models import save_tiny_model

# The tokenizer's size: the bundled model's, the only one that comes with the project.
_VOCAB = 1536
_LINES = 400

SPLIT = "2:4"
BATCH, TOKENS, HIDDEN = 2, 32, 64
SIZES = {"n_layer": 6, "n_embd": HIDDEN, "vocab_size": _VOCAB}
LORA = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["c_attn", "c_proj"],
}


@dataclass
class Stage:
    """A folder with a model, a training text and an adapter's configuration."""

    folder: Path
    model: Path
    text: Path
    peft_config: Path
    exits: ExitStack = field(default_factory=ExitStack)
    """Ends what was started here."""


@contextmanager
def set_stage(folder: Path) -> Iterator[Stage]:
    """Makes the model and the text; ends every process of the stage afterwards."""
    model = save_tiny_model(
        "gpt2",
        folder / "model",
        **SIZES,
        bos_token_id=0,
        eos_token_id=0,
    )
    for file in model_dir().glob("tokenizer*.json"):
        shutil.copy(file, model / file.name)
    text = folder / "notes.txt"
    lines = private_train_file().read_text(encoding="utf-8").splitlines()[:_LINES]
    text.write_text("\n".join(lines), encoding="utf-8")
    peft_config = folder / "lora.json"
    peft_config.write_text(json.dumps(LORA), encoding="utf-8")
    os.environ[SECRET_VARIABLE] = str(folder / "dropout_secret")  # of all processes of the stage
    stage = Stage(folder, model, text, peft_config)
    with stage.exits:
        yield stage
