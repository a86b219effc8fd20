"""A small S3-like server, objects in memory, keys exact, with the shortcomings that some stores and policies have."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote
from xml.sax.saxutils import escape

import pytest

BUCKET = "bucket"


class OddS3(ThreadingHTTPServer):
    """Holds one bucket; `seen` lists the requests that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        """Method and path of each request, and the names of its checksum headers."""
        self.ignored: set[str] = set()
        """Condition headers, in lower case, that are taken for absent."""
        self.lists: str | None = None
        """The one prefix that may be listed: HEAD and GET then answer 403 where there is nothing."""
        self.refusals: dict[str, tuple[int, str, str]] = {}
        """HTTP status, code and message for a request that has a header whose name begins so."""
        self.parts: dict[int, bytes] = {}

    @contextmanager
    def serving(self) -> Iterator[OddS3]:
        """With the environment that leads a client here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{self.server_port}")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "any")
            thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            yield self
            self.shutdown()
            self.server_close()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OddS3

    def handle_any(self) -> None:
        path, _, query = self.path.partition("?")
        self.query = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        bucket, _, self.key = unquote(path[1:]).partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        names = sorted(name.lower() for name in self.headers)
        sums = [name for name in names if name.startswith(("x-amz-sdk-checksum", "x-amz-checksum-"))]
        self.server.seen.append(" ".join([self.command, path, *sums]))
        refused = [
            answer for start, answer in self.server.refusals.items() if any(name.startswith(start) for name in names)
        ]
        if refused:
            self.fail(*refused[0])
        elif bucket != BUCKET:
            self.fail(404, "NoSuchBucket")
        elif self.key:
            getattr(self, f"on_{self.command}")(body)
        elif self.command == "HEAD":
            self.fail(403, "AccessDenied")
        else:
            self.list()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def list(self) -> None:
        prefix, most = self.query.get("prefix", ""), int(self.query.get("max-keys", 1000))
        if not prefix.startswith(self.server.lists or ""):
            self.fail(403, "AccessDenied")
            return
        objects = self.server.objects
        rows = "".join(
            f"<Contents><Key>{quote(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_etag(objects[key]))}</ETag><Size>{len(objects[key])}</Size></Contents>"
            for key in sorted(key for key in objects if key.startswith(prefix))[:most]
        )
        self.answer(200, f"<ListBucketResult><EncodingType>url</EncodingType>{rows}</ListBucketResult>".encode())

    def on_PUT(self, body: bytes) -> None:
        old = self.server.objects.get(self.key)
        none, match = (
            None if name in self.server.ignored else self.headers.get(name) for name in ("if-none-match", "if-match")
        )
        if "partNumber" in self.query:
            self.server.parts[int(self.query["partNumber"])] = body
        elif (none and old is not None) or (match and (old is None or match != _etag(old))):
            self.fail(412, "PreconditionFailed")
            return
        else:
            self.server.objects[self.key] = body
        self.answer(200, etag=_etag(body))

    def on_POST(self, body: bytes) -> None:
        if "uploads" in self.query:
            self.server.parts = {}
            answer = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        else:
            numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)<", body)]
            self.server.objects[self.key] = b"".join(self.server.parts[number] for number in numbers)
            answer = b"<CompleteMultipartUploadResult/>"
        self.answer(200, answer)

    def on_GET(self, body: bytes) -> None:
        found = self.server.objects.get(self.key)
        if found is not None:
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            part = found[int(span[1]) : int(span[2]) + 1] if span else found
            self.answer(206 if span else 200, part, etag=_etag(found))
        elif self.server.lists is None:
            self.fail(404, "NoSuchKey")
        else:
            self.fail(403, "AccessDenied")

    on_HEAD = on_GET

    def on_DELETE(self, body: bytes) -> None:
        self.server.objects.pop(self.key, None)
        self.answer(204)

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>".encode())

    def answer(self, status: int, body: bytes = b"", etag: str = "") -> None:
        self.send_response(status)
        if etag:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", self.date_time_string(time.time()))
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
