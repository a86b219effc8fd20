"""Secrets stay where they were put; code and pickles that came with the data are not run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import distill_ray
from tests.assets import tiny_teacher_folder
from tests.cluster.chaos.outcome import assert_same_outcome
from tests.s3server import S3Server
from tests.stages.jobs import Job

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "PlantedAwsSecret0123456789abcdef",
    "HF_TOKEN": "hf_PlantedHubToken0123456789",
    "MY_DATABASE_PASSWORD": "PlantedPassword0123456789",
}


def holding(found: dict[str, bytes]) -> list[tuple[str, str]]:
    """(name, variable) of everything that holds a planted value."""
    return [(name, v) for name, data in found.items() for v, secret in PLANTED.items() if secret.encode() in data]


def test_no_secret_reaches_artefacts_reports_output_or_rays_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        S3Server(tmp_path / "s3", secret=PLANTED["AWS_SECRET_ACCESS_KEY"]) as server,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as logs,  # short: Ray's sockets lie in it
    ):
        for name, value in {**PLANTED, **server.env, "RAY_TMPDIR": logs}.items():
            monkeypatch.setenv(name, value)
        job = Job(tmp_path / "job", f"{server.root}/run", audit=2)
        printed = [job.run(timeout=900), job.run(command="status"), job.run(command="gc")]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        printed.append(job.run(code=2))
        client = server.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="test-bucket")
        keys = [each["Key"] for page in pages for each in page.get("Contents", [])]
        found = {key: client.get_object(Bucket="test-bucket", Key=key)["Body"].read() for key in keys}
        stored = len(found)
        found |= {str(path): path.read_bytes() for path in Path(logs).rglob("*") if path.is_file()}
        found |= {f"output {i}": (p.stdout + p.stderr).encode() for i, p in enumerate(printed)}
    assert {"report.json", "report.html", "lease.json", "README.md"} <= {key.rpartition("/")[2] for key in keys}
    assert any("worker" in name and data for name, data in found.items() if "/logs/" in name), "Ray wrote no logs"
    print(f"\n{stored} objects and {len(found) - stored} logs and outputs searched")
    assert holding(found) == []
    assert holding({"planted": b"x" + PLANTED["HF_TOKEN"].encode()}) == [("planted", "HF_TOKEN")]


REMOTE = """
import sys
from distill_ray import corpus, teacher
from distill_ray.config.sections import CaptureSection, TeacherSection
from distill_ray.model_config import model_shape
from distill_ray.student.build import build_initial
from pathlib import Path
folder, trust = sys.argv[1], sys.argv[2] == "True"
model_shape(Path(folder), trust)
corpus.load_tokenizer(folder, trust)
section = TeacherSection(model=folder, engine="transformers", use_gpu=False, trust_remote_code=trust)
teacher.open_engine(section, CaptureSection(top_k=4), 64)
"""


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_comes_with_a_model_runs_only_where_the_recipe_says_so(trust: bool, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_teacher_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(ran)!r}, 'w').close()\nclass Mine(LlamaConfig):\n    pass\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", REMOTE, str(folder), str(trust)], env=env, capture_output=True)
    assert ran.exists() is trust, done.stderr.decode()
    if not trust:
        assert done.returncode == 0, done.stderr.decode()


ALLOWED = {"capture/stages.py": {"pickle.loads"}}
"""What passes between the stages of one pipeline, through Ray's own memory, and never lies in storage."""
LOADERS = {"load", "loads", "Unpickler"}


def test_nothing_in_the_package_unpickles_what_lies_in_storage() -> None:
    root = Path(distill_ray.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr in LOADERS:
                name = f"{node.value.id}.{node.attr}"
                if node.value.id in ("torch", "pickle", "cloudpickle", "dill", "joblib", "np", "numpy", "marshal"):
                    found.setdefault(path.relative_to(root).as_posix(), set()).add(name)
    # DeepSpeed's own torch.load, which reads what `checkpoints.restore` verified, is shut off below.
    assert found == ALLOWED


class Poison:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self._marker), "w")


def test_a_poisoned_checkpoint_is_recognised_before_it_is_unpickled(calm: Job, tmp_path: Path) -> None:
    job, marker = Job(tmp_path, str(tmp_path / "root"), epochs=calm.epochs), tmp_path / "poisoned"
    process = job.start()
    while not any(name.startswith("checkpoint/") for name in job.published()):
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.kill_all()
    assert "student" not in job.published(), "killed too late"
    shards = list(Path(job.root, "runs/tiny/v1/checkpoints").rglob("*.pt"))
    assert shards
    for shard in shards:
        size, poison = shard.stat().st_size, pickle.dumps(Poison(marker))
        shard.write_bytes(poison + bytes(size - len(poison)))  # the listing shows the right size
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says of the rest
        torch.load(shards[0], weights_only=False)
    assert marker.exists(), "the poison would do nothing"
    marker.unlink()
    ran = job.call()
    assert "is broken and not used" in ran.stderr
    assert not marker.exists(), "a poisoned shard was unpickled"
    assert_same_outcome(job, calm)
