"""The fault proxy (microburst) in front of the real S3 server, with its dice seeded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.s3server import S3Server

# microburst draws from Python's global generator and has no option for its seed.
_MAIN = (
    "import random, sys; random.seed(int(sys.argv.pop(1))); import microburst.forward as f;"
    # It drops every Content-Length, which leaves a HEAD without the size of its object.
    "f.HOP_BY_HOP -= {'content-length'}; from microburst.cli import main; sys.exit(main())"
)

Rule = dict[str, Any]


class FaultProxy:
    """`with FaultProxy(server, folder, seed=1) as p:` gives `p.env`: the AWS_* variables that lead through it.

    Without rules it only relays. It keeps its port, so an outage is `stop()` and later `start()`.
    """

    def __init__(self, server: S3Server, folder: Path, *, seed: int) -> None:
        self._server, self._log, self._seed = server, folder / "microburst.log", seed
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.env = {**server.env, "AWS_ENDPOINT_URL": self.endpoint}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start, or start again, without rules, and wait until it answers."""
        command = [sys.executable, "-c", _MAIN, str(self._seed)]
        command += ["--upstream", self._server.endpoint, "--port", str(self._port), "--resign"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **self._server.env}, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._control("GET", "health")
                return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, "microburst does not answer"
                time.sleep(0.05)

    def stop(self) -> None:
        """SIGKILL: connections break off, and new ones are refused."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def rules(self, *rules: Rule) -> None:
        """These instead of those before; the count of faults begins anew."""
        self._control("POST", "rules", [{"service": "s3", **rule} for rule in rules])
        self._control("DELETE", "fired")

    def fired(self) -> Counter[str]:
        """Faults since `rules`, by operation (the last 2,000)."""
        return Counter(str(event["operation"]) for event in self._control("GET", "fired?limit=2000"))

    def requests(self) -> int:
        """Requests since the start."""
        return int(self._control("GET", "health")["requests_seen"])

    def _control(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"{self.endpoint}/_microburst/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)
