"""The receiving process of the wire's benchmark: the ways to take a tensor's bytes in."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch

from client_service.connection import SERVICE
from shared.pb.trunkline.v1 import trunk_pb2 as pb
from shared.tensor_bytes import as_bytes
from shared.wire.messages import Inbox, to_frames
from trunk_service.server import SERVER_OPTIONS

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
ACKNOWLEDGED = b"k"
LENGTH = struct.Struct("<q")

_NO_LIMIT = 1 << 40
_LARGE_BYTES = 30 * 1024**2


def unlimited(options: list[Any]) -> list[Any]:
    """Our settings of a channel or server without our limit on a message's size."""
    return [o for o in options if o[0] not in dict(UNLIMITED)] + UNLIMITED


async def _ours(frames: AsyncIterator[bytes], context: Any) -> None:
    """Decodes a message and acknowledges it; with a ``request_id``, sends so many bytes back."""
    inbox = Inbox(pb.SessionRequest, lambda _: _NO_LIMIT, max_open_bytes=_NO_LIMIT)
    held: dict[str, torch.Tensor] = {}
    async for raw in frames:
        incoming = inbox.feed(raw)
        if incoming is None:
            continue
        message = incoming.message
        if message.WhichOneof("body") == "close":
            return
        wanted = message.forward.request_id
        if wanted and wanted not in held:
            held[wanted] = torch.randn(int(wanted) // 4)
        tensors = {"hidden": held[wanted]} if wanted else {}
        answer = pb.SessionResponse(id=message.id, forward=pb.ForwardResult())
        for frame in to_frames(answer, tensors):
            await context.write(frame)


async def _bare(chunks: AsyncIterator[bytes], context: Any) -> None:
    """Counts the bytes after a length; they are not put together."""
    left = 0
    async for raw in chunks:
        left = left - len(raw) if left else LENGTH.unpack(raw)[0]
        if left == 0:
            await context.write(ACKNOWLEDGED)


async def _put_together(chunks: AsyncIterator[bytes], context: Any) -> None:
    """Copies the bytes after a length into a tensor, which is the least that a reader must do."""
    view = memoryview(b"")
    async for raw in chunks:
        if not view.nbytes:
            view = as_bytes(torch.empty(LENGTH.unpack(raw)[0] // 4))
            continue
        view[: len(raw)] = raw
        view = view[len(raw) :]
        if not view.nbytes:
            await context.write(ACKNOWLEDGED)


async def _protobuf(messages: AsyncIterator[pb.SessionRequest], context: Any) -> None:
    """What ordinary code does: one message, one field, a tensor made of it."""
    async for message in messages:
        torch.frombuffer(bytearray(message.data), dtype=torch.float32)
        await context.write(pb.SessionResponse(id=message.id))


def _server(options: list[Any], methods: dict[str, Any]) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(options=options)
    handler = grpc.method_handlers_generic_handler(SERVICE.strip("/"), methods)
    server.add_generic_rpc_handlers((handler,))
    return server, server.add_insecure_port("127.0.0.1:0")


def _serve_socket(listening: socket.socket) -> None:
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while head := connection.recv(LENGTH.size, socket.MSG_WAITALL):
            view = as_bytes(torch.empty(LENGTH.unpack(head)[0] // 4))
            while view.nbytes:
                view = view[connection.recv_into(view) :]
            connection.sendall(ACKNOWLEDGED)


async def _serve(parent: Connection) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_socket, args=(listening,), daemon=True).start()
    stream = grpc.stream_stream_rpc_method_handler
    ours, our_port = _server(SERVER_OPTIONS, {"Session": stream(_ours)})
    theirs, their_port = _server(
        unlimited(SERVER_OPTIONS),
        {
            "Bare": stream(_bare),
            "PutTogether": stream(_put_together),
            "Protobuf": stream(
                _protobuf, pb.SessionRequest.FromString, pb.SessionResponse.SerializeToString
            ),
        },
    )
    await ours.start()
    await theirs.start()
    parent.send((our_port, their_port, listening.getsockname()[1]))
    await asyncio.to_thread(parent.poll, None)
    await ours.stop(None)
    await theirs.stop(None)


def like_one_that_computes() -> None:
    """Frees a large tensor, as every process that trains has.

    glibc learns from it to keep what is freed; before that, every message is received into memory
    that the system has yet to give page by page, which is slower than all of gRPC.
    """
    torch.empty(_LARGE_BYTES, dtype=torch.uint8).zero_()


def receive(parent: Connection) -> None:
    """Serves until the other end of a pipe says or closes something; first sends it the ports."""
    like_one_that_computes()
    asyncio.run(_serve(parent))
