"""PyTorch's own: RPC with distributed autograd, forced onto TCP.

On one host its default is shared memory, which keeps a core busy while it waits. With ``--keep 1``
both sides keep the memory that a step frees.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.autograd as dist_autograd
from torch.distributed import rpc

from benchmarks.peers import torch_rpc_trunk as remote
from benchmarks.peers.driving import leave_with_parent, start_worker, task
from benchmarks.peers.models import Ends
from shared.freed_memory import keep_freed_memory


def trunk(model: str, adapter: str, threads: str, keep: str, folder: str) -> None:
    """Serves the client until both shut down."""
    leave_with_parent()
    if int(keep):
        keep_freed_memory()
    torch.set_num_threads(int(threads))
    remote.load(Path(model), Path(adapter))
    remote.join(remote.TRUNK, folder)
    rpc.shutdown()


def one_step(ends: Ends, ids: torch.Tensor) -> float:
    """One distributed forward and backward, and the optimizers of both sides at once."""
    with dist_autograd.context() as context_id:
        loss = ends.loss(ids, lambda hidden: rpc.rpc_sync(remote.TRUNK, remote.forward, (hidden,)))
        dist_autograd.backward(context_id, [loss])
        theirs = rpc.rpc_async(remote.TRUNK, remote.step, (context_id,))
        remote.apply(ends.optimizer, context_id)
        theirs.wait()
    return float(loss.detach())


def main() -> None:
    given = task("keep")
    keep = given.options.keep or 0
    if keep:
        keep_freed_memory()
    ends = Ends(given.model, given.adapter)
    with tempfile.TemporaryDirectory() as folder:
        arguments = map(str, (given.model, given.adapter, given.threads, keep, folder))
        with start_worker(__spec__.name, "trunk", *arguments):
            remote.join(remote.CLIENT, folder)
            given.serve(lambda ids: one_step(ends, ids))
            rpc.shutdown()


if __name__ == "__main__":
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    trunk(*sys.argv[2:]) if sys.argv[1] == "trunk" else main()
