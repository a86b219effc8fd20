"""One run a week, however often it fires: names, the week itself, and creating the same run twice."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_ray import render
from distill_ray.arguments import parser
from distill_ray.config import iso_week
from distill_ray.errors import DistillError, UserError
from distill_ray.submit.naming import base_id
from tests.unit.render_fakes import images, of_kind, recipe_of, rendered

WEEKS = [
    ("2026-11-22", "2026-W47"),
    ("2026-11-23", "2026-W48"),
    ("2020-12-31", "2020-W53"),  # a year of 53 weeks
    ("2021-01-03", "2020-W53"),  # Sunday of the old year's last week
    ("2021-01-04", "2021-W01"),
    ("2024-12-30", "2025-W01"),  # Monday of the new year's first week
    ("2026-12-31", "2026-W53"),
    ("2027-01-03", "2026-W53"),
    ("2027-01-04", "2027-W01"),
]


def attempt(due: dt.datetime, name: str = "support-triage") -> str:
    """What KubeRay calls the cluster of a RayCronJob's job that was due then."""
    return f"{name}-{int(due.timestamp()) // 60}-x7k2p"


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


@pytest.mark.parametrize(("day", "week"), WEEKS)
def test_a_job_s_version_is_the_iso_week_of_its_start(day: str, week: str):
    assert iso_week(dt.date.fromisoformat(day)) == week
    assert render.version_of(attempt(at(f"{day}T02:00")), at(f"{day}T02:03")) == week
    assert render.version_of("", at(f"{day}T23:59")) == week


def test_the_week_is_utc_s():
    tokyo = dt.timezone(dt.timedelta(hours=9))
    assert render.version_of("", dt.datetime(2026, 11, 23, 8, 0, tzinfo=tokyo)) == "2026-W47"  # Sunday 23:00 UTC


def test_an_attempt_after_midnight_of_sunday_goes_on_with_its_week():
    due = at("2020-12-28T02:00")
    for started, week in (("2021-01-03T23:59", "2020-W53"), ("2021-01-04T01:30", "2020-W53")):
        assert render.version_of(attempt(due), at(started)) == week
    assert render.version_of(attempt(due), at("2021-01-04T02:00")) == "2021-W01"  # a week late: the next one's


def test_all_that_a_raycronjob_missed_is_one_run():
    mondays = [at("2026-11-09T02:00") + dt.timedelta(weeks=i) for i in range(3)]
    assert {render.version_of(attempt(due), at("2026-11-25T12:00")) for due in mondays} == {"2026-W48"}


def test_two_firings_of_a_week_are_one_run():
    monday = dt.date(2026, 12, 28)
    made = []
    for day in range(8):
        recipe = recipe_of(iso_week(monday + dt.timedelta(days=day)))
        job = of_kind(rendered("rayjob", recipe), "RayJob")
        made.append((job["metadata"]["name"], job["spec"]["jobId"], job["spec"]["entrypoint"].split("--version ")[1]))
    ids = [base_id(recipe_of(week)) for week in ("2026-W53", "2027-W01")]
    assert set(made[:7]) == {("demo-2026-w53", ids[0], "2026-W53 --address auto")}
    assert made[7][:2] == ("demo-2027-w01", ids[1])


def test_the_cronjob_starts_one_at_a_time_and_catches_up():
    spec = of_kind(rendered("cronjob", recipe_of(None)), "CronJob")["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("0 2 * * 1", "Etc/UTC", "Forbid")
    # A Monday that was missed is made up for until Sunday, and never after the next Monday.
    assert 5 * 86400 < spec["startingDeadlineSeconds"] < 7 * 86400


def test_the_cronjob_s_pod_gives_a_command_that_there_is():
    documents = rendered("cronjob", recipe_of(None), "--root", "s3://other/root", "--set", "train.epochs=3")
    pod = of_kind(documents, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = parser().parse_args(container["command"][1:])
    assert (arguments.command, arguments.kind, arguments.create) == ("render", "rayjob", True)
    assert (arguments.version, arguments.root, arguments.changes) == (None, "s3://other/root", ["train.epochs=3"])
    mounted = of_kind(documents, "ConfigMap")["metadata"]["name"]
    assert pod["volumes"] == [{"name": "recipe", "configMap": {"name": mounted}}]
    allowed = {(r, v) for rule in of_kind(documents, "Role")["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert allowed == {("rayjobs", "create"), ("configmaps", "create")}
    binding = of_kind(documents, "RoleBinding")
    assert binding["subjects"][0]["name"] == pod["serviceAccountName"]
    assert binding["roleRef"]["name"] == of_kind(documents, "Role")["metadata"]["name"]


def test_the_raycronjob_s_shell_finds_the_version(tmp_path: Path):
    entrypoint = of_kind(rendered("raycronjob", recipe_of(None)), "RayCronJob")["spec"]["jobTemplate"]["entrypoint"]
    stub = tmp_path / "distill-ray"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    shell = shutil.which("sh")
    assert shell is not None
    now = dt.datetime.now(dt.UTC)
    environment = {
        "PATH": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
        "RAY_CLUSTER_NAME": attempt(now - dt.timedelta(days=6)),
    }
    out = subprocess.run([shell, "-c", entrypoint], capture_output=True, text=True, check=True, env=environment)
    given = parser().parse_args(out.stdout.splitlines())
    assert (given.command, given.address) == ("run", "auto")
    assert given.version == iso_week((now - dt.timedelta(days=6)).date())


@pytest.mark.parametrize("kind", ["cronjob", "raycronjob"])
def test_a_stated_version_makes_no_weekly_job(kind: str):
    with pytest.raises(UserError, match="version='2026-W48' is stated, and a weekly job would do that one run again"):
        rendered(kind, recipe_of("2026-W48"))


@pytest.mark.parametrize("name", ["a" * 48, "7b-students", "support_triage", "a.b"])
def test_a_name_that_kubernetes_has_not_is_refused(name: str):
    with pytest.raises(UserError, match="cannot be the name of a RayJob"):
        rendered("rayjob", recipe_of(name={"is": name}))


def test_a_weekly_name_leaves_room_for_its_jobs():
    longest = "a" * 36
    weekly = recipe_of(None, name={"is": longest})
    assert of_kind(rendered("raycronjob", weekly), "RayCronJob")["metadata"]["name"] == longest
    # KubeRay appends the minute and refuses RayJobs of more than 47 characters.
    assert len(attempt(at("2026-11-23T02:00"), longest).rsplit("-", 1)[0]) <= 47
    assert of_kind(rendered("rayjob", weekly), "RayJob")
    with pytest.raises(UserError, match="at most 36 characters"):
        rendered("cronjob", recipe_of(None, name={"is": "a" * 37}))


def test_versions_that_differ_have_names_that_differ():
    names = {render.run_name(recipe_of(version)) for version in ("1.0", "1-0", "1_0", "v10")}
    assert len(names) == 4


@pytest.mark.parametrize("schedule", ["monday", "0 2 * *", "TZ=UTC 0 2 * * 1", "0 2 * * 1; rm"])
def test_a_schedule_that_is_none_is_refused(schedule: str):
    with pytest.raises(UserError, match=r"cluster.schedule.*is not five fields of cron"):
        recipe_of(cluster={"schedule": schedule})


class _Kubernetes(http.server.BaseHTTPRequestHandler):
    """As much of the API server as creating objects takes: names are taken once."""

    store: dict[str, dict[str, Any]]
    refusal: int | None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, query = self.path.partition("?")
        key = f"{path}/{body['metadata']['name']}"
        if self.headers["Authorization"] != "Bearer t0ken":
            status = 401
        elif self.refusal is not None:
            status = self.refusal
        elif "fieldValidation=Strict" not in query:
            status = 400
        else:
            status = 409 if key in self.store else 201
            self.store.setdefault(key, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b'{"message": "so it is"}')

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def kubernetes() -> Iterator[tuple[render.ApiServer, type[_Kubernetes]]]:
    handler = type("Handler", (_Kubernetes,), {"store": {}, "refusal": None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield render.ApiServer(f"http://127.0.0.1:{server.server_port}", "t0ken"), handler
        server.shutdown()
        thread.join()


def test_the_second_firing_creates_and_changes_nothing(kubernetes: tuple[render.ApiServer, type[_Kubernetes]]):
    server, handler = kubernetes
    first = rendered("rayjob", recipe_of())
    assert [line.rsplit(": ")[1] for line in render.create(first, server)] == ["created", "created"]
    assert sorted(handler.store) == [
        f"/api/v1/namespaces/distill-ray/configmaps/{of_kind(first, 'ConfigMap')['metadata']['name']}",
        "/apis/ray.io/v1/namespaces/distill-ray/rayjobs/demo-2026-w48",
    ]
    before = json.dumps(handler.store, sort_keys=True)
    other_image = {"pin_by_label": True} | images(tag=2)
    again = render.create(rendered("rayjob", recipe_of(cluster=other_image)), server)
    assert [line.rsplit(": ")[1] for line in again] == ["is there already, and left as it is"] * 2
    assert json.dumps(handler.store, sort_keys=True) == before
    render.create(rendered("rayjob", recipe_of("2026-W49")), server)
    assert sum("/rayjobs/" in key for key in handler.store) == 2


@pytest.mark.parametrize(("status", "error"), [(403, UserError), (404, UserError), (422, DistillError)])
def test_a_refusal_is_told_without_the_token(
    kubernetes: tuple[render.ApiServer, type[_Kubernetes]], status: int, error: type[Exception]
):
    server, handler = kubernetes
    handler.refusal = status
    with pytest.raises(error, match=rf"{status}.*so it is") as raised:
        render.create(rendered("rayjob", recipe_of()), server)
    assert "t0ken" not in str(raised.value)


def test_no_answer_is_an_error_for_the_cronjob_to_try_again():
    with pytest.raises(DistillError, match="does not answer at"):
        render.create(rendered("rayjob", recipe_of()), render.ApiServer("http://127.0.0.1:9", "t0ken"))


def test_create_is_for_a_run_in_a_pod(kubernetes: tuple[render.ApiServer, type[_Kubernetes]]):
    with pytest.raises(UserError, match="use it with --kind rayjob"):
        render.create(rendered("raycluster", recipe_of()), kubernetes[0])
    with pytest.raises(UserError, match="inside a pod"):
        render.ApiServer.of_this_pod()
