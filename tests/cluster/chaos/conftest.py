"""A real S3 server behind the fault proxy, a Ray cluster that reaches the store through it, and the calm run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.chaos.proxy import FaultProxy
from tests.s3server import S3Server
from tests.stages.cluster import private_cluster
from tests.stages.jobs import SHARED_CLUSTER, Job

SEED = 20_261_128
"""Of the proxy's dice."""


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """Relays; every process started from here reaches the store through it."""
    folder = tmp_path_factory.mktemp("proxy")
    with FaultProxy(s3_server, folder, seed=SEED) as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", started.endpoint)
        yield started


@pytest.fixture(scope="session")
def cluster_address(proxy: FaultProxy) -> Iterator[str]:
    """A cluster with 4 CPUs for `Job.call`."""
    with private_cluster() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv(SHARED_CLUSTER, address)
        yield address


@pytest.fixture(scope="session")
def calm(cluster_address: str, s3_root: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that nothing happened to."""
    job = Job(tmp_path_factory.mktemp("calm"), f"{s3_root}/calm", epochs=4)
    job.call()
    return job
