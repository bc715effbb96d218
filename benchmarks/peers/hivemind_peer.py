"""hivemind: the trunk as an expert, which its client calls like a module.

By its design the expert runs its forward again in backward, and steps its optimizer there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from hivemind import DHT
from hivemind.moe import ModuleBackend, RemoteExpert, Server, get_experts
from hivemind.p2p import P2PDaemonError
from hivemind.utils.tensor_descr import BatchTensorDescriptor

from benchmarks.gpt2_small import WIDTH
from benchmarks.peers.driving import BATCH, TOKENS, adamw, start_worker, task
from benchmarks.peers.models import Ends, part

UID = "trunk.0"
ADDRESS = "/ip4/127.0.0.1/tcp/0"
FIND_TIMEOUT_S, POLL_S = 120.0, 0.2


class Blocks(torch.nn.Module):
    """An expert takes and gives tensors."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.part(inputs_embeds=hidden_BTD, use_cache=False)
        return output.last_hidden_state


def trunk(model: str, adapter: str, threads: str, *peers: str) -> None:
    """Serves the expert until standard input ends."""
    torch.set_num_threads(int(threads))
    blocks = Blocks(part("trunk", Path(model), Path(adapter)))
    shape = BatchTensorDescriptor(TOKENS, WIDTH)
    backend = ModuleBackend(
        UID,
        blocks,
        optimizer=adamw(blocks.parameters()),
        args_schema=(shape,),
        outputs_schema=shape,
        min_batch_size=1,
        max_batch_size=BATCH,
    )
    dht = DHT(initial_peers=peers, host_maddrs=[ADDRESS], start=True)
    server = Server(dht, {UID: backend}, device="cpu", start=True)
    sys.stdin.buffer.read()
    server.shutdown()


def find_expert(dht: DHT) -> RemoteExpert:
    """The trunk, once it answers: it tells where it is before it does."""
    deadline = time.monotonic() + FIND_TIMEOUT_S
    while True:
        found = get_experts(dht, [UID])[0]
        if found is not None and _answers(found):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError("the expert does not answer")
        time.sleep(POLL_S)


def _answers(expert: RemoteExpert) -> bool:
    try:
        return bool(expert.info)
    except P2PDaemonError:
        return False


def main() -> None:
    given = task()
    # It forks, which does not go together with the threads that computing starts.
    dht = DHT(host_maddrs=[ADDRESS], start=True)
    addresses = map(str, dht.get_visible_maddrs())
    arguments = map(str, (given.model, given.adapter, given.threads))
    try:
        with start_worker(__spec__.name, "trunk", *arguments, *addresses):
            ends = Ends(given.model, given.adapter)
            expert = find_expert(dht)

            def step(ids: torch.Tensor) -> float:
                loss = ends.loss(ids, expert)
                loss.backward()
                ends.optimizer.step()
                ends.optimizer.zero_grad()
                return float(loss.detach())

            given.serve(step)
    finally:
        dht.shutdown()


if __name__ == "__main__":
    trunk(*sys.argv[2:]) if sys.argv[1] == "trunk" else main()
