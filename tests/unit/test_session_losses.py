"""What the user is told when Ray loses a process or has no room for one; no cluster is started."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import state
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from distill_ray import session
from distill_ray.audit.remote import RemoteAuditor, remote_auditor
from distill_ray.capture.dataset import _own_error
from distill_ray.config.cluster import ClusterSection
from distill_ray.config.sections import TeacherSection
from distill_ray.errors import DistillError, UserError
from distill_ray.evaluate.scoring import score_remotely
from distill_ray.session import died, is_death, note_full, ray_session

OOM = OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory. The node was at 2.85GB used / 23.54GB limit\n"
    "OOM kill reason: Memory usage 3038769152B exceeded threshold of 505521248B\n"
    "Object store memory usage: [- objects spillable: 0\n- bytes spillable: 0]"
)


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("f", "Traceback of the worker\n  line two", cause)


@pytest.mark.parametrize(
    "error",
    [OOM, NodeDiedError("node gone"), WorkerCrashedError(), ActorDiedError(), ActorUnavailableError("busy", None)],
)
def test_every_way_in_which_ray_loses_a_process_is_told_with_what_to_do(error: Exception) -> None:
    assert is_death(error)
    found = _own_error(error)
    assert isinstance(found, DistillError)
    assert "capture process died" in str(found)
    assert "same command goes on" in str(found)


def test_memory_numbers_are_kept_and_the_object_stores_counters_are_not() -> None:
    said = str(died("it died", OOM))
    assert "2.85GB used / 23.54GB limit" in said
    assert "exceeded threshold of 505521248B" in said
    assert "spillable" not in said


def test_retries_are_counted_for_a_teacher_only() -> None:
    assert "and 4 retries of its unit" in str(_own_error(ActorDiedError()))
    assert "and retries of its unit" in str(_own_error(WorkerCrashedError()))


def test_an_engine_that_raises_at_its_start_keeps_its_traceback_and_is_not_called_out_of_memory() -> None:
    error = ActorDiedError(_task_error(AttributeError("a mistake of ours in the hook")))
    assert not is_death(error)
    found = _own_error(error)
    assert isinstance(found, DistillError)
    assert "a teacher could not be started" in str(found)
    assert "\n  line two" in str(found)
    assert "out of memory" not in str(found)


def test_an_error_raised_inside_a_process_is_no_death() -> None:
    ours, bug = UserError("correct the recipe"), _task_error(ValueError("a bug"))
    assert _own_error(_task_error(ours)) is ours
    assert _own_error(bug) is bug
    assert not is_death(bug)


def _cluster(
    monkeypatch: pytest.MonkeyPatch, free: dict[str, float], nodes: int = 1, labels: dict[str, str] | None = None
) -> None:
    names = [str(i) for i in range(nodes)]
    there = {"CPU": 16.0 / nodes, "GPU": 8.0 / nodes}
    nodes_of_ray = [{"NodeID": name, "Alive": True, "Labels": labels or {}, "Resources": there} for name in names]
    each = {name: n / nodes for name, n in free.items()}
    monkeypatch.setattr(ray, "nodes", lambda: nodes_of_ray)
    monkeypatch.setattr(state, "available_resources_per_node", lambda: dict.fromkeys(names, each))


def test_a_full_cluster_is_said_once_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 16.0})
    monkeypatch.setattr(session, "SAY_FULL_S", 0.3)
    said: list[str] = []
    note_full("a teacher", {"GPU": 2}, said.append, threading.Event())
    assert said == ["waiting for resources: a teacher needs 2 GPU; the cluster has 8 GPU (0 free)"]


def test_gpus_that_are_free_on_several_nodes_are_no_room_for_one_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 16.0, "GPU": 2.0}, nodes=2)
    monkeypatch.setattr(session, "SAY_FULL_S", 0.1)
    said: list[str] = []
    note_full("a teacher", {"GPU": 2}, said.append, threading.Event())
    assert said == ["waiting for resources: a teacher needs 2 GPU; the cluster has 8 GPU (2 free)"]


def test_gpus_of_nodes_with_another_label_are_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 16.0, "GPU": 8.0}, labels={"distill-ray/role": "student"})
    monkeypatch.setattr(session, "SAY_FULL_S", 0.1)
    said: list[str] = []
    note_full("a teacher", {"GPU": 2}, said.append, threading.Event(), {"distill-ray/role": "teacher"})
    assert said == [
        "waiting for resources: a teacher needs 2 GPU; the cluster has 0 GPU (0 free) on 0 node(s) labelled "
        "distill-ray/role=teacher"
    ]
    note_full("evaluation", {"GPU": 1}, pytest.fail, threading.Event(), {"distill-ray/role": "student"})


def test_the_clients_address_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"ray://head:10001: .* --address auto"), ray_session("ray://head:10001"):
        pass


def test_a_machine_too_busy_to_start_ray_is_told_so(monkeypatch: pytest.MonkeyPatch):
    def init(**_: Any) -> None:
        raise Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed"
        )

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(DistillError, match=r"did not start .* 30 s \(load \d+ on \d+ CPUs\); run the same"),
        ray_session("local"),
    ):
        pass


def test_evaluation_on_a_gpu_also_waits_for_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class _SaidError(Exception):
        pass

    def say(text: str) -> None:
        raise _SaidError(text)  # before anything is started

    _cluster(monkeypatch, {"GPU": 8.0})
    monkeypatch.setattr(session, "SAY_FULL_S", 0.1)
    monkeypatch.setattr(ray, "remote", lambda _: pytest.fail("started without a word"))
    recipe = SimpleNamespace(train=SimpleNamespace(use_gpu=True), cluster=ClusterSection())
    job: Any = SimpleNamespace(recipe=recipe)
    shown: Any = SimpleNamespace(note=say)
    with pytest.raises(_SaidError, match=r"evaluation needs 1 CPU and 1 GPU; the cluster has 16 CPU \(0 free\)"):
        score_remotely(job, shown, threading.Event())


def _asked(monkeypatch: pytest.MonkeyPatch, error: Exception) -> RemoteAuditor:
    """An auditor whose actor answers with an error of Ray's."""

    def get(reference: object) -> None:
        raise error

    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", get)
    actor = SimpleNamespace(score=SimpleNamespace(remote=lambda *_: object()))
    return RemoteAuditor(actor, threading.Event())


@pytest.mark.parametrize("error", [OOM, NodeDiedError("node gone"), ActorDiedError()])
def test_an_audit_that_loses_its_teacher_says_so_however_ray_lost_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with pytest.raises(DistillError, match=r"teacher's process died 2 times .*Usual causes: out of memory"):
        _asked(monkeypatch, error).score("unit", (0,))


def test_an_audits_teacher_that_raises_at_its_start_did_not_die(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ActorDiedError(_task_error(AttributeError("a mistake of ours")))
    with pytest.raises(DistillError, match="the audit's teacher could not be started") as caught:
        _asked(monkeypatch, error).score("unit", (0,))
    assert "\n  line two" in str(caught.value)
    assert "out of memory" not in str(caught.value)


def test_an_audit_waits_for_room_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class _SaidError(Exception):
        pass

    def say(text: str) -> None:
        raise _SaidError(text)  # before anything is started

    _cluster(monkeypatch, {"CPU": 16.0})
    monkeypatch.setattr(session, "SAY_FULL_S", 0.1)
    monkeypatch.setattr(ray, "remote", lambda _: pytest.fail("started without a word"))
    recipe: Any = SimpleNamespace(teacher=TeacherSection(model="/teacher", tensor_parallel=2), cluster=ClusterSection())
    nothing: Any = None
    with (
        pytest.raises(_SaidError, match="the audit's teacher needs 2 GPU"),
        remote_auditor(recipe, nothing, nothing, "vllm", nothing, threading.Event(), say),
    ):
        pass


def test_a_cluster_with_room_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 16.0, "GPU": 8.0})
    said: list[str] = []
    note_full("a teacher", {"GPU": 2}, said.append, threading.Event())
    assert said == []


def test_a_stop_ends_the_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    _cluster(monkeypatch, {"CPU": 16.0})
    monkeypatch.setattr(session, "SAY_FULL_S", 3600.0)
    said, stop = list[str](), threading.Event()
    threading.Timer(0.3, stop.set).start()
    note_full("a teacher", {"GPU": 2}, said.append, stop)
    assert said == []
