"""One file of named tensors: safetensors, or PyTorch's own format read as weights only."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from shared.errors import CheckpointError


class TensorFile(Protocol):
    """Named tensors in one file, read one at a time."""

    path: Path

    def names(self) -> list[str]:
        """Names as stored."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored; may be backed by the mapped file."""


class SafetensorsFile:
    """A ``.safetensors`` file; only the tensors asked for are read from disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._file = safe_open(path, framework="pt")

    def names(self) -> list[str]:
        """Names as stored."""
        return list(self._file.keys())

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, backed by the mapped file."""
        with _naming(self.path):
            tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class TorchFile:
    """A ``.pt`` or ``.bin`` file holding a state dict; never unpickles anything but weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._tensors = _load_weights(path)

    def names(self) -> list[str]:
        """Names as stored."""
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, backed by the mapped file where its format allows."""
        return self._tensors[name]


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a file by its suffix.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind or holds other objects
            than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in (".pt", ".bin", ".pth"):
        return TorchFile(path)
    raise CheckpointError(f"{path}: not a weight file; accepted: .safetensors, .pt, .bin, .pth")


def _load_weights(path: Path) -> dict[str, torch.Tensor]:
    # Files in PyTorch's format from before 1.6 cannot be mapped; those are read whole.
    with path.open("rb") as file:
        mapped = file.read(4) == b"PK\x03\x04"
    loaded: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    return loaded


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what a reader raises on a damaged file into an error that names the file."""
    try:
        yield
    except (
        SafetensorError,
        pickle.UnpicklingError,
        OSError,
        EOFError,
        KeyError,
        RuntimeError,
        UnicodeDecodeError,
    ) as error:
        why = first_line(error)
        raise CheckpointError(f"{path}: damaged or not a weight file ({why})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
