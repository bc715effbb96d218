"""torchslicer over gRPC: a coordinator and three workers, as it knows no U.

Labels go to its last worker, which holds the top; the coordinator holds no layers. Hidden states
cross the same two boundaries as in the other systems.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

import torch
import torchslicer
from torchslicer.core.model_graph import ModelGraph
from torchslicer.strategies import UniformSplitter
from torchslicer.strategies.base import Partition

from benchmarks.gpt2_small import SPLIT
from benchmarks.peers.driving import (
    LEARNING_RATE,
    Task,
    leave_with_parent,
    start_worker,
    task,
)
from benchmarks.peers.models import whole

INIT_TIMEOUT_S = 60.0
IGNORED = -100


def worker(port: str, threads: str) -> None:
    """Holds a slice until the coordinator shuts it down."""
    leave_with_parent()
    torch.set_num_threads(int(threads))
    torchslicer.run_worker(port=int(port), coordinator_addr=None, device="cpu")


def stages(model: Any) -> list[torch.nn.Module]:
    """The library's stages around the blocks that PEFT has adapted."""
    core = model.transformer
    embed = torchslicer.GPT2EmbedStage(core.wte, core.wpe, core.drop)
    blocks = [torchslicer.BlockStage(block) for block in core.h]
    return [embed, *blocks, torchslicer.CausalLMHeadStage(core.ln_f, model.lm_head)]


def partitions(graph: ModelGraph) -> list[Partition]:
    """Bottom, trunk and top; stage 0 are the embeddings."""
    start, end = (int(bound) + 1 for bound in SPLIT.split(":"))
    bounds = [(0, start), (start, end), (end, len(graph))]
    found = []
    for index, (first, behind) in enumerate(bounds):
        held = list(range(first, behind))
        inner = UniformSplitter._intra_predecessors(graph, held)
        found.append(Partition(index=index, layer_indices=held, predecessors=inner))
    return found


def executor(given: Task, ports: list[int]) -> torchslicer.DistributedExecutor:
    """A coordinator that has given the workers their slices."""
    config = torchslicer.RunConfig()
    config.logging.enabled = False
    config.startup.worker_init_rpc_timeout_s = INIT_TIMEOUT_S
    own, *workers = [f"127.0.0.1:{port}" for port in ports]
    made = torchslicer.DistributedExecutor(
        torchslicer.StaticDiscovery(workers), own, coordinator_bind_addr=own, run_config=config
    )
    graph = ModelGraph.from_stages(
        stages(torchslicer.peft_unwrap(whole(given.model, given.adapter)))
    )
    optimizer = {"name": "AdamW", "params": {"lr": LEARNING_RATE}}
    criterion = {"name": "CrossEntropyLoss", "params": {"ignore_index": IGNORED}}
    made.setup(graph, partitions(graph), optimizer, criterion)
    return made


def main() -> None:
    given = task()
    ports = _free_ports(4)
    with contextlib.ExitStack() as stack:
        for port in ports[1:]:
            arguments = ("worker", str(port), str(given.threads))
            stack.enter_context(start_worker(__spec__.name, *arguments))
        coordinator = executor(given, ports)
        epochs = iter(range(sys.maxsize))

        def step(ids: torch.Tensor) -> float:
            # It does not shift labels.
            labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
            return float(coordinator.train_epoch([(ids, labels)], epoch=next(epochs))["loss"])

        given.serve(step)
        coordinator.teardown()


def _free_ports(count: int) -> list[int]:
    """Its workers want to be told a port."""
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in taken]


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1] == "worker" else main()
