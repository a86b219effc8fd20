"""By what every case is judged: nothing lost, nothing doubled, and the losses of the calm run."""

from __future__ import annotations

import pytest

from distill_ray.storage import open_storage
from tests.stages.jobs import Job


def target_objects(job: Job) -> list[str]:
    """Keys of the target objects, wherever the root is."""
    keys = (info.key for info in open_storage(job.root).list("targets/"))
    return sorted(key for key in keys if key.endswith(".parquet") and "/index/" not in key)


def assert_same_outcome(job: Job, calm: Job, *, relative: float = 1e-5) -> None:
    """Same rows to the byte, none twice; one metrics line a step; same losses, figures and exported files."""
    rows = job.rows()
    assert rows == calm.rows()
    assert len({(unit, i) for unit, i, *_ in rows}) == len(rows)
    assert target_objects(job) == target_objects(calm)
    assert [step for step, _ in job.losses()] == [step for step, _ in calm.losses()]
    assert [loss for _, loss in job.losses()] == pytest.approx([loss for _, loss in calm.losses()], rel=relative)
    assert job.report()["after"]["kl_t1"] == pytest.approx(calm.report()["after"]["kl_t1"], rel=relative)
    assert job.exported().keys() == calm.exported().keys()
    assert job.latest()["version"] == "v1"
