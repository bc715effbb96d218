"""One side of :mod:`benchmarks.cost`: a split model of the tree that is first on the path.

Started as a file, so that it is the same for a tree that is older than itself. Orders come as lines
of JSON on standard input; what a step took is answered so on standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import client_service
from client_service.local_trunk import local_trunk
from client_service.split_model import SplitModelForCausalLM
from shared.freed_memory import keep_freed_memory

BATCH, TOKENS, VOCABULARY = 4, 128, 50257
SPLIT, ON_TRUNK = "2:10", range(2, 10)
LEARNING_RATE = 1e-4


class Spent:
    """CPU seconds of this process inside of some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        """Replaces a function by one that is timed."""
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return plain(*given, **named)
            finally:
                self.seconds += time.process_time() - began

        setattr(owner, name, timed)

    def take(self) -> float:
        """What was spent since it was taken last."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def watch_comparing(compared: Spent, described: Spent) -> None:
    """Times, in today's tree, the comparison of contents and the reading of PEFT's layers."""
    for module in ("sent_state", "trunk_function"):
        compared.watch(importlib.import_module(f"client_service.{module}"), "same_numbers")
    described.watch(importlib.import_module("client_service.trunk_blocks").Passage, "adapters")


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int, micro: int) -> dict[str, float]:
    """One optimizer step of so many micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)
    traffic = model.remote_trunk.session.traffic
    sent, received = traffic.bytes_sent, traffic.bytes_received
    began, total = time.perf_counter(), 0.0
    for rows in ids_BT.chunk(micro):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss / micro
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return {
        "seconds": time.perf_counter() - began,
        "loss": total,
        "sent": traffic.bytes_sent - sent,
        "received": traffic.bytes_received - received,
    }


def main() -> None:
    folder, adapter, threads = sys.argv[1:]
    # Not the trunk's as well, which may outlive this process: then nobody would see its end.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    keep_freed_memory()  # as `trunkline train` does
    torch.set_num_threads(int(threads))
    with local_trunk(folder, SPLIT, flags=("--threads", threads)) as address:
        model: Any = SplitModelForCausalLM.from_pretrained(folder, address, adapter=adapter).train()
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([p for _, p in named], lr=LEARNING_RATE)
        on_trunk = [p for n, p in named if any(f".h.{i}." in n for i in ON_TRUNK)]
        compared, described = Spent(), Spent()
        say({"tree": client_service.__file__, "parameters": sum(p.numel() for p in on_trunk)})
        for line in sys.stdin:
            order = json.loads(line)
            if order.get("watch"):
                watch_comparing(compared, described)
            found = step(model, optimizer, order["seed"], order["micro"])
            say(found | {"compared": compared.take(), "described": described.take()})
        model.remote_trunk.close()


if __name__ == "__main__":
    main()
