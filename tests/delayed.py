"""A TCP proxy that delivers everything later, as a distant server would, and as fast: it delays and never throttles."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from types import TracebackType
from typing import Self

_CHUNK = 1 << 18
_HELD_CHUNKS = 1024
"""Read and not yet delivered, of one direction of one connection: 256 MiB at most, far beyond rate × delay here."""


class DelayedProxy:
    """`with DelayedProxy(port, 0.025) as p:` listens on `p.port`; each direction's bytes arrive `delay_s` later.

    A request over an open connection so takes 2 × `delay_s` longer; opening one is answered at once.

    Args:
        target: port on this machine.
        delay_s: seconds of one direction.
    """

    def __init__(self, target: int, delay_s: float) -> None:
        self._target, self._delay = target, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()  # as a server that is gone
                continue
            for source, sink in ((near, far), (far, near)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                held: queue.Queue[tuple[float, bytes]] = queue.Queue(_HELD_CHUNKS)
                threading.Thread(target=self._take, args=(source, held), daemon=True).start()
                threading.Thread(target=self._give, args=(held, sink), daemon=True).start()

    def _take(self, source: socket.socket, held: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            held.put((time.monotonic() + self._delay, data))

    @staticmethod
    def _give(held: queue.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        """Until the end of the stream, which is passed on too; what a closed sink refuses is taken and dropped."""
        while True:
            due, data = held.get()
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                if data:
                    sink.sendall(data)
                else:
                    sink.shutdown(socket.SHUT_WR)
            if not data:
                return
