"""Volumes that fill up: an error with numbers and remedy, nothing lost, and the same command finishes with room."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_ray.storage import open_storage
from tests.assets import tiny_teacher_folder
from tests.cluster.chaos.outcome import assert_same_outcome
from tests.stages.jobs import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

FULL = r"disk full: cannot \w+ \S+.*?[\d,]+ of [\d,]+ bytes are free.*free some space or choose another folder"


class Volume:
    """A file system of its own with a limit on its bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def limit(self, size: int) -> None:
        """Mount it with, or change it to, so many bytes."""
        change = "remount," if self.folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{change}size={size}", "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")

    def release(self) -> None:
        if self.folder.is_mount():
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "volume")
    yield made
    made.release()


def stored_bytes(job: Job, prefix: str) -> int:
    return sum(info.size for info in open_storage(job.root).list(prefix))


@pytest.mark.parametrize("stage", ["capture", "train"])
def test_a_full_artefact_store(stage: str, calm: Job, volume: Volume, tmp_path: Path) -> None:
    targets = stored_bytes(calm, "targets/")
    # Every file takes whole pages of 4 KiB.
    volume.limit(targets // 2 if stage == "capture" else 2 * targets + stored_bytes(calm, "runs/") // 4)
    job = Job(tmp_path / "job", str(volume.folder / "root"), epochs=calm.epochs)
    stopped = job.run(code=2, timeout=600)
    assert re.search(FULL, stopped.stderr), stopped.stderr
    assert f'"stage": "{stage}", "event": "start"' in stopped.stderr
    assert "Traceback" not in stopped.stderr
    before = {path: path.stat().st_mtime_ns for path in job.unit_objects()}
    assert before
    volume.limit(1 << 30)
    job.call()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was whole is not made again"
    assert_same_outcome(job, calm)


def test_a_full_disk_under_the_checkpoints_on_their_way(
    calm: Job, volume: Volume, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume.limit(256 << 10)
    job = Job(tmp_path / "job", str(tmp_path / "root"), epochs=calm.epochs)
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(volume.folder))
        patch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets and logs would lie there, too
        stopped = job.run(code=2, timeout=600)
        assert re.search(FULL, stopped.stderr), stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert not any(name.startswith("checkpoint/") for name in job.published())
        volume.limit(1 << 30)
        job.run(timeout=600)
    assert_same_outcome(job, calm)


def test_a_full_disk_under_staged_weights(
    calm: Job, volume: Volume, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"{s3_uri}/teacher")
    for path in tiny_teacher_folder().iterdir():
        storage.upload(path, path.name)
    volume.limit(160 << 10)  # its tokenizer fits, its weights do not
    job = Job(tmp_path / "job", f"{s3_uri}/root", epochs=calm.epochs)
    text = job.recipe.read_text()
    job.recipe.write_text(text.replace(str(tiny_teacher_folder()), f"{s3_uri}/teacher"))
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(volume.folder))
        stopped = job.run(code=2)
        assert re.search(r"needs [\d,]+ more bytes and its disk has [\d,]+ free.*XDG_CACHE_HOME", stopped.stderr)
        assert "Traceback" not in stopped.stderr
        volume.limit(1 << 30)
        job.run(timeout=900)  # DeepSpeed's operator is compiled anew, into this cache
    assert_same_outcome(job, calm)
