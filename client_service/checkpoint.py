"""What a checkpoint of a split training has in it, and how a run goes on from one.

Everything that the next step depends on, of both sides, so that the rest of the run is the same to
the last bit: the client's trainable parameters, the trunk's adapter, both optimizers, the schedule,
how much data was taken, the random generators, and where AdaLoRA's allocation of ranks stands. The
frozen weights are not in it; the digest of the trunk's is.

The trunk's optimizer is fetched and given back here. ``optimizer.state_dict()`` would carry it too
(:mod:`client_service.optimizer_hook`), but give it back at the next step only: after the forward,
for which AdaLoRA's uncut matrices must be there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

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
    optimizer_state,
    parameters_by_side,
    restore_allocation,
    restore_optimizer,
    restore_parameters,
)
from client_service.optimizer_spec import OptimizerSettings, describe
from client_service.random_state import random_facts, random_tensors, restore_random
from client_service.training import TrainingState
from shared.errors import CheckpointError

Tensors = dict[str, torch.Tensor]

_UNCUT = "allocator/matrix/"


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
            AdapterError: If the trunk refuses its adapter.
            OptimizerError: If it refuses the optimizer's state.
        """
        source, facts = str(self.folder), self._json("state")
        ends = self._tensors("bottom") | self._tensors("top")
        restore_parameters(source, state.model, ends)
        restore_optimizer(source, state, self._tensors("optimizer"), self._json("optimizer"))
        restore_allocation(state.model, self._tensors("allocator"))
        self._restore_trunk(state.model.remote_trunk, facts["trunk"])
        state.schedule.load_state_dict(facts["schedule"])
        state.step, state.batches_taken = facts["step"], facts["batches_taken"]
        restore_random(self._tensors("rng"), facts["rng"])

    def _restore_trunk(self, remote: Any, facts: dict[str, Any]) -> None:
        if remote.trainable:
            optimizer = self._tensors("trunk_optimizer")
            if not _has_uncut(optimizer):
                weights, digest = self._tensors("trunk"), remote.session.info.weight_digest
                remote.restore(weights, digest, facts["step"])
            settings = OptimizerSettings(**facts["optimizer"])
            remote.restore_optimizer(optimizer, settings, facts["step"])
        remote.micro = facts["micro"]

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


def check_can_be_saved(config: PeftConfig | None) -> None:
    """Refuses a method of which a trunk does not give away all it trains.

    Args:
        config: Of the adapter; None without one.

    Raises:
        CheckpointError: Names it.
    """
    if getattr(config, "prefix_projection", False):
        raise CheckpointError(
            "prefix_projection: the trunk gives what its encoder makes, not the encoder, so a run "
            "cannot go on from a checkpoint; train without checkpoints"
        )


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
    model, remote = state.model, state.model.remote_trunk
    sides, (optimizer, optimizer_facts) = parameters_by_side(model), optimizer_state(state)
    trunk_optimizer: Tensors = {}
    trunk_weights: Tensors = {}
    if remote.trainable:
        trunk_optimizer = remote.session.optimizer_state(remote.active)
        # AdaLoRA's matrices are in it, uncut; as an adapter they would be cut to their ranks.
        if not _has_uncut(trunk_optimizer):
            trunk_weights = remote.session.adapter(remote.active)
    facts = {
        "step": state.step,
        "batches_taken": state.batches_taken,
        "schedule": state.schedule.state_dict(),
        "rng": random_facts(),
        "trunk": {
            "step": remote.next_step - 1,
            # A frozen trunk counts no steps: its dropout is keyed by the forwards so far.
            "micro": remote.micro,
            "optimizer": asdict(describe(state.optimizer, state.optimizer.param_groups[0])),
        },
    }
    return {
        "bottom.safetensors": sides["bottom"],
        "top.safetensors": sides["top"],
        "trunk.safetensors": trunk_weights,
        "optimizer.safetensors": optimizer,
        "optimizer.json": optimizer_facts,
        "trunk_optimizer.safetensors": trunk_optimizer,
        "allocator.safetensors": allocation(model),
        "rng.safetensors": random_tensors(),
        "state.json": facts,
    }


def _identity(model: Any) -> tuple[str, str]:
    return model.remote_trunk.session.info.weight_digest, str(model.split)


def _has_uncut(trunk_optimizer: Tensors) -> bool:
    return any(name.startswith(_UNCUT) for name in trunk_optimizer)
