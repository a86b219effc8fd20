"""A whole run small enough for a test: the real command line in processes of its own, and ways to kill it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distill_ray import cli, targets
from distill_ray.lease import read_published
from distill_ray.storage import open_storage
from tests.assets import TINY_VOCAB, corpus_folder, tiny_llama_folder, tiny_teacher_folder
from tests.stages.apart import apart, forked, printing

MARK = "DISTILL_RAY_TEST_MARK"
SHARED_CLUSTER = "DISTILL_RAY_TEST_CLUSTER"
"""Environment variable with the address of the session's cluster (fixture `cluster_address`)."""

RECIPE = """
name = "tiny"
version = "v1"
[storage]
root = "{root}"
[corpus]
sources = ["{sources}"]
holdout = 0.2
window_tokens = 128
unit_bytes = 2048
[teacher]
model = "{teacher}"
engine = "{engine}"
dtype = "{dtype}"
use_gpu = false
[capture]
top_k = {top_k}
[audit]
sequences = {audit}
[student]
teacher_layers = [0]
[train]
epochs = {epochs}
global_batch_tokens = 1024
pack_tokens = 128
learning_rate = 1e-3
precision = "fp32"
workers = {{ min = 2, max = 2 }}
zero_stage = {zero_stage}
use_gpu = false
checkpoint_every = {checkpoint_every}
[export]
dtype = "float32"
licence = "apache-2.0"
[cost]
device_hour = {{ local = 2.0 }}
storage_gb_month = 0.02
[cost.serving]
tokens_per_request = 1000
teacher_million_tokens = 1.0
student_million_tokens = 0.1
horizon_days = 7
"""


def write_documents(path: Path, first: int, count: int, chars: int = 900) -> Path:
    """`count` documents of real prose, `chars` characters each, starting at the `first`-th piece."""
    text = "".join(
        json.loads(line)["text"] for part in sorted(corpus_folder().glob("*.jsonl")) for line in part.open("rb")
    )
    pieces = [text[i * chars : (i + 1) * chars] for i in range(first, first + count)]
    assert len(pieces[-1]) == chars, "not enough prose"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in pieces))
    return path


@dataclass
class Job:
    """One recipe in a folder, and the command line over it."""

    folder: Path
    root: str
    zero_stage: int = 1
    epochs: int = 2
    top_k: int = 16
    checkpoint_every: int = 3
    engine: str = "transformers"
    dtype: str = "float32"
    audit: int = 0
    """Sequences audited before training; a run of its own loads the teacher a second time for them."""
    edits: dict[str, str] = field(default_factory=dict)
    """Text of the recipe → what replaces it."""
    teacher: Path = field(default_factory=tiny_teacher_folder)

    def __post_init__(self) -> None:
        self.data = self.folder / "data"
        if not self.data.exists():
            write_documents(self.data / "a.jsonl", 0, 12)
            write_documents(self.data / "b.jsonl", 12, 12)
        self.recipe = self.folder / "recipe.toml"
        names = ("root", "teacher", "engine", "dtype", "top_k", "epochs", "zero_stage", "checkpoint_every", "audit")
        text = RECIPE.format(sources=self.data / "*.jsonl", **{k: getattr(self, k) for k in names})
        for old, new in self.edits.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        self.recipe.write_text(text)

    def start(self, *arguments: str, command: str = "run") -> Process:
        """The command in a process group of its own."""
        return Process([sys.executable, "-m", "distill_ray", command, str(self.recipe), *arguments])

    def run(self, *arguments: str, command: str = "run", code: int = 0, timeout: float = 1200) -> Process:
        """The command in processes of its own, Ray included, to its end, which must be exit code `code`."""
        process = self.start(*arguments, command=command)
        found = process.wait(timeout)
        assert found == code, f"exit code {found}, not {code}:\n{process.stdout}\n{process.stderr}"
        return process

    def ask(self, *arguments: str, command: str = "run") -> tuple[int, Called]:
        """Exit code and output of the command line on the session's cluster, in a process with all imports done."""
        out, err, argv = self._on_the_cluster(command, *arguments)
        found = apart(printing, out, err, cli.main, argv)
        return found, Called(out.read_text("utf-8"), err.read_text("utf-8"))

    def kill_once(self, there: Callable[[], object], poll_s: float = 0.01) -> None:
        """The driver of a run on the session's cluster, SIGKILLed as soon as `there` gives something true."""
        out, err, argv = self._on_the_cluster("run")
        with forked(printing, out, err, cli.main, argv) as (process, _):
            while not there():
                assert process.is_alive(), err.read_text("utf-8")
                time.sleep(poll_s)

    def _on_the_cluster(self, command: str, *arguments: str) -> tuple[Path, Path, list[str]]:
        """Files for the output of a command on the session's cluster, and its arguments."""
        out, err = self.folder / f"{uuid.uuid4().hex}.out", self.folder / f"{uuid.uuid4().hex}.err"
        return out, err, [command, str(self.recipe), *arguments, "--address", os.environ[SHARED_CLUSTER]]

    def call(self, *arguments: str, command: str = "run", code: int = 0) -> Called:
        """What `ask` shows of a command that must end with exit code `code`."""
        found, called = self.ask(*arguments, command=command)
        assert found == code, f"exit code {found}, not {code}:\n{called.stdout}\n{called.stderr}"
        return called

    def published(self, version: str = "v1") -> dict[str, dict[str, Any]]:
        return read_published(open_storage(self.root), f"runs/tiny/{version}")

    def report(self, version: str = "v1") -> dict[str, Any]:
        return json.loads(open_storage(self.root).get(f"runs/tiny/{version}/report.json"))

    def losses(self, version: str = "v1") -> list[tuple[int, float]]:
        """(step, loss) of every line of the run's metrics."""
        lines = open_storage(self.root).get(f"runs/tiny/{version}/metrics.jsonl").decode().splitlines()
        return [(m["step"], m["loss"]) for m in map(json.loads, lines)]

    def latest(self) -> dict[str, Any]:
        """What `latest.json` says."""
        return json.loads(open_storage(self.root).get("models/tiny/latest.json"))

    def _model(self, version: str) -> str:
        return self.published(version)["export"]["key"].rpartition("/")[0]

    def model(self, version: str = "v1") -> Path:
        """The exported folder under a local root."""
        return Path(self.root, self._model(version))

    def exported(self, version: str = "v1") -> dict[str, int]:
        """The exported folder's files and sizes, as its manifest has them; each is checked to be there."""
        storage = open_storage(self.root)
        prefix = self._model(version)
        files = json.loads(storage.get(f"{prefix}/manifest.json"))["files"]
        for file in files:
            data = storage.get(f"{prefix}/{file['name']}")
            assert hashlib.sha256(data).hexdigest() == file["sha256"], file["name"]
        return {f["name"]: f["size"] for f in files}

    def unit_objects(self) -> list[Path]:
        """The target objects under a local root."""
        found = Path(self.root, "targets").rglob("*.parquet")
        return sorted(p for p in found if p.parent.name != "index" and not p.name.startswith("."))

    def rows(self, version: str = "v1") -> list[tuple[str, int, bytes, bytes]]:
        """(unit, sequence, tokens, packed rows) of everything the run uses, sorted, doubles kept."""
        storage = open_storage(self.root)
        manifest = targets.read_run_manifest(storage, self.published(version)["targets"])
        found = []
        for unit in manifest.units:
            stored = targets.read_unit(storage, manifest.fingerprint, unit.unit, expect_sha256=unit.object_sha256)
            for i in range(len(unit.lengths)):
                sequence = stored.sequence(i)
                found.append((unit.unit, i, sequence.tokens.tobytes(), sequence.packed_NB.tobytes()))
        return sorted(found)


def started(stage: str) -> str:
    """What standard error shows once a stage has begun."""
    return f'"stage": "{stage}", "event": "start"'


def wide_teacher() -> Path:
    """128 wide, because vLLM's CPU attention takes no head of 16."""
    return tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)


def assert_same_outcome(job: Job, calm: Job, *, relative: float) -> None:
    """Same rows, none twice; one metrics line a step; same losses; same figures."""
    rows, expected = ([row[:3] for row in run.rows()] for run in (job, calm))
    assert rows == expected
    assert len({(unit, i) for unit, i, _ in rows}) == len(rows)
    assert [s for s, _ in job.losses()] == [s for s, _ in calm.losses()]
    assert [v for _, v in job.losses()] == pytest.approx([v for _, v in calm.losses()], rel=relative)
    assert job.report()["after"]["kl_t1"] == pytest.approx(calm.report()["after"]["kl_t1"], rel=relative)
    latest, calm_latest = ([r.exported(), r.latest()["version"]] for r in (job, calm))
    assert latest[1] == calm_latest[1] == "v1"
    assert latest[0].keys() == calm_latest[0].keys()
    # A doubled or half-written object would stand beside those of the calm run.
    assert [p.name for p in job.unit_objects()] == [p.name for p in calm.unit_objects()]


@dataclass(frozen=True)
class Called:
    """What a command printed that ran on the session's cluster."""

    stdout: str
    stderr: str


class Process:
    """A started command whose whole process tree can be killed at once."""

    def __init__(self, command: list[str]) -> None:
        self.mark = uuid.uuid4().hex
        self._popen = subprocess.Popen(
            command,
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._out: list[str] = []
        self._err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, kept), daemon=True)
            for stream, kept in ((self._popen.stdout, self._out), (self._popen.stderr, self._err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, kept: list[str]) -> None:
        kept.extend(iter(stream.readline, ""))

    @property
    def stdout(self) -> str:
        return "".join(self._out)

    @property
    def stderr(self) -> str:
        return "".join(self._err)

    def poll(self) -> int | None:
        return self._popen.poll()

    def wait(self, timeout: float) -> int:
        try:
            code = self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {timeout} s:\n{self.stdout}\n{self.stderr}") from None
        for reader in self._readers:
            reader.join(60)
        return code

    def wait_for(self, text: str, timeout: float = 600) -> bool:
        """Until `text` stands on standard error; False when the process ends first."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            if self.poll() is not None:
                return text in self.stderr
            assert time.monotonic() < deadline, f"{text!r} not seen in {timeout} s:\n{self.stderr}"
            time.sleep(0.02)
        return True

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def members(self) -> list[int]:
        """Every live process that descends from the command, whoever adopted it."""
        wanted, found = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return found

    def gone(self, timeout: float = 300) -> list[int]:
        """Processes that are still there when the wait for all to go is over."""
        deadline = time.monotonic() + timeout
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def kill_all(self) -> int:
        """SIGKILL the driver first, then all that descends from it; returns how many there were."""
        killed: set[int] = set()
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            killed.add(self.pid)
        for _ in range(50):
            rest = [p for p in self.members() if p != self.pid]
            for pid in rest:
                try:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                except ProcessLookupError:
                    continue
            if not rest:
                break
            time.sleep(0.1)
        self._popen.wait(120)
        return len(killed)
