"""Several micro-batches on their way at once: bottom, wire, trunk and top work at the same time.

The numbers are those of one micro-batch after the other, bit for bit (see
:mod:`client_service.turns`); only the waiting is filled. What it gains depends on where the time
goes: much with a core or an accelerator a side or a slow network, nothing where both sides share
the same busy cores.

Dimension letters: B batch, T tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from client_service.turns import AbandonedError, Turn, Turns, in_turn
from shared.errors import InvalidInputError

Batch = Mapping[str, torch.Tensor]
LossOf = Callable[[Any, Batch], torch.Tensor]

_IGNORED = -100


def model_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The model's own loss, a mean over the labelled tokens."""
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def cut_batch(batch: Batch, count: int) -> list[dict[str, torch.Tensor]]:
    """Cuts the rows of a batch into micro-batches, of as like sizes as can be.

    Args:
        batch: Tensors [B, …] by name.
        count: Of micro-batches; B if there are fewer rows.
    """
    pieces = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    cut = [dict(zip(pieces, row, strict=True)) for row in zip(*pieces.values(), strict=True)]
    return [piece for piece in cut if all(len(tensor) for tensor in piece.values())]


def accumulate(
    model: Any,
    micro_batches: Sequence[Batch],
    in_flight: int = 2,
    loss_of: LossOf = model_loss,
    scale: float = 1.0,
) -> float:
    """Runs micro-batches forward and backward, accumulating the gradients of their joint loss.

    The joint loss is the mean over all labelled tokens, as if the micro-batches were one batch.
    Dropout draws from generators of each micro-batch, which follow from torch's default one.

    Args:
        model: A split model, in training; its optimizer is stepped by the caller.
        micro_batches: Keyword arguments of the model's forward, ``labels`` [B, T] among them.
        in_flight: How many are on their way at once; 1 runs one after the other.
        loss_of: Computes a micro-batch's mean loss.
        scale: Multiplies the gradients, not the loss that is returned.

    Returns:
        The joint loss.

    Raises:
        InvalidInputError: If there is nothing to train on.
        TrunklineError: What the trunk answered, if it refused; gradients are then those of some of
            the micro-batches, and are to be zeroed.
    """
    if in_flight < 1:
        raise InvalidInputError(f"in_flight {in_flight}: one micro-batch at least is accepted")
    counts = [_labelled(batch) for batch in micro_batches]
    total = sum(counts)
    if not total:
        raise InvalidInputError(f"{len(micro_batches)} micro-batches have no labelled token")
    if getattr(model, "remote_trunk", None) is None:
        raise InvalidInputError(
            f"a {type(model).__name__} is not split: accepted is what "
            "SplitModelForCausalLM.from_pretrained gave, or PEFT around it"
        )
    # Its loss would be a mean over nothing.
    work = [(b, n / total) for b, n in zip(micro_batches, counts, strict=True) if n]
    seed = int(torch.randint(2**62, ()))
    run = _Run(model, work, Turns(len(work), in_flight, seed), loss_of, scale)
    return run.losses(in_flight)


class _Run:
    def __init__(
        self,
        model: Any,
        work: list[tuple[Batch, float]],
        turns: Turns,
        loss_of: LossOf,
        scale: float,
    ) -> None:
        self._model, self._work, self._turns = model, work, turns
        self._loss_of, self._scale = loss_of, scale
        self._left = iter(range(len(work)))
        self._lock = threading.Lock()
        self._losses = [0.0] * len(work)
        self._failure: BaseException | None = None

    def losses(self, in_flight: int) -> float:
        """Runs everything; returns the sum of the losses."""
        threads = [
            threading.Thread(target=self._work_off, name=f"micro-batch-{i}", daemon=True)
            for i in range(min(in_flight, len(self._work)) - 1)
        ]
        for thread in threads:
            thread.start()
        self._work_off()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return sum(self._losses)

    def _work_off(self) -> None:
        while True:
            with self._lock:
                micro = next(self._left, None)
            if micro is None:
                return
            try:
                self._one(micro)
            except AbandonedError:
                return
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                return

    def _one(self, micro: int) -> None:
        batch, weight = self._work[micro]
        turn = Turn(self._turns, micro)
        with in_turn(turn), torch.enable_grad():
            loss = self._loss_of(self._model, batch)
            self._losses[micro] = float(loss.detach()) * weight
            (loss * (weight * self._scale)).backward()


def _labelled(batch: Batch) -> int:
    """Tokens that have a label once these are shifted."""
    if "labels" not in batch:
        raise InvalidInputError(f"a micro-batch needs labels; it has {sorted(batch)}")
    return int((batch["labels"][:, 1:] != _IGNORED).sum())
