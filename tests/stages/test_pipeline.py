"""The main job through the command line: killed, again, next week, and with another recipe."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.stages.jobs import Job, assert_same_outcome, started, write_documents

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("cluster_address")]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("done")
    job = Job(folder, str(folder / "root"))
    job.call()
    return job


def test_a_run_killed_while_it_captures_and_while_it_trains_ends_as_the_calm_one(done: Job, tmp_path: Path):
    """The drivers alone die here, on a cluster that lives on; `make test-all SUITES=kill` kills all processes."""
    job = Job(tmp_path, str(tmp_path / "root"))
    job.kill_once(job.unit_objects)
    stored = {p: p.stat().st_mtime_ns for p in job.unit_objects()}
    assert 0 < len(stored) < len(done.unit_objects()), "the kill must fall among the units"
    job.kill_once(lambda: "checkpoint/step-00000003" in job.published(), poll_s=0.05)
    assert "student" not in job.published(), "the kill must fall among the steps"
    job.call()
    assert {p: p.stat().st_mtime_ns for p in stored} == stored, "nothing whole is captured again"
    assert_same_outcome(job, done, relative=1e-5)
    assert job.rows() == done.rows(), "the reference engine moves no bit"


def test_the_report_tells_teacher_before_and_after(done: Job):
    report = done.report()
    for who in ("teacher", "before", "after"):
        assert set(report[who]) >= {"perplexity", "kl_t1", "top1_agreement", "ece", "acceptance"}
    assert report["after"]["kl_t1"] < report["before"]["kl_t1"]
    assert report["teacher"]["kl_t1"] == pytest.approx(0, abs=1e-6)
    assert report["teacher"]["top1_agreement"] == 1
    assert {"capture", "train"} <= set(report["timings"]["seconds"])


def test_the_report_tells_what_every_stage_held_and_when_the_student_has_paid(done: Job):
    found = done.report()["cost"]
    usage = {each["stage"]: each for each in found["usage"]}
    assert list(usage) == ["capture", "train", "evaluate"]
    for each, processes in zip(usage.values(), (1, 2, 1), strict=True):
        assert (each["node_type"], each["device"], each["processes"]) == ("local", "CPU process", processes)
        assert each["busy_s"] > 0
        assert each["start_s"] > 0
    assert usage["capture"]["done"] == len(done.unit_objects())
    assert usage["train"]["done"] == len(done.losses())
    assert usage["train"]["tokens"] == done.report()["tokens"]["supervised_train"]
    held = sum(each[name] for each in usage.values() for name in ("start_s", "busy_s", "idle_s"))
    assert found["cpu_process_hours"] == pytest.approx(held / 3600)
    assert found["dollars"]["total"] == pytest.approx(2.0 * held / 3600)
    per_million = 2.0 * sum(usage["capture"][n] for n in ("start_s", "busy_s", "idle_s")) / 3600
    assert found["dollars_per_million_teacher_tokens"] == pytest.approx(per_million / usage["capture"]["tokens"] * 1e6)
    paid = found["dollars"]["total"] + found["storage"]["dollars_per_month"] * 7 / 30.4375
    assert found["break_even"]["requests_per_day"] == pytest.approx(paid / (7 * 0.0009))
    page = Path(done.root, "runs/tiny/v1/report.html").read_text()
    assert "Usage and cost" in page
    assert "requests a day on, the student has paid for itself" in page


def test_again_recomputes_nothing(done: Job):
    def snapshot() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in Path(done.root).rglob("*") if p.is_file()}

    before = snapshot()
    again = done.call()
    assert snapshot() == before
    assert "student before" in again.stdout
    assert "process hours on CPUs in 1 command(s), $" in again.stdout
    assert "requests a day on, the student has paid" in again.stdout


def test_status_and_inspect_read_the_finished_run(done: Job):
    shown = done.run(command="status").stdout
    assert shown.count("done") == 4
    assert re.search(r"cost +capture .* CPU process hours .*, train .*, evaluate .*, \$0\.\d\d in 1 command", shown)


def test_another_recipe_under_the_same_version_is_refused(done: Job):
    other = Job(done.folder, done.root, top_k=8)
    refused = other.call(code=2)
    assert "capture.top_k: 16 → 8" in refused.stderr
    assert "--version" in refused.stderr
    Job(done.folder, done.root)  # puts the recipe back


def test_next_week_captures_only_the_new_file(done: Job):
    objects = {p: p.stat().st_mtime_ns for p in done.unit_objects()}
    old_units = {unit for unit, *_ in done.rows()}
    write_documents(done.data / "c.jsonl", 24, 4)
    noted = done.call()
    assert "came after this version" in noted.stdout
    done.call("--version", "v2", command="capture")
    units = {unit for unit, *_ in done.rows("v2")}
    fresh = set(done.unit_objects()) - set(objects)
    assert units > old_units
    assert {p.stem for p in fresh} == units - old_units
    assert {p: p.stat().st_mtime_ns for p in objects} == objects
    assert done.published("v2")["targets"]["captured"] == len(units - old_units)


def test_bounds_and_licence_changed_afterwards_are_judged_anew_and_nothing_is_computed(done: Job):
    def computed() -> dict[str, int]:
        folders = ("targets", "runs/tiny/v1/student", "runs/tiny/v1/checkpoints")
        return {str(p): p.stat().st_mtime_ns for f in folders for p in Path(done.root, f).rglob("*") if p.is_file()}

    before, figures = computed(), done.report()["after"]
    edits = {"[export]": "[evaluate]\nrequire = { kl_t1 = 1e-6 }\n[export]", '"apache-2.0"': '"mit"'}
    evaluated = Job(done.folder, done.root, edits=edits).call(command="evaluate", code=3)
    assert "student before" in evaluated.stdout
    stricter = Job(done.folder, done.root, edits=edits).call(code=3)
    assert "after.kl_t1" in stricter.stderr
    assert done.report()["gate"]["kl_t1"]["passed"] is False
    assert done.latest()["version"] is None, "a version that misses its bounds is taken back"
    card = (done.model() / "README.md").read_text()
    assert 'license: "mit"' in card
    assert str(done.folder) not in card
    assert "misses 1 bound(s)" in Job(done.folder, done.root, edits=edits).run(command="status").stdout
    # As a driver leaves it that is killed between the export and the decision on latest.
    record = Path(done.root, "runs/tiny/v1/lease.json")
    fields = json.loads(record.read_text())
    del fields["published"]["latest"]
    record.write_text(json.dumps(fields))
    Job(done.folder, done.root).call()
    assert done.latest()["version"] == "v1"
    assert done.latest()["entry"]["sha256"] == done.published()["export"]["sha256"]
    assert done.report()["after"] == figures
    assert computed() == before


def test_checkpoints_of_an_exported_run_go_with_gc_and_nothing_is_computed_again(done: Job):
    checkpoints, student = Path(done.root, "runs/tiny/v1/checkpoints"), done.published()["student"]
    assert any(checkpoints.rglob("*.pt"))
    done.run("--days", "0", "--delete", command="gc")
    assert not [path for path in checkpoints.rglob("*") if path.is_file()]
    assert "all stands" in done.run(command="status").stdout
    done.call()
    assert done.published()["student"] == student


@pytest.mark.long
def test_other_prices_are_reckoned_anew_and_nothing_is_computed(done: Job):
    before = done.report()
    Job(done.folder, done.root, edits={"local = 2.0": "local = 6.0"}).call()
    after = done.report()
    assert after["after"] == before["after"]
    assert after["cost"]["cpu_process_hours"] == before["cost"]["cpu_process_hours"]
    assert after["cost"]["dollars"]["total"] == pytest.approx(3 * before["cost"]["dollars"]["total"])
    Job(done.folder, done.root).call()
    assert done.report()["cost"]["dollars"] == before["cost"]["dollars"]


@pytest.mark.long
def test_a_week_of_other_text_is_warned_of_and_a_missed_bound_leaves_latest_where_it_is(done: Job, tmp_path: Path):
    lines = (json.dumps({"text": f"{i * i} {i} " * 120}) + "\n" for i in range(30))
    Path(tmp_path, "data").mkdir()
    Path(tmp_path, "data", "numbers.jsonl").write_text("".join(lines))
    bounds = '[evaluate]\ndrift_warn = 0.05\nrequire = { kl_t1 = 1e-6, "after.ece" = { max_rise = 0.01 } }\n[export]'
    job = Job(tmp_path, done.root, epochs=1, edits={"[export]": bounds})
    latest = done.latest()
    assert latest["version"] == "v1"
    week = job.call("--version", "v3", code=3)
    assert "missed evaluate.require: after.kl_t1" in week.stderr
    assert "it is kept, but not as latest" in week.stderr
    assert re.search(r"note +the corpus drifted: held_out_token_js = 0\.\d+ nats against v1", week.stdout)
    assert re.search(r"note +not judged: after\.ece .*other held-out sequences", week.stdout)
    assert done.latest() == latest
    assert done.model("v3").joinpath("model.safetensors").exists()
    assert "misses 1 bound(s)" in job.run("--version", "v3", command="status").stdout


def test_a_finished_run_answers_without_its_sources_and_mends_what_is_cheap(done: Job, tmp_path: Path):
    copied = Job(tmp_path, str(tmp_path / "root"))
    shutil.copytree(done.root, copied.root)
    page, latest = Path(copied.root, "runs/tiny/v1/report.html"), Path(copied.root, "models/tiny/latest.json")
    wanted, published = page.read_bytes(), copied.published()
    for path in copied.unit_objects():
        path.unlink()
    for file in (page, latest):
        file.write_bytes(b"damaged")
        copied.call()
    assert copied.unit_objects() == [], "no teacher is paid for to write a page"
    assert page.read_bytes() == wanted
    assert copied.latest()["entry"]["sha256"] == published["export"]["sha256"]
    for path in copied.data.iterdir():
        path.unlink()
    assert "could not look for new corpus units" in copied.call().stdout
    Path(copied.root, published["targets"]["key"]).unlink()
    assert "is published but missing" in copied.call().stdout


@pytest.mark.long
@pytest.mark.parametrize(("stage", "number"), [("capture", signal.SIGTERM), ("train", signal.SIGINT)])
def test_a_signal_stops_cleanly_and_says_how_to_resume(stage: str, number: int, tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"), epochs=40 if stage == "train" else 1)
    process = job.start()
    assert process.wait_for(started(stage))
    time.sleep(2)
    process.signal(number)
    assert process.wait(300) == 130, process.stderr
    assert re.search(r"resume with:\n  .*run .*--version v1\n", process.stderr), process.stderr
    assert "Traceback" not in process.stderr
    assert process.gone() == [], "processes left behind"
    assert "student" not in job.published()


def test_two_drivers_at_once_one_works_and_one_refuses(tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"), epochs=1)
    with ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda _: job.ask(command="capture"), range(2)))
    (code, worked), (refusal, refused) = sorted(found, key=lambda each: each[0])
    assert (code, refusal) == (0, 2), worked.stderr + refused.stderr
    assert "epoch" in refused.stderr
    assert "Traceback" not in refused.stderr
