"""The client: bottom, top, labels and loss, with the trunk's blocks somewhere else."""

import os
from typing import TYPE_CHECKING, Any

from shared.openmp import wait_passively

wait_passively()
# gRPC writes lines of its own, such as one for every worker of a DataLoader.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

if TYPE_CHECKING:
    from client_service.fresh_ends import redraw_ends
    from client_service.peft_trainer import PEFTSplitLearningTrainer
    from client_service.split_model import SplitModelForCausalLM
    from client_service.training_client import TrainingClient

__all__ = ["PEFTSplitLearningTrainer", "SplitModelForCausalLM", "TrainingClient", "redraw_ends"]

_HOMES = {
    "PEFTSplitLearningTrainer": "client_service.peft_trainer",
    "SplitModelForCausalLM": "client_service.split_model",
    "TrainingClient": "client_service.training_client",
    "redraw_ends": "client_service.fresh_ends",
}


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
