"""Terraform over a copy of infra/terraform and a mock AWS of its own, on a free port of this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "infra" / "terraform"
_SERVICES = ("s3", "iam", "ec2", "eks", "ecr", "sts", "logs", "autoscaling")
_START_S = 120.0
VARIABLES = {
    "region": "us-east-1",
    "bucket": "acme-distill",
    "sources": ["acme-data/tickets/", "acme-models/"],
    "api_cidrs": ["203.0.113.0/24"],
}


def unavailable() -> str | None:
    """Why Terraform cannot be run here; None where it can."""
    if shutil.which("terraform") is None:
        return "terraform is not installed"
    config = os.environ.get("TF_CLI_CONFIG_FILE")
    if config and not Path(config).is_file():
        return f"TF_CLI_CONFIG_FILE={config}, which should name the mirror of plugins, is not there"
    return None


@contextmanager
def mock_aws(folder: Path) -> Iterator[str]:
    """A moto server in a process of its own; gives its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Terraform attaches AWS's own policies, which moto knows only when told to load them.
    environment = os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = folder / "moto.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/moto-api/data.json", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"moto_server did not answer at {url}: {log.read_text()[-2000:]}")


def _rule(name: str, where: str, action: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "status": "Enabled", "filter": {"prefix": where}, **action}


# What moto 5.2.5 lacks, laid over the modules for what is applied there; plans are made without it.
_LACKING: dict[str, dict[str, Any]] = {
    # Add-ons of EKS. And it makes up an SSH key for every node group, and tells a launch template's own tags as its
    # instances'.
    "modules/cluster": {
        "aws_eks_addon": {"vpc_cni": {"count": 0}},
        "aws_eks_node_group": {
            "this": {"lifecycle": {"ignore_changes": ["scaling_config[0].desired_size", "remote_access"]}}
        },
        "aws_launch_template": {"node": {"lifecycle": {"ignore_changes": ["tag_specifications"]}}},
    },
    # Sizes in a lifecycle's filter: it forgets them, and the provider waits for them in vain.
    "modules/store": {
        "aws_s3_bucket_lifecycle_configuration": {
            "artefacts": {
                "rule": [
                    _rule("checkpoints", "${var.root_prefix}/runs/", {"expiration": {"days": 180}}),
                    _rule("dead-letters", "${var.root_prefix}/dead-letters/", {"expiration": {"days": 90}}),
                    _rule("noncurrent", "", {"noncurrent_version_expiration": {"noncurrent_days": 30}}),
                    _rule("uploads", "", {"abort_incomplete_multipart_upload": {"days_after_initiation": 7}}),
                ]
            }
        }
    },
}


class Stack:
    """A copy of the project's Terraform that talks to `endpoint` alone.

    Args:
        folder: to be made.
        endpoint: of the mock AWS.
        applied: leave out what the mock lacks, so that it can be applied there.
    """

    def __init__(self, folder: Path, endpoint: str, *, applied: bool = False) -> None:
        self.folder = folder
        # init and applies of whoever works in the tree leave these behind.
        shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
        provider = {
            "access_key": "mock",
            "secret_key": "mock",
            "s3_use_path_style": True,
            "endpoints": dict.fromkeys(_SERVICES, endpoint),
        }
        self._override(".", {"provider": {"aws": provider}})
        for module, resources in _LACKING.items() if applied else ():
            self._override(module, {"resource": resources})
        (folder / "test.auto.tfvars.json").write_text(json.dumps(VARIABLES))

    def _override(self, module: str, content: dict[str, Any]) -> None:
        (self.folder / module / "test_override.tf.json").write_text(json.dumps(content))

    def edit(self, file: str, old: str, new: str) -> None:
        """Plant a fault."""
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new))

    def run(self, *arguments: str, fails: bool = False) -> str:
        """One command of Terraform; what it prints."""
        done = self.attempt(*arguments)
        assert (done.returncode != 0) == fails, f"terraform {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr if fails else done.stdout

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As `run`, whatever comes of it."""
        # Keys and profiles of whoever runs the tests never come into it.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1", "AWS_EC2_METADATA_DISABLED": "true"}
        environment |= {"TF_CLI_ARGS": "-no-color"}
        return subprocess.run(
            ["terraform", *arguments], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=500
        )

    def plan(self) -> dict[str, Any]:
        """What Terraform would make, as `terraform show -json` tells it."""
        self.run("plan", "-input=false", "-out=planned")
        return json.loads(self.run("show", "-json", "planned"))
