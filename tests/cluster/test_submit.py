"""`distill-ray submit`, `logs`, `stop` and `status` against a real Ray cluster with token authentication."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import load_recipe
from distill_ray.submit.naming import attempt_id, base_id
from tests.cluster.head import Head, free_ports, head
from tests.stages.jobs import Job, Process

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]
MARKER = "marker-secret-6b1f0de2"
SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A head node, whose own environment holds no secret but its token; this process's has marked ones."""
    with head() as found, pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, MARKER)
        yield found


def ended(process: Process, code: int, timeout: float = 900) -> Process:
    found = process.wait(timeout)
    assert found == code, f"exit code {found}, not {code}:\n{process.stdout}\n{process.stderr}"
    return process


def until(what: Callable[[], Any], timeout: float = 600) -> Any:
    """What `what` answers, once it is true."""
    deadline = time.monotonic() + timeout
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.5)
    return found


def records(log: str, stage: str) -> list[dict[str, Any]]:
    """The progress lines of a stage in a job's log."""
    found = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [each for each in found if each.get("stage") == stage]


def version(name: str) -> dict[str, str]:
    """The edit that makes the recipe a run of its own: the tests share a cluster, and with it the ids of jobs."""
    return {'version = "v1"': f'version = "{name}"'}


class OnCluster:
    """A job's commands with the address of a cluster."""

    def __init__(self, job: Job, found: Head) -> None:
        self.job, self.head = job, found
        self.base = base_id(load_recipe(job.recipe))

    def start(self, command: str, *arguments: str) -> Process:
        return self.job.start(*arguments, "--address", self.head.address, command=command)

    def run(self, command: str, *arguments: str, code: int = 0) -> Process:
        return ended(self.start(command, *arguments), code)

    def ids(self) -> list[str]:
        """Submission ids of the run, in order."""
        return sorted(each for each in self.head.jobs() if each.startswith(self.base))

    def log(self, attempt: int = 1) -> str:
        return self.head.log(attempt_id(self.base, attempt))

    def training(self, attempt: int = 1) -> bool:
        """Whether the job has trained some steps; False ends the test where it failed."""
        status = self.head.jobs()[attempt_id(self.base, attempt)]["status"]
        assert status in ("PENDING", "RUNNING"), self.log(attempt)
        return any(each.get("done", 0) > 0 for each in records(self.log(attempt), "train"))


def no_marker(found: Head, root: str) -> None:
    """No secret of the submitter's in job metadata, runtime environments, logs, Ray's own files or artefacts."""
    assert MARKER not in json.dumps(found.jobs())
    looked = 0
    for top in (found.folder, Path(root)):
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink():
                looked += 1
                assert MARKER.encode() not in path.read_bytes(), path
    assert looked > 50


def test_submit_attach_detach_stop_and_resume(cluster: Head, tmp_path: Path):
    on = OnCluster(Job(tmp_path, str(tmp_path / "root"), epochs=40), cluster)

    both = [on.start("submit") for _ in range(2)]  # at once
    said = sorted(ended(each, 0).stdout.split()[0] for each in both)
    assert said == ["attached", "submitted"]
    assert on.ids() == [on.base]

    # Between the first steps and the stop nothing else is done: training would be over before it.
    waiting = on.start("submit", "--wait")
    status = on.run("status").stdout
    assert f"{on.base} at {cluster.address}: RUNNING" in status
    until(lambda: on.training() and '"stage": "train"' in waiting.stderr)
    waiting.signal(signal.SIGINT)
    stopped = on.run("stop").stdout
    assert f"{on.base}: STOPPED" in stopped
    ended(waiting, 130)
    assert f"attached to {on.base}" in waiting.stdout
    assert "the job goes on" in waiting.stderr
    assert re.search(r"distill-ray stop .*--version v1 --address http", waiting.stderr)
    status = on.run("status").stdout
    assert "STOPPED" in status
    assert "lease     given back" in status, status  # it stopped by itself, and was not killed
    logs = on.run("logs").stdout
    assert "SIGTERM: stopping train cleanly" in logs

    again = on.run("submit", "--wait")
    assert f"submitted {on.base}-r2" in again.stdout
    captures, trains = records(again.stderr, "capture"), records(again.stderr, "train")
    assert captures == []  # it was done
    first = next(each["done"] for each in trains if each["done"])
    assert first > 1
    assert [step for step, _ in on.job.losses()] == list(range(trains[-1]["total"]))
    assert "SUCCEEDED" in on.run("status").stdout
    assert "had ended before" in on.run("stop").stdout
    assert on.run("logs", "--follow").stdout == again.stdout.partition("\n")[2]

    no_marker(cluster, on.job.root)


def test_a_lost_driver_is_replaced_and_each_part_has_its_environment(cluster: Head, tmp_path: Path):
    """SIGKILL of the driver in training; teacher and student through interpreters of their own."""
    logs = {part: tmp_path / f"{part}.log" for part in ("teacher", "student")}
    for part, log in logs.items():
        script = tmp_path / f"{part}-python"
        script.write_text(f'#!/bin/sh\necho $$ >> {log}\nexec {sys.executable} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    sections = "\n".join(
        [
            "[cluster.environments]",
            *(f'{part} = {{ py_executable = "{tmp_path}/{part}-python" }}' for part in logs),
            "[cluster.submit]",
            "retries = 1",
            "retry_wait_s = 1.0",
            "[export]",
        ]
    )
    on = OnCluster(
        Job(tmp_path, str(tmp_path / "root"), epochs=20, edits={"[export]": sections} | version("lost")), cluster
    )
    waiting = on.start("submit", "--wait")
    until(lambda: on.ids() and on.training())
    before = {part: len(log.read_text().split()) for part, log in logs.items()}
    assert before["teacher"] >= 1
    assert before["student"] >= 2
    os.kill(driver_pid(cluster), signal.SIGKILL)
    ended(waiting, 0)
    assert on.ids() == [on.base, f"{on.base}-r2"]
    assert "submitted again in 1 s; 0 retries left" in waiting.stderr
    losses = on.job.losses("lost")
    assert [step for step, _ in losses] == list(range(len(losses)))
    after = {part: len(log.read_text().split()) for part, log in logs.items()}
    assert records(on.log(2), "capture") == []
    assert after["teacher"] <= before["teacher"] + 1  # the check asked what it has
    assert after["student"] > before["student"]
    no_marker(cluster, on.job.root)


def driver_pid(found: Head) -> int:
    """Process of the run's driver on the cluster."""
    for pid in found.process.members():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:5] == [b"-m", b"distill_ray", b"run", b"recipe.toml"]:
            return pid
    raise AssertionError("no driver")


def test_what_the_user_has_to_mend_ends_with_its_exit_code(cluster: Head, tmp_path: Path):
    retries = {"[export]": "[cluster.submit]\nretries = 3\n[export]"}
    job = Job(tmp_path, str(tmp_path / "root"), edits=retries | version("mend"))
    for path in job.data.iterdir():
        path.unlink()
    on = OnCluster(job, cluster)
    found = on.run("submit", "--wait", code=2)
    assert "exit code 2" in found.stderr
    assert "data/*.jsonl" in found.stdout  # the driver's own message
    assert on.ids() == [on.base]


def test_a_cluster_that_cannot_be_used_is_refused_before_anything_is_uploaded(
    cluster: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = OnCluster(Job(tmp_path / "small", str(tmp_path / "root"), edits=version("refused")), cluster)
    gpus = {"use_gpu = false\n[capture]": "tensor_parallel = 4\n[capture]"}
    large = OnCluster(Job(tmp_path / "large", str(tmp_path / "root"), edits=gpus | version("refused")), cluster)
    before = uploaded(cluster)
    cluster.put("/api/packages/gcs/_ray_pkg_of_this_test.zip", b"none")
    packages = until(lambda: (now := uploaded(cluster)) > before and now)  # what is sent is counted

    refused = large.run("submit", code=2).stderr
    assert "has 0 GPU(s) and 4 CPU(s) on 1 node(s)" in refused
    assert "needs 4 GPU" in refused
    assert "Traceback" not in refused

    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    for command in ("submit", "logs", "stop"):
        assert "refuses the token that was sent" in small.run(command, code=2).stderr
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))  # no token file either
    assert "asks for a token and none is known here; set RAY_AUTH_TOKEN" in small.run("submit", code=2).stderr
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in small.run("submit", code=2).stderr

    dead = ended(small.job.start("--address", f"http://127.0.0.1:{free_ports(1)[0]}", command="submit"), 2)
    assert "no Ray dashboard answers at" in dead.stderr
    assert "Traceback" not in dead.stderr
    assert uploaded(cluster) == packages
    assert small.ids() == []


def uploaded(found: Head) -> int:
    """How often the dashboard was sent a package."""
    logs = (path.read_text(errors="replace") for path in found.folder.rglob("dashboard*.log"))
    return sum(text.count("Uploading package") for text in logs)
