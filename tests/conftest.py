"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.s3server import S3Server

# The same examples each time: what judges a change is the change. Suite `random` draws others.
settings.register_profile("steady", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("steady")


def pytest_configure(config: pytest.Config) -> None:
    """What a machine shared by several test processes asks for, set before torch and Ray are imported."""
    # Ray runs its workers at niceness 15, where whatever else the machine does takes nearly all time from them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Threads of one process would wait for each other busily while another process has the core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the session, with the AWS_* variables set that lead to it."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def s3_root(s3_server: S3Server) -> str:
    """`s3://bucket` on the session's server."""
    return s3_server.root


@pytest.fixture
def s3_uri(s3_root: str) -> str:
    """A prefix of its own for one test."""
    return f"{s3_root}/{uuid.uuid4().hex[:12]}"
