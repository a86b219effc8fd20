"""A cluster's Jobs API in memory: what Ray promises of submission ids, status and logs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus


class FakeClient:
    """Jobs run when told to.

    Args:
        nodes: as the dashboard lists them.
    """

    def __init__(self, nodes: list[dict[str, Any]] | None = None) -> None:
        self.jobs: dict[str, JobDetails] = {}
        self.requests: list[dict[str, Any]] = []
        self.logs: dict[str, list[str]] = {}
        self.breaks = 0
        """How many more times a connection to a log breaks after its first chunk."""
        self.nodes = nodes or [node(CPU=64.0, GPU=16.0)]
        self.on_list: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def get_address(self) -> str:
        return "http://head:8265"

    def list_jobs(self) -> list[JobDetails]:
        found = list(self.jobs.values())
        self.on_list()
        return found

    def submit_job(self, **request: Any) -> str:
        submission_id = request["submission_id"]
        with self._lock:
            if submission_id in self.jobs:
                raise RuntimeError(f"500: Job with submission_id {submission_id} already exists. Please use another")
            self.requests.append(request)
            self.set(submission_id, "RUNNING", metadata=request["metadata"])
        return submission_id

    def set(self, submission_id: str, status: str, **fields: Any) -> None:
        before = self.jobs.get(submission_id)
        kept = {"metadata": before.metadata} if before else {}
        self.jobs[submission_id] = JobDetails(
            type="SUBMISSION",
            submission_id=submission_id,
            status=JobStatus(status),
            entrypoint="",
            **{**kept, **fields},
        )

    def get_job_info(self, submission_id: str) -> JobDetails:
        return self.jobs[submission_id]

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        for i, chunk in enumerate(self.logs.get(submission_id, [])):
            if i and self.breaks:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield chunk

    def read(self, endpoint: str) -> dict[str, Any]:
        assert endpoint.startswith("/api/v0/nodes")
        return {"result": {"result": self.nodes}}


def node(state: str = "ALIVE", labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    """A row of the dashboard's list."""
    return {"state": state, "resources_total": resources, "labels": labels or {}}
