"""The same split with nothing but a socket between: raw float32 behind a header of 17 bytes.

No session, no retry, no check, one client: the least that two processes can do. With ``--keep 1``
both keep the memory that a step frees.
"""

from __future__ import annotations

import socket
import struct
import sys

import torch

from benchmarks.gpt2_small import WIDTH
from benchmarks.peers.driving import (
    BATCH,
    TOKENS,
    leave_with_parent,
    start_worker,
    task,
)
from benchmarks.peers.models import Ends, Middle
from shared.freed_memory import keep_freed_memory

FORWARD, BACKWARD, STEP = range(3)
HEADER = struct.Struct("<BIIII")  # what to do, and B, T, D, bytes to follow


class Link:
    """Messages of a kind and a tensor, each kind received into its own memory."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._header = bytearray(HEADER.size)
        # A graph may lean on what came with FORWARD until BACKWARD has been answered.
        self._memory = [torch.empty(BATCH, TOKENS, WIDTH) for _ in (FORWARD, BACKWARD)]

    def send(self, kind: int, tensor_BTD: torch.Tensor | None = None) -> None:
        if tensor_BTD is None:
            self._socket.sendall(HEADER.pack(kind, 0, 0, 0, 0))
            return
        payload = memoryview(tensor_BTD.detach().contiguous().numpy()).cast("B")
        self._socket.sendall(HEADER.pack(kind, *tensor_BTD.shape, payload.nbytes))
        self._socket.sendall(payload)

    def receive(self) -> tuple[int, torch.Tensor]:
        self._fill(memoryview(self._header))
        kind, B, T, D, size = HEADER.unpack(self._header)
        if not size:
            return kind, torch.empty(0)
        memory = self._memory[kind][:B, :T, :D]
        self._fill(memoryview(memory.numpy()).cast("B"))
        return kind, memory.detach()

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the other side closed the connection")
            view = view[count:]


class Remote(torch.autograd.Function):
    """The other process as a function with a gradient."""

    @staticmethod
    def forward(ctx, hidden_BTD: torch.Tensor, link: Link) -> torch.Tensor:
        ctx.link = link
        link.send(FORWARD, hidden_BTD)
        return link.receive()[1]

    @staticmethod
    def backward(ctx, gradient_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.link.send(BACKWARD, gradient_BTD)
        return ctx.link.receive()[1], None


def trunk(model: str, adapter: str, threads: str, keep: str, port: str) -> None:
    """Serves one client until it goes."""
    leave_with_parent()
    if int(keep):
        keep_freed_memory()
    torch.set_num_threads(int(threads))
    middle = Middle(model, adapter)
    with socket.create_connection(("127.0.0.1", int(port))) as connected:
        link = Link(connected)
        while True:
            kind, tensor_BTD = link.receive()
            if kind == STEP:
                middle.step()
                link.send(STEP)
            else:
                answer = middle.forward if kind == FORWARD else middle.backward
                link.send(kind, answer(tensor_BTD))


def main() -> None:
    given = task("keep")
    keep = given.options.keep or 0
    if keep:
        keep_freed_memory()
    ends = Ends(given.model, given.adapter)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        arguments = (given.model, given.adapter, given.threads, keep, port)
        worker = start_worker(__spec__.name, "trunk", *map(str, arguments))
        listener.settimeout(120)
        connected, _ = listener.accept()
    connected.settimeout(None)
    link = Link(connected)

    def step(ids: torch.Tensor) -> float:
        loss = ends.loss(ids, lambda hidden_BTD: Remote.apply(hidden_BTD, link))
        loss.backward()
        link.send(STEP)  # both sides step at the same time
        ends.optimizer.step()
        ends.optimizer.zero_grad()
        link.receive()
        return float(loss.detach())

    with connected, worker:
        given.serve(step)


if __name__ == "__main__":
    trunk(*sys.argv[2:]) if sys.argv[1] == "trunk" else main()
