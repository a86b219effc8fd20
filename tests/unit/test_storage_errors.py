"""What goes wrong with a store, in words that help; and what goes wrong without anybody noticing."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distill_ray.errors import UserError
from distill_ray.storage import (
    ConflictError,
    NotFoundError,
    StorageError,
    check_access,
    open_storage,
)
from distill_ray.storage.atomic import explain_os, locked
from tests.s3server import S3Server


def test_wrong_bucket(s3_root: str) -> None:
    with pytest.raises(StorageError, match=r"at http://127.*no bucket 'no-such-bucket'; create it or correct"):
        check_access("s3://no-such-bucket/x")
    storage = open_storage("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="no bucket 'no-such-bucket'"):
        storage.get("k")
    with pytest.raises(StorageError, match="no bucket 'no-such-bucket'"):
        storage.head("k")
    with pytest.raises(StorageError, match="no bucket 'no-such-bucket'"):
        list(storage.list(""))


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ACCESS_KEY_ID", "stranger"), ("AWS_SECRET_ACCESS_KEY", "wrong-secret")]
)
def test_wrong_keys(s3_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    attempts = [
        lambda: check_access(s3_uri),
        lambda: open_storage(s3_uri).get("k"),
        lambda: open_storage(s3_uri).put("k", b""),
        lambda: open_storage(s3_uri).put_if("k", b"", None),
        lambda: open_storage(s3_uri).head("k"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=f"at http://127.*{variable}") as caught:
            attempt()
        assert value not in str(caught.value)
        assert "tester" not in str(caught.value)


def test_no_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="no credentials found; set AWS_ACCESS_KEY_ID"):
        check_access(s3_uri)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"nobody.*AWS_PROFILE"):
        check_access(s3_uri)


def test_endpoint_down_is_told(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9.*no answer.*AWS_ENDPOINT_URL"):
        check_access(s3_uri)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3:///x", "s3://Bad_Bucket/x"])
def test_uris_that_name_no_store(uri: str) -> None:
    with pytest.raises(UserError, match=r"scheme|bucket"):
        open_storage(uri)


def test_local_root_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file"):
        check_access(str(tmp_path / "file" / "store"))
    with pytest.raises(StorageError, match="choose another folder"):
        open_storage(str(tmp_path / "file")).put("k", b"")


def test_a_write_that_the_disk_refuses_leaves_nothing(tmp_path: Path) -> None:
    # A file size limit is the nearest thing to a full disk that needs no privilege.
    code = (
        "import resource, signal, sys\nfrom distill_ray.storage import StorageError, open_storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "s = open_storage(sys.argv[1])\ns.put('k', b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    s.put('k', bytes(5000))\nexcept StorageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert "5,000 bytes" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    assert (tmp_path / "k").read_bytes() == b"old"


def test_disk_full_is_told_with_numbers(tmp_path: Path) -> None:
    error = explain_os(OSError(errno.ENOSPC, "No space left"), tmp_path / "a" / "b", "write", 123_456)
    assert isinstance(error, StorageError)
    assert "disk full" in str(error)
    assert "(123,456 bytes)" in str(error)
    assert "bytes are free" in str(error)


def test_importing_storage_loads_neither_boto3_nor_ray() -> None:
    code = (
        "import sys, distill_ray.storage, distill_ray.lease, distill_ray.registry\n"
        "print([m for m in ('boto3', 'ray', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_paused_holder_of_a_lock_is_told(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", 1.0):
        with pytest.raises(StorageError, match=r"lock locked for 0 s.*paused"), locked(tmp_path / "lock", 0.1):
            pass
        assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", 0.1):
        pass


class FaultyNet(ThreadingHTTPServer):
    """A relay to the S3 server that loses the answers it is told to lose."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.upstream = upstream.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lose: list[str] = []
        """Methods whose next answer is cut: a PUT's whole, a GET's in the middle of its body."""
        self.reset = False
        """Whether a cut GET ends with the connection reset."""
        self.damage = 0
        """Uploads still to come of which one byte is changed on the way."""


class Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyNet

    def relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "PUT" and body and self.server.damage:
            self.server.damage -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        upstream = http.client.HTTPConnection(self.server.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        lost = self.command in self.server.lose
        self.close_connection = lost
        if lost:
            self.server.lose.remove(self.command)
            if self.command == "PUT":
                return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if lost else data)
        if lost and self.server.reset:
            time.sleep(0.2)  # the client has the headers
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_PUT = do_HEAD = do_DELETE = relay

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def net(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyNet]:
    with FaultyNet(s3_server.endpoint) as relay:
        thread = threading.Thread(target=relay.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        yield relay
        relay.shutdown()


def test_a_conditional_write_whose_answer_was_lost_is_known_as_ours(net: FaultyNet, s3_uri: str) -> None:
    """The client asks again and meets its own object: 412, and yet it has won."""
    storage = open_storage(s3_uri)
    net.lose = ["PUT"]
    first = storage.put_if("k", b"1", None)
    assert storage.get_versioned("k") == (b"1", first)
    net.lose = ["PUT"]
    second = storage.put_if("k", b"2", first)
    assert storage.get_versioned("k") == (b"2", second)
    net.lose = ["PUT"]
    with pytest.raises(ConflictError):
        storage.put_if("k", b"3", first)
    assert net.lose == []


def test_a_check_outlasts_what_passes(net: FaultyNet, s3_uri: str) -> None:
    net.lose = ["PUT"] * 4  # twice what its client tries by itself
    check_access(s3_uri)
    assert net.lose == []


def test_an_error_that_breaks_off_is_asked_for_again(net: FaultyNet, s3_uri: str) -> None:
    """Its body comes before botocore's own handling: what breaks there is urllib3's error."""
    storage = open_storage(s3_uri)
    storage.put("k", b"1")
    net.lose, net.reset = ["GET", "GET"], True
    with pytest.raises(NotFoundError):
        storage.get("missing")
    assert net.lose == []


def test_a_body_that_breaks_off_is_asked_for_again(net: FaultyNet, s3_uri: str, tmp_path: Path) -> None:
    storage, data = open_storage(s3_uri), os.urandom(200_000)
    storage.put("k", data)
    net.lose = ["GET", "GET"]
    assert storage.get("k") == data
    net.lose = ["GET"]
    assert storage.get_range("k", 10, 100_000) == data[10:100_010]
    net.lose = ["GET"]
    storage.download("k", tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == data
    net.lose = ["GET"]
    with storage.open_input("k") as stream:
        assert stream.read() == data
    net.lose = ["GET"] * 10
    with pytest.raises(StorageError, match=r"cannot read s3://.*/k at http://127"):
        storage.get("k")
