"""What a checkpoint of a split training has in it, and how a run goes on from one.

Everything that the next step depends on, and all of it is here: what is trained, the optimizer, the
schedule, how much data was taken, the random generators, and where AdaLoRA's allocation of ranks
stands. So the rest of the run is the same to the last bit, on whatever trunk has the same weights,
whose digest is in it; with dropout on the trunk's blocks, under the same secret of its masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from client_service.atomic_folder import remove_leftovers
from client_service.checkpoint_files import (
    Content,
    Manifest,
    keep_last,
    newest_whole,
    read_json,
    read_tensors,
    write_checkpoint,
)
from client_service.client_state import (
    allocation,
    model_state,
    optimizer_state,
    restore_allocation,
    restore_model,
    restore_optimizer,
)
from client_service.random_state import random_facts, random_tensors, restore_random
from client_service.training import TrainingState

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    folder: Path
    manifest: Manifest
    batches_taken: int
    """Where the data goes on."""

    @property
    def step(self) -> int:
        """The last that was done."""
        return self.manifest.step

    def restore(self, state: TrainingState) -> None:
        """Puts a fresh run of the same model, method and plan where this one was.

        Args:
            state: Of a model on a new session.

        Raises:
            CheckpointError: If it is a checkpoint of another adapter or optimizer.
        """
        source, facts = str(self.folder), self._json("state")
        restore_model(source, state.model, self._tensors("model"))
        restore_optimizer(source, state, self._tensors("optimizer"), self._json("optimizer"))
        restore_allocation(state.model, self._tensors("allocator"), facts["allocator"])
        state.schedule.load_state_dict(facts["schedule"])
        state.step, state.batches_taken = facts["step"], facts["batches_taken"]
        restore_random(self._tensors("rng"), facts["rng"])

    def _tensors(self, name: str) -> Tensors:
        return read_tensors(self.folder / f"{name}.safetensors")

    def _json(self, name: str) -> Any:
        return read_json(self.folder / f"{name}.json")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Of all of them.
        every: Steps between two; 0 saves none.
        kept: How many stay.
    """

    def __init__(self, folder: Path, every: int = 0, kept: int = 2) -> None:
        self.folder, self._every, self._kept = folder, every, kept
        if folder.is_dir():
            remove_leftovers(folder)

    def newest(self, model: Any) -> Checkpoint | None:
        """The newest that is whole; None if there is none at all.

        Args:
            model: The split model that it must fit.

        Raises:
            CheckpointError: If there are some and none can be used.
        """
        found = newest_whole(self.folder, *_identity(model))
        if found is None:
            return None
        folder, manifest = found
        return Checkpoint(folder, manifest, read_json(folder / "state.json")["batches_taken"])

    def save_if_due(self, state: TrainingState) -> None:
        """Saves after every so many steps, and after the last one.

        Args:
            state: Of the run.

        Raises:
            CheckpointError: If it could not be saved; the run must not go on as if it were.
        """
        if self._every and (state.step % self._every == 0 or state.step == state.steps):
            save(self.folder, state)
            keep_last(self.folder, state.step, self._kept)


def save(parent: Path, state: TrainingState) -> Path:
    """Saves a run between two steps; returns the checkpoint's folder.

    Args:
        parent: Folder of all checkpoints.
        state: Of the run.

    Raises:
        CheckpointError: If the disk refused; earlier checkpoints are as they were.
    """
    digest, split = _identity(state.model)
    return write_checkpoint(parent, state.step, digest, split, _contents(state))


def _contents(state: TrainingState) -> dict[str, Content]:
    optimizer, optimizer_facts = optimizer_state(state)
    averages, allocator = allocation(state.model)
    facts = {
        "step": state.step,
        "batches_taken": state.batches_taken,
        "schedule": state.schedule.state_dict(),
        "rng": random_facts(),
        "allocator": allocator,
    }
    return {
        "model.safetensors": model_state(state.model),
        "optimizer.safetensors": optimizer,
        "optimizer.json": optimizer_facts,
        "allocator.safetensors": averages,
        "rng.safetensors": random_tensors(),
        "state.json": facts,
    }


def _identity(model: Any) -> tuple[str, str]:
    return model.remote_trunk.session.info.weight_digest, str(model.split)
