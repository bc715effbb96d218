"""Calls of stock PEFT, with errors of one kind and draws under a seed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import AdapterError, TrunklineError
from shared.models.tensor_files import first_line

_OF_PEFT = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ImportError,
    UserWarning,
    re.error,
)


@contextmanager
def by_peft(what: str) -> Iterator[None]:
    """Turns what PEFT raises, or warns of what would be lost, into one error.

    Args:
        what: Said before PEFT's own words.

    Raises:
        AdapterError: Says what PEFT said.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            yield
    except TrunklineError:
        raise
    except _OF_PEFT as error:
        raise AdapterError(f"{what}: {first_line(error)}") from error


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws under a seed, while it lasts, and leaves torch's generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
