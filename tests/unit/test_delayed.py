"""The proxy delays each direction, and no more than that."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.delayed import DelayedProxy

DELAY_S, LONG_S = 0.05, 1.0
MIB = 1 << 20


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(MIB):
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def _exchange(connection: socket.socket, data: bytes) -> float:
    """Seconds until all of `data` came back, in order."""
    started, got = time.monotonic(), bytearray()
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    while len(got) < len(data):
        got += connection.recv(MIB)
    sender.join()
    assert got == data
    return time.monotonic() - started


def test_every_request_takes_two_delays_longer(echo: int):
    with DelayedProxy(echo, DELAY_S) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        assert min(_exchange(connection, b"request") for _ in range(5)) >= 2 * DELAY_S


def test_many_bytes_take_no_more_delays_than_one(echo: int):
    data = bytes(range(256)) * (32 * MIB // 256)
    with DelayedProxy(echo, LONG_S) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        # 128 or more chunks: one delay for each would be over two minutes in each direction.
        assert 2 * LONG_S <= _exchange(connection, data) < 128 * LONG_S


def test_the_end_of_a_stream_is_passed_on(echo: int):
    with DelayedProxy(echo, DELAY_S) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        connection.sendall(b"last")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(10) == b"last"
        assert connection.recv(10) == b""
