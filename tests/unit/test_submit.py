"""Submitting a run: ids, what travels, who attaches, what is tried again, and what is refused before an upload."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.runtime_env import RuntimeEnv

from distill_ray.config import Recipe, load_recipe, parse_recipe
from distill_ray.errors import DistillError, UserError
from distill_ray.submit import LogView, Submitted, connect, describe, submit, wait
from distill_ray.submit.naming import attempt_id, attempt_of, attempts, base_id
from distill_ray.submit.package import lay_out, recipe_toml
from distill_ray.submit.room import missing, needs
from tests.unit.submit_fakes import FakeClient, node

REPO = Path(__file__).parents[2]
MARKER = "marker-secret-0f3a9c"


def recipe(name: str = "tiny", version: str = "v1", **sections: dict[str, Any]) -> Recipe:
    stated: dict[str, Any] = {
        "storage": {"root": "s3://bucket/root"},
        "corpus": {"sources": ["s3://bucket/data/*.parquet"]},
        "teacher": {"model": "s3://bucket/teacher", "tensor_parallel": 4},
        "student": {"teacher_layers": [0]},
        "train": {"workers": {"min": 8, "max": 8}},
    }
    merged = {key: stated.get(key, {}) | sections.get(key, {}) for key in stated | sections}
    return parse_recipe({"name": name, "version": version, **merged})


# ---- ids


def test_an_id_follows_from_name_and_version_alone():
    assert base_id(recipe()) == base_id(recipe(train={"workers": {"min": 2, "max": 2}}))
    assert len({base_id(recipe("a-b", "c")), base_id(recipe("a", "b-c")), base_id(recipe("a", "b"))}) == 3
    long = [base_id(recipe("n" * 63, "v" * 62 + end)) for end in "ab"]
    assert long[0] != long[1]
    for found in (*long, base_id(recipe("support-triage", "2026-W48"))):
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,89}", found)
    assert base_id(recipe("support-triage", "2026-W48")).startswith("support-triage-2026-W48-")


def test_later_jobs_of_a_run_are_numbered():
    base = base_id(recipe())
    assert [attempt_of(attempt_id(base, n), base) for n in (1, 2, 10)] == [1, 2, 10]
    others = [f"{base}-r1", f"{base}-r02", f"{base}-rx", f"{base}x-r2", "raysubmit_1", None]
    assert attempts([f"{base}-r10", base, f"{base}-r9", *others], base) == [1, 9, 10]


# ---- what travels


@pytest.mark.parametrize("path", sorted((REPO / "jobs/recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipe_that_travels_reads_back_as_it_was_understood_here(path: Path, tmp_path: Path):
    here = load_recipe(path, root="s3://other/root", version="2026-W48")
    there = tmp_path / "elsewhere.toml"
    there.write_text(recipe_toml(here))
    assert load_recipe(there) == here


def test_strings_of_any_kind_travel():
    tricky = recipe(teacher={"model": 's3://b/"q"\\\n\x7fé…😀'}, corpus={"sources": ["s3://b/[x]=#'.jsonl"]})
    assert 's3://b/\\"q\\"' in recipe_toml(tricky)  # reading it back is part of recipe_toml


def test_code_and_recipe_travel_and_no_secret_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, MARKER)
    env = lay_out(recipe(), tmp_path)
    assert set(env) == {"working_dir", "py_modules", "env_vars"}
    assert set(env["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    [code] = map(Path, env["py_modules"])
    assert code.name == "distill_ray"
    assert (code / "submit/package.py").read_bytes() == (REPO / "distill_ray/submit/package.py").read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".py", ".toml"}
    assert not [path for path in files if MARKER.encode() in path.read_bytes()]
    assert [path.name for path in Path(env["working_dir"]).iterdir()] == ["recipe.toml"]


# ---- teacher and student apart


@pytest.mark.parametrize(
    "stated", [{"py_executable": "/opt/teacher/bin/python"}, {"pip": ["vllm==0.33"]}, {"conda": "teacher"}, {}]
)
def test_an_environment_is_one_that_ray_takes(stated: dict[str, Any]):
    environment = recipe(cluster={"environments": {"teacher": stated}}).cluster.environments.teacher
    assert environment.runtime_env() == stated
    RuntimeEnv(**environment.runtime_env())
    assert environment.options() == ({"runtime_env": stated} if stated else {})


def test_two_ways_to_one_environment_are_refused():
    with pytest.raises(UserError, match=r"cluster\.environments\.student.*pip and conda are ways to the same thing"):
        recipe(cluster={"environments": {"student": {"pip": ["x"], "conda": "y"}}})


# ---- submit or attach


def test_the_driver_goes_to_the_head_node_and_asks_for_nothing():
    client = FakeClient()
    assert submit(client, recipe()) == Submitted(base_id(recipe()), False, "export")
    [request] = client.requests
    assert request["entrypoint"] == "exec python -m distill_ray run recipe.toml --address auto"
    assert not [name for name in request if name.startswith("entrypoint_")]


def test_the_driver_goes_where_its_labels_say_and_asks_for_no_gpu():
    market = {"ray.io/market-type": "on-demand"}
    client = FakeClient([node(GPU=16.0, CPU=16.0), node(labels=market, CPU=2.0)])
    submit(client, recipe(cluster={"submit": {"driver_labels": market, "driver_cpus": 0.5}}), "train")
    [request] = client.requests
    assert request["entrypoint"] == "exec python -m distill_ray train recipe.toml --address auto"
    asked = {name: value for name, value in request.items() if name.startswith("entrypoint_")}
    assert asked == {"entrypoint_label_selector": market, "entrypoint_num_cpus": 0.5}


def test_a_second_submit_attaches_and_a_submit_after_the_end_is_a_new_job():
    client, base = FakeClient(), base_id(recipe())
    submit(client, recipe(), "train")
    assert submit(client, recipe()) == Submitted(base, True, "train")
    for n, status in enumerate(("FAILED", "STOPPED", "SUCCEEDED"), 2):
        client.set(attempt_id(base, n - 1), status)
        assert submit(client, recipe()) == Submitted(attempt_id(base, n), False, "export")
    assert len(client.requests) == 4


def test_two_submitters_at_once_make_one_job():
    client, both = FakeClient(), threading.Barrier(2)

    def meet() -> None:  # neither has seen the other's job when it submits
        if len(client.jobs) == 0:
            both.wait(120)

    client.on_list = meet
    found: list[Submitted] = []
    threads = [threading.Thread(target=lambda: found.append(submit(client, recipe()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(each.attached for each in found) == [False, True]
    assert [r["submission_id"] for r in client.requests] == [base_id(recipe())]


def test_a_running_job_of_another_recipe_is_not_attached_to():
    client = FakeClient()
    submit(client, recipe())
    with pytest.raises(UserError, match=r"RUNNING for tiny/v1, with another recipe .*s3://bucket/root"):
        submit(client, recipe(capture={"top_k": 32}))
    with pytest.raises(UserError, match="with another recipe"):
        submit(client, recipe(storage={"root": "s3://other"}))
    assert submit(client, recipe(train={"workers": {"min": 4, "max": 4}})).attached  # placement alone


def test_a_cluster_without_enough_gpus_is_refused_before_anything_is_packed():
    client = FakeClient([node(CPU=8.0, GPU=2.0), node(CPU=8.0, GPU=3.0), node("DEAD", CPU=64.0, GPU=64.0)])
    with pytest.raises(UserError) as refused:
        submit(client, recipe())
    text = str(refused.value)
    assert "has 5 GPU(s) and 16 CPU(s) on 2 node(s)" in text
    assert "teacher.replicas.min=1 needs 4 GPU on each of its nodes, 1 time(s); there is room for 0" in text
    assert "train.workers.max=8 needs 1 CPU and 1 GPU" in text
    assert "there is room for 5" in text
    assert "cluster.submit.grows_to" in text
    assert client.requests == []


def test_nodes_that_may_come_count_once_and_by_their_role():
    grows = [
        {"nodes": 2, "gpus": 4, "cpus": 8, "role": "teacher"},
        {"nodes": 1, "gpus": 8, "cpus": 8, "role": "student"},
    ]
    sections: dict[str, Any] = {"cluster": {"pin_by_label": True, "submit": {"grows_to": grows}}}
    head, there = node(CPU=2.0), node(labels={"distill-ray/role": "teacher"}, CPU=8.0, GPU=4.0)
    submit(FakeClient([head, there]), recipe(**sections))
    teachers = {"teacher": {"replicas": {"min": 3, "max": 3}}}
    with pytest.raises(UserError, match=r"labelled distill-ray/role=teacher, 3 time\(s\); there is room for 2"):
        submit(FakeClient([head, there]), recipe(**sections, **teachers))


def test_pinned_parts_do_not_count_the_others_nodes():
    pinned = recipe(cluster={"pin_by_label": True})
    client = FakeClient([node(labels={"distill-ray/role": "student"}, CPU=64.0, GPU=64.0)])
    with pytest.raises(UserError, match="labelled distill-ray/role=teacher") as refused:
        submit(client, pinned)
    assert "train.workers" not in str(refused.value)


def test_an_elastic_group_and_a_cpu_recipe_need_only_their_least():
    small = recipe(
        teacher={"use_gpu": False, "replicas": {"min": 0, "max": 64}},
        train={"use_gpu": False, "workers": {"min": 1, "max": 8}},
    )
    assert [(need.count, dict(need.each)) for need in needs(small)] == [(1, {"CPU": 0.5}), (1, {"CPU": 1.0})]
    submit(FakeClient([node(CPU=1.0)]), small)
    assert missing([], []) == []


# ---- the log, and the end


def lines(*records: dict[str, Any]) -> list[str]:
    return [json.dumps(record) for record in records]


def progress(stage: str, event: str, done: int, **more: Any) -> dict[str, Any]:
    return {"time": 0.0, "stage": stage, "event": event, "done": done, "total": 10, "unit": "steps", **more}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_go_where_the_driver_would_have_put_them():
    out, err = io.StringIO(), io.StringIO()
    view = LogView(out, err)
    records = lines(progress("train", "progress", 3, loss=1.5), {"stage": "check", "event": "note", "note": "ok"})
    for line in (*records, "a table", '{"not": "ours"}', "{broken"):
        view.feed(line)
    assert err.getvalue().splitlines() == records
    assert out.getvalue().splitlines() == ["a table", '{"not": "ours"}', "{broken"]


def test_a_terminal_gets_bars():
    out, err = io.StringIO(), Terminal()
    view = LogView(out, err)
    restart = [progress("train", "progress", 6), progress("train", "progress", 4)]  # a group went back
    for line in lines(
        {"stage": "check", "event": "note", "note": "storage: fine"},
        progress("capture", "start", 0),
        progress("capture", "end", 10),
        progress("train", "start", 0),
        *restart,
        {"stage": "train", "event": "note", "note": "settling"},
        progress("train", "progress", 8, loss=1.25),
    ):
        view.feed(line)
    view.close()
    shown = err.getvalue()
    for text in ("check: storage: fine", "capture", "10/10", "train: settling", "8/10", "loss 1.25"):
        assert text in shown
    assert out.getvalue() == ""


def ended(client: FakeClient, section: dict[str, Any] | None = None) -> tuple[int, list[float]]:
    """Exit code of `submit --wait` on a cluster where the first job is on its way, and the pauses it made."""
    pauses: list[float] = []
    job = recipe(cluster={"submit": {"retry_wait_s": 7.0, **(section or {})}})
    code = wait(client, job, submit(client, job), view=LogView(io.StringIO(), io.StringIO()), sleep=pauses.append)
    return code, pauses


def finishing(*outcomes: tuple[str, int | None]) -> FakeClient:
    """A cluster on which the run's jobs end like this, one after the other, as soon as they are submitted."""
    client, queue = FakeClient(), list(outcomes)
    plain = client.submit_job

    def submit_job(**request: Any) -> str:
        found = plain(**request)
        status, code = queue.pop(0)
        client.set(found, status, driver_exit_code=code)
        return found

    client.submit_job = submit_job  # type: ignore[method-assign]
    return client


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 1, 1),
        ("FAILED", -9, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_drivers(status: str, code: int | None, found: int):
    assert ended(finishing((status, code))) == (found, [])


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_the_user_has_to_mend_is_not_tried_again(code: int):
    assert ended(finishing(("FAILED", code)), {"retries": 5}) == (code, [])


def test_a_lost_driver_is_followed_by_another_and_a_stopped_one_is_not():
    lost: tuple[str, int | None] = ("FAILED", None)
    client = finishing(lost, ("FAILED", -9), ("SUCCEEDED", 0))
    assert ended(client, {"retries": 2}) == (0, [7.0, 7.0])
    assert [r["submission_id"] for r in client.requests] == [attempt_id(base_id(recipe()), n) for n in (1, 2, 3)]
    assert ended(finishing(lost, lost), {"retries": 1}) == (1, [7.0])
    assert ended(finishing(lost, ("STOPPED", None)), {"retries": 5}) == (130, [7.0])


def test_a_broken_connection_loses_no_line_and_doubles_none(monkeypatch: pytest.MonkeyPatch):
    client, out = FakeClient(), io.StringIO()
    submitted = submit(client, recipe())
    client.logs[submitted.submission_id] = ["one\ntw", "o\nthree\n", "four"]
    client.set(submitted.submission_id, "SUCCEEDED", driver_exit_code=0)
    client.breaks = 1
    assert wait(client, recipe(), submitted, view=LogView(out, io.StringIO())) == 0
    assert out.getvalue().splitlines() == ["one", "two", "three", "four"]


def test_where_the_job_stands_is_one_line():
    client = FakeClient()
    assert describe(client, recipe()) == "no job of this run at http://head:8265"
    submit(client, recipe())
    client.set(base_id(recipe()), "FAILED", driver_exit_code=3, start_time=1000, end_time=61000)
    assert describe(client, recipe()) == f"{base_id(recipe())} at http://head:8265: FAILED with exit code 3, took 60 s"


# ---- what is no dashboard


@pytest.fixture
def answering() -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """A web server that answers everything with the first of a list of (status, body), and its address."""
    answers: list[tuple[int, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "answer",
    [
        (404, "nothing here"),
        (200, "<html>hello</html>"),
        (200, "{}"),
        (200, "[1]"),
        (200, '{"ray_version": 3}'),
        (500, "x"),
    ],
)
def test_a_server_that_is_no_ray_dashboard_is_said_to_be_none(answer: tuple[int, str], answering: Any):
    address, answers = answering
    answers.append(answer)
    with pytest.raises(UserError, match=rf"{address} is no Ray dashboard .*port 8265"):
        connect(address)


def test_a_dead_address_and_one_of_another_kind_name_the_remedy(answering: Any, monkeypatch: pytest.MonkeyPatch):
    # What Ray itself would do: take RAY_ADDRESS, which answers, for the address that was given.
    monkeypatch.setenv("RAY_ADDRESS", answering[0])
    with pytest.raises(UserError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:9: .*port 8265"):
        connect("http://127.0.0.1:9")
    for address in ("ray://head:10001", "head:8265", "auto"):
        with pytest.raises(UserError, match="give its http:// address"):
            connect(address)


def test_a_page_that_is_missing_is_an_error(answering: Any):
    address, answers = answering
    answers += [(200, '{"ray_version": "2.60.0"}')]
    with pytest.raises(UserError, match="is no Ray dashboard"):  # it has a version and no jobs
        connect(address)
    assert issubclass(UserError, DistillError)
