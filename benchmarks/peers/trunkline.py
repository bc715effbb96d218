"""Ours: a split model over a trunk daemon on loopback.

``--micro N`` cuts the batch into N micro-batches, of which ``--in-flight`` are under way at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpt2_small import SPLIT
from benchmarks.peers.driving import Step, Task, adamw, task
from benchmarks.peers.models import local_step
from benchmarks.processes import pin, trunk_processes
from client_service.local_trunk import local_trunk
from client_service.pipeline import accumulate
from client_service.split_model import SplitModelForCausalLM
from shared.freed_memory import keep_freed_memory


def main() -> None:
    given = task("fused", "onednn", "core", "trunk-core", "micro", "in-flight")
    keep_freed_memory()  # as `trunkline train` does
    flags = ["--threads", str(given.threads)]
    if given.options.onednn:
        flags.append("--onednn")
    with local_trunk(str(given.model), SPLIT, flags=flags) as address:
        if given.options.core is not None:
            pin([given.options.core])
            for process in trunk_processes():
                pin([given.options.trunk_core], process.pid)
        model = SplitModelForCausalLM.from_pretrained(
            given.model,
            address,
            adapter=given.adapter,
            fused_loss=bool(given.options.fused),
            onednn=bool(given.options.onednn),
        )
        try:
            given.serve(_step(model.train(), given))
        finally:
            model.remote_trunk.close()


def _step(model: Any, given: Task) -> Step:
    if given.options.micro is None:
        return local_step(model)
    return functools.partial(
        _pipelined, model, adamw(model.parameters()), given.options.micro, given.options.in_flight
    )


def _pipelined(
    model: Any, optimizer: torch.optim.Optimizer, micro: int, in_flight: int, ids: torch.Tensor
) -> float:
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.chunk(micro)]
    loss = accumulate(model, batches, in_flight=in_flight)
    optimizer.step()
    optimizer.zero_grad()
    return loss


if __name__ == "__main__":
    main()
