"""The main job on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stages.jobs import Job, wide_teacher

pytestmark = pytest.mark.timeout(1800)


def test_a_vllm_teacher_is_audited_and_teaches_on_a_real_s3_server(tmp_path: Path, s3_uri: str):
    small = {"teacher": wide_teacher(), "epochs": 1, "edits": {"unit_bytes = 2048": "unit_bytes = 8192"}}
    job = Job(tmp_path, s3_uri, engine="vllm", zero_stage=2, audit=4, **small)
    job.run()
    entry = job.published()["audit"]
    assert (entry["path"], entry["sequences"]) == ("vLLM's public path, in the capture", 4)
    assert job.report()["after"]["kl_t1"] < job.report()["before"]["kl_t1"]
    assert "model.safetensors" in job.exported()
    assert job.latest()["version"] == "v1"


@pytest.mark.long
def test_on_a_real_s3_server_with_zero_3(tmp_path: Path, s3_uri: str):
    job = Job(tmp_path, "somewhere/else", zero_stage=3, epochs=1)
    ran = job.run("--root", s3_uri)
    assert s3_uri in ran.stdout
    job.root = s3_uri
    assert job.report()["after"]["kl_t1"] < job.report()["before"]["kl_t1"]
    assert not (tmp_path / "somewhere").exists()
