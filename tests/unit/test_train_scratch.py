"""Local folders of workers: gone at the end, gone after a kill, never taken from a process that lives."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from distill_ray.storage import StorageError
from distill_ray.train import scratch
from distill_ray.train.scratch import Scratch, writing_under

_HOLD = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from pathlib import Path
from distill_ray.train.scratch import Scratch
with Scratch("save") as folder:
    Path(folder, "state.pt").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "_SETTLED_S", -1.0)


def _holder(tmp_path: Path) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_gone_with_its_use(tmp_path: Path) -> None:
    with Scratch("save") as folder:
        assert Path(folder).parent == tmp_path
        Path(folder, "state.pt").write_bytes(b"0")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    living, used = _holder(tmp_path)
    killed, left = _holder(tmp_path)
    with Scratch("restore"):
        assert (used / "state.pt").exists()
        assert (left / "state.pt").exists()
    killed.send_signal(signal.SIGKILL)
    killed.wait(120)
    assert (left / "state.pt").exists()
    with Scratch("restore"):
        assert not left.exists()
        assert (used / "state.pt").exists()
    living.communicate("", timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_just_made_may_not_be_locked_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_SETTLED_S", 60.0)
    fresh = tmp_path / "distill-ray-scratch-save-x"
    fresh.mkdir()
    with Scratch("save"):
        assert fresh.exists()


def test_a_full_disk_is_told_with_numbers_whatever_its_writer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"disk full: cannot write .* bytes are free"), writing_under(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match="a bug"), writing_under(tmp_path):
        raise RuntimeError("a bug")
    monkeypatch.setattr(scratch, "free_bytes", lambda folder: 4096)
    with pytest.raises(StorageError, match="disk full"), writing_under(tmp_path):
        raise RuntimeError("unexpected pos 576 vs 534")  # as torch says it
    with pytest.raises(StorageError, match="disk full"), writing_under(tmp_path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
