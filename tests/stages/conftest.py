"""The Ray cluster that stage tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distill_ray.session import ray_session
from tests.stages.cluster import private_cluster
from tests.stages.jobs import SHARED_CLUSTER

DEAREST = ("test_pipeline", "test_s3", "test_audit", "test_capture", "test_train")
"""Files by themselves longer than most of the others together: begun last, one would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dearest files first; the others stay as they are."""
    items.sort(key=lambda item: DEAREST.index(item.path.stem) if item.path.stem in DEAREST else len(DEAREST))


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """A cluster with 4 CPUs for `Job.call`; commands that `Job.run` starts have one of their own."""
    with private_cluster() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv(SHARED_CLUSTER, address)
        yield address


@pytest.fixture(scope="session")
def ray_cluster(cluster_address: str) -> Iterator[None]:
    """This process connected to the shared cluster, once (`tests.stages.apart` says why)."""
    with ray_session(cluster_address):
        yield
