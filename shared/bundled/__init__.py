"""The bundled model and data, which let the main job run without any download."""

from __future__ import annotations

from pathlib import Path

__all__ = ["general_heldout_file", "model_dir", "private_heldout_file", "private_train_file"]

_HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """Locate the bundled model.

    Returns:
        The checkpoint folder, for ``from_pretrained``; the tokenizer is in it too.
    """
    return _HERE / "model"


def private_train_file() -> Path:
    """Locate the private texts to fine-tune on.

    Returns:
        A text file with one ward note a line.
    """
    return _HERE / "data" / "notes_train.txt"


def private_heldout_file() -> Path:
    """Locate the private texts to measure on.

    Returns:
        A text file with one ward note a line, none of which is in the training file.
    """
    return _HERE / "data" / "notes_heldout.txt"


def general_heldout_file() -> Path:
    """Locate held-out texts of the kind that the model was pre-trained on.

    Returns:
        A text file with one story or other short text a line.
    """
    return _HERE / "data" / "stories_heldout.txt"
