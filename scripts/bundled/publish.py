"""Writing a checkpoint that plain ``from_pretrained`` reads."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from pathlib import Path

from transformers import GPT2LMHeadModel


def publish(model: GPT2LMHeadModel, folder: Path) -> None:
    """Store the weights as float16, to halve the file, under a config that says float32.

    The files are written beside the folder first and moved in whole, so that a reader never
    finds half a checkpoint.

    Args:
        model: The model in training; it is not changed.
        folder: The checkpoint folder, which may hold other files such as the tokenizer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.deepcopy(model).half().save_pretrained(scratch)
        _say_float32(Path(scratch) / "config.json")
        for file in sorted(Path(scratch).iterdir()):
            shutil.copyfile(file, folder / f".{file.name}.new")
            (folder / f".{file.name}.new").replace(folder / file.name)


def _say_float32(config: Path) -> None:
    """Make the config ask for float32 weights, whatever the file stores."""
    values = json.loads(config.read_text(encoding="utf-8"))
    values["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
