"""AdaLoRA's tuner on the client, over the matrices of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraModel

from client_service.remote_trunk import RemoteTrunk
from shared.adapters.adalora import WholeModelRanks, penalty


class SplitAdaLoraModel(AdaLoraModel):  # type: ignore[misc]
    """PEFT's tuner, with the trunk's share of the regularisation and of the budget."""

    remote_trunk: RemoteTrunk
    ranks: WholeModelRanks

    @classmethod
    def take_over(cls, tuner: AdaLoraModel, remote: RemoteTrunk) -> None:
        """Makes a tuner that PEFT built one over both sides."""
        tuner.__class__ = cls
        tuner.remote_trunk = remote
        tuner.ranks = WholeModelRanks(tuner, tuner._trunk_scores(update=False, report=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model and adds the orthogonality term of all matrices to its loss."""
        outputs = self.model.forward(*args, **kwargs)
        if isinstance(getattr(outputs, "loss", None), torch.Tensor):
            total, terms = penalty(self)
            if (theirs := self.remote_trunk.penalty) is not None:
                total, terms = total + theirs.total.to(total.device), terms + theirs.terms
            weight = self.peft_config[self.trainable_adapter_name].orth_reg_weight
            outputs.loss = outputs.loss + weight * (total / max(terms, 1))
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """As PEFT's, with one threshold over both sides; call it before ``zero_grad()`` too.

        Args:
            global_step: Of the training.
        """
        config = self.peft_config[self.trainable_adapter_name]
        last = config.total_step - config.tfinal
        if global_step > last:
            self._mask_again(config)
            return
        update = global_step < last
        if update:
            self.rankallocator.update_ipt(self.model)
        budget, due = self.rankallocator.budget_schedule(global_step)
        allocates = due or not update
        scores = self._trunk_scores(update, allocates)
        if not allocates:
            return
        config.rank_pattern, self.trunk_pattern = self.ranks.allocate(budget, scores)
        if scores:
            self._session.allocate(self.remote_trunk.active, self.trunk_pattern, last=not update)
        if not update:
            self.rankallocator.reset_ipt()

    @property
    def _session(self) -> Any:
        return self.remote_trunk.session

    def _trunk_scores(self, update: bool, report: bool) -> dict[str, torch.Tensor]:
        if not self.remote_trunk.trainable or not (update or report):
            return {}
        scores: dict[str, torch.Tensor] = self._session.importance(
            self.remote_trunk.active, update, report
        )
        return scores

    def _mask_again(self, config: Any) -> None:
        """The optimizer has moved the singular values that were zeroed; PEFT zeroes them anew."""
        if config.rank_pattern:
            self.rankallocator.mask_using_rank_pattern(self.model, config.rank_pattern)
        if getattr(self, "trunk_pattern", None):
            self._session.allocate(self.remote_trunk.active, self.trunk_pattern, last=False)
