"""AdaLoRA over parts: one regularisation and one budget of ranks for the whole model.

PEFT's ``AdaLoraModel`` adds an orthogonality term to the loss, normalised by the number of its
matrices, and its ``RankAllocator`` keeps the singular values above one threshold. Both are about
*all* matrices of the model, so the parts exchange three small things: the trunk's unnormalised
term, its scores (three numbers a singular value), and which singular values are kept. The scores
and the threshold are computed by PEFT's own allocator.

Source: Zhang et al. 2023 (arXiv 2303.10512); ``peft.tuners.adalora``.

Dimension letters: R adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraModel

from shared.errors import AdapterError

RankPattern = dict[str, list[bool]]

_ADAPTER = "default"


def tuner_of(model: Any) -> AdaLoraModel | None:
    """The AdaLoRA tuner of a ``PeftModel``; None for another method or a bare model."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None


def penalty(tuner: AdaLoraModel) -> tuple[torch.Tensor, int]:
    """How far the singular vectors are from orthogonal, as ``AdaLoraModel.forward`` sums it.

    Returns:
        The sum over all matrices of ``|| P P^T - I ||``, not normalised, and their number.
    """
    total = torch.zeros(())
    count = 0
    for name, matrix in tuner.model.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and tuner.trainable_adapter_name in name:
            covariance = matrix @ matrix.T if "lora_A" in name else matrix.T @ matrix
            identity = torch.eye(*covariance.size(), out=torch.empty_like(covariance))
            total = total + torch.norm(covariance - identity, p="fro")
            count += 1
    return total, count


def importance(tuner: AdaLoraModel) -> dict[str, torch.Tensor]:
    """Scores [R, 3] by the saved name of each ``lora_E``: of A's rows, B's columns and E itself.

    The means are those that ``RankAllocator.mask_to_budget`` takes.
    """
    allocator = tuner.rankallocator
    found = {}
    for name, values in tuner.model.named_parameters():
        if f"lora_E.{_ADAPTER}" not in name:
            continue
        rank = values.shape[0]
        columns = torch.zeros(rank, 3)
        if name in allocator.exp_avg_ipt:
            score = {
                m: allocator._element_score(name.replace("lora_E", f"lora_{m}")) for m in "ABE"
            }
            means = (score["A"].mean(dim=1), score["B"].mean(dim=0), score["E"].view(-1))
            columns = torch.stack([mean.detach() for mean in means], dim=1)
        found[_saved(name)] = columns.float().cpu()
    return found


def keep(tuner: AdaLoraModel, pattern: dict[str, torch.Tensor], last: bool) -> None:
    """Zeroes the singular values that are not kept and remembers the pattern.

    Args:
        tuner: Whose ``lora_E`` to mask.
        pattern: Booleans [R] by the saved name of each ``lora_E``.
        last: The last allocation; the moving averages start anew.

    Raises:
        AdapterError: If a name or a length is not that of the adapter; nothing was changed.
    """
    ranks = _ranks(tuner)
    given = {name: tuple(kept.shape) for name, kept in pattern.items()}
    if given != {name: (rank,) for name, rank in ranks.items()}:
        raise AdapterError(
            f"an allocation for {len(given)} matrices does not fit this adapter's {len(ranks)}: "
            f"accepted is one boolean a singular value, for each lora_E"
        )
    lists = {name: kept.bool().tolist() for name, kept in pattern.items()}
    if lists:
        tuner.rankallocator.mask_using_rank_pattern(tuner.model, lists)
    tuner.peft_config[_ADAPTER].rank_pattern = lists
    if last:
        tuner.rankallocator.reset_ipt()


def check_rank_pattern(tuner: AdaLoraModel, pattern: RankPattern) -> None:
    """Refuses a saved rank pattern that is not of this adapter's matrices.

    Raises:
        AdapterError: Names a matrix.
    """
    ranks = _ranks(tuner)
    for name, kept in pattern.items():
        if ranks.get(_saved(name)) != len(kept):
            raise AdapterError(f"rank_pattern of {name} is not of a matrix of this adapter")


class WholeModelRanks:
    """Runs PEFT's allocator on this side over the matrices of both sides.

    Args:
        tuner: The client's tuner; its allocator is given the budget of the whole model.
        trunk_scores: The trunk's scores, for their names and ranks.
    """

    def __init__(self, tuner: AdaLoraModel, trunk_scores: dict[str, torch.Tensor]) -> None:
        self._tuner = tuner
        allocator = tuner.rankallocator
        names = [name.replace("lora_E", "%s") + f".{_ADAPTER}" for name in trunk_scores]
        allocator.name_set = sorted({*allocator.name_set, *names})
        allocator.init_bgt += sum(scores.shape[0] for scores in trunk_scores.values())
        allocator.target_bgt = allocator.peft_config.target_r * len(allocator.name_set)

    def allocate(
        self, budget: int, trunk_scores: dict[str, torch.Tensor]
    ) -> tuple[RankPattern, dict[str, torch.Tensor]]:
        """Masks this side's singular values by one threshold over both sides.

        Returns:
            The rank pattern of this side, and what the trunk keeps, [R] booleans by name.
        """
        allocator = self._tuner.rankallocator
        both = _BothSides(self._tuner.model, allocator, trunk_scores)
        pattern = allocator.mask_to_budget(both, budget)
        both.forget(allocator)
        theirs = {n: torch.tensor(pattern.pop(f"{n}.{_ADAPTER}")) for n in trunk_scores}
        return pattern, theirs


class _BothSides:
    """What the allocator asks a model for, with stand-ins for the trunk's matrices.

    A stand-in has one column, whose score is the mean that PEFT would have taken over all.
    """

    def __init__(
        self, model: torch.nn.Module, allocator: Any, trunk_scores: dict[str, torch.Tensor]
    ) -> None:
        self._model = model
        self._stand_ins: dict[str, torch.Tensor] = {}
        for name, scores_R3 in trunk_scores.items():
            for column, matrix in enumerate("ABE"):
                score = scores_R3[:, column : column + 1]
                score = score.T if matrix == "B" else score
                stand_in = name.replace("lora_E", f"lora_{matrix}") + f".{_ADAPTER}"
                self._stand_ins[stand_in] = torch.zeros_like(score)
                allocator.exp_avg_ipt[stand_in] = score
                allocator.exp_avg_unc[stand_in] = torch.ones_like(score)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Both sides' matrices."""
        yield from self._model.named_parameters()
        yield from self._stand_ins.items()

    def forget(self, allocator: Any) -> None:
        """Takes the stand-ins' scores out of the allocator again."""
        for name in self._stand_ins:
            del allocator.exp_avg_ipt[name], allocator.exp_avg_unc[name]


def _ranks(tuner: AdaLoraModel) -> dict[str, int]:
    """Number of singular values by the saved name of each ``lora_E``."""
    return {
        _saved(name): values.shape[0]
        for name, values in tuner.model.named_parameters()
        if f"lora_E.{_ADAPTER}" in name
    }


def _saved(name: str) -> str:
    return name.replace(f".{_ADAPTER}", "")
