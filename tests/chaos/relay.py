"""A TCP relay on loopback that can go silent, cut hard, and record what passes."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any

_CHUNK_BYTES = 65_536
# Closing such a socket sends RST instead of FIN: what a peer sees whose host went away.
_LINGER_NOT = struct.pack("ii", 1, 0)


class Relay:
    """Forwards every connection to an address, from a thread of its own.

    Args:
        target: ``host:port``.
        record: Keep all bytes, by connection and direction.
    """

    def __init__(self, target: str, record: bool = False) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._record = record
        self.recorded: list[bytearray] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._thread.start()
        self.address = self._call(self._start())

    def freeze(self) -> None:
        """Stops forwarding, on connections to come too; closes nothing and tells nobody.

        Nothing more is forwarded once this has returned.
        """
        self._call(self._set_open(False))

    def thaw(self) -> None:
        """Forwards again, first what was held back."""
        self._call(self._set_open(True))

    def cut(self) -> None:
        """Resets every connection; new ones are served."""
        self._call(self._cut())

    def close(self) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _set_open(self, is_open: bool) -> None:
        if is_open:
            self._open.set()
        else:
            self._open.clear()

    async def _start(self) -> str:
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            # A connection accepted in the silence gets no further than here.
            await self._open.wait()
            onward_reader, onward = await asyncio.open_connection(*self._target)
        except OSError:
            self._drop(writer)
            return
        self._writers.add(onward)
        for source, sink in ((reader, onward), (onward_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        kept = bytearray()
        if self._record:
            self.recorded.append(kept)
        try:
            while data := await source.read(_CHUNK_BYTES):
                if self._record:
                    kept += data
                await self._open.wait()
                sink.write(data)
                await sink.drain()
            await self._open.wait()
        except OSError:
            pass  # one side is gone; the other is told by the close
        finally:
            self._drop(sink)

    def _drop(self, writer: asyncio.StreamWriter) -> None:
        self._writers.discard(writer)
        writer.close()

    async def _cut(self) -> None:
        for writer in list(self._writers):
            end: socket.socket = writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
            writer.transport.abort()
        self._writers.clear()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._cut()
