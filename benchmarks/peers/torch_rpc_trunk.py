"""What both processes of :mod:`benchmarks.peers.torch_rpc` name alike: the trunk's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc

from benchmarks.peers.driving import adamw
from benchmarks.peers.models import part

CLIENT, TRUNK = "client", "trunk"

_served: dict[str, Any] = {}


def load(model: Path, adapter: Path) -> None:
    """Makes this process the one that holds the trunk."""
    _served["part"] = part("trunk", model, adapter)
    _served["optimizer"] = adamw(_served["part"].parameters())


def forward(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Runs on the trunk."""
    output: torch.Tensor = _served["part"](
        inputs_embeds=hidden_BTD, use_cache=False
    ).last_hidden_state
    return output


def step(context_id: int) -> None:
    """Runs on the trunk."""
    apply(_served["optimizer"], context_id)


def apply(optimizer: torch.optim.Optimizer, context_id: int) -> None:
    """Steps with the gradients that a distributed backward left in its context."""
    for parameter, gradient in dist_autograd.get_gradients(context_id).items():
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def join(name: str, folder: str) -> None:
    """Meets the other process by a file in a folder; TCP alone, no shared memory."""
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{folder}/meeting", _transports=["uv"], _channels=["basic"]
    )
    rank = (CLIENT, TRUNK).index(name)
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)
