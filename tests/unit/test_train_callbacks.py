"""What Ray Train is told of a group that ended, and what `check` says of a range of workers."""

from __future__ import annotations

import pytest
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo

from distill_ray.config import parse_recipe
from distill_ray.preflight import Finding
from distill_ray.preflight.check import _batches
from distill_ray.train.callbacks import Leave
from distill_ray.train.preemption import LEFT

INFO = PreemptionInfo(1, {"node": [1]})


def status(*workers: WorkerStatus) -> WorkerGroupPollStatus:
    return WorkerGroupPollStatus(dict(enumerate(workers)))


@pytest.mark.parametrize("info", [INFO, None])
def test_a_group_that_left_is_started_again_without_counting_as_a_failure(info: PreemptionInfo | None) -> None:
    left = WorkerStatus(False, return_value=LEFT, preemption_info=info)
    with pytest.raises(PreemptionError) as found:
        Leave().after_worker_group_poll_status(status(left, left))
    assert found.value.preemption_info.preempted_ranks == ([1] if info else [])
    policy = DefaultFailurePolicy(FailureConfig(max_failures=0, max_preemption_failures=1))
    decisions = [policy.make_decision(found.value) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


@pytest.mark.parametrize(
    "other",
    [
        WorkerStatus(True, preemption_info=INFO),
        WorkerStatus(False, preemption_info=INFO),
        WorkerStatus(False, error=RuntimeError("died"), preemption_info=INFO),
    ],
    ids=["running", "finished", "failed"],
)
def test_a_group_that_has_not_left_as_a_whole_is_ray_trains_own_affair(other: WorkerStatus) -> None:
    Leave().after_worker_group_poll_status(status(WorkerStatus(False, return_value=LEFT, preemption_info=INFO), other))


@pytest.mark.parametrize(
    ("workers", "fact"),
    [
        ((8, 8), "64 packs a step, 8 micro-batch(es) on each of 8"),
        (
            (4, 8),
            "64 packs a step, 8 micro-batch(es) on each of 8; with 4 to 8 workers at most 9% of them idle, with 7",
        ),
        ((1, 2), "64 packs a step, 32 micro-batch(es) on each of 2; with 1 to 2 workers at most 0% of them idle"),
    ],
)
def test_what_idles_among_a_range_of_workers_is_said(workers: tuple[int, int], fact: str) -> None:
    recipe = parse_recipe(
        {
            "name": "t",
            "storage": {"root": "root"},
            "corpus": {"sources": ["x"]},
            "teacher": {"model": "m"},
            "student": {"teacher_layers": [0]},
            "train": {"workers": {"min": workers[0], "max": workers[1]}},
        }
    )
    assert _batches(recipe) == Finding("batches", fact)
