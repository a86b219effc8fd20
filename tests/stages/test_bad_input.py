"""Bad input: each gets one clear message with the remedy, before anything expensive starts, and loses nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill_ray import targets
from distill_ray.config import load_recipe
from distill_ray.errors import UserError
from distill_ray.preflight import check
from tests.assets import tiny_llama_folder, tiny_teacher_folder
from tests.stages.jobs import Job

pytestmark = pytest.mark.usefixtures("cluster_address")


def refused(job: Job) -> str:
    with pytest.raises(UserError) as caught:
        check(load_recipe(job.recipe))
    return str(caught.value)


def test_a_right_recipe_passes(tmp_path: Path):
    findings = check(load_recipe(Job(tmp_path, str(tmp_path / "root")).recipe))
    assert [f.what for f in findings] == ["batches", "packages", "storage", "corpus", "teacher", "student", "hardware"]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        ({'data/*.jsonl"]': 'data/*.parquet"]'}, ["*.parquet", "no file matches"]),
        (
            {"use_gpu = false\n[capture]": "use_gpu = false\ntensor_parallel = 3\n[capture]"},
            ["tensor_parallel=3", "4 "],
        ),
        ({"unit_bytes = 2048": "unit_bytes = 200000000"}, ["corpus.unit_bytes=200000000", "use at most"]),
        ({"holdout = 0.2": 'holdout = 0.2\nformat = "messages"'}, ["needs ['messages']"]),
        ({"holdout = 0.2": "holdout = 0"}, ["corpus.holdout=0"]),
        ({"teacher_layers = [0]": "teacher_layers = [0, 7]"}, ["[0, 7]", "0 to 1"]),
        ({"min = 2, max = 2": "min = 3, max = 3"}, ["8 pack(s)", "3 worker(s)"]),
    ],
)
def test_what_a_recipe_gets_wrong(edits: dict[str, str], expected: list[str], tmp_path: Path):
    message = refused(Job(tmp_path, str(tmp_path / "root"), edits=edits))
    for part in expected:
        assert part in message, message


def test_k_above_the_vocabulary(tmp_path: Path):
    folder = tiny_llama_folder(vocab=300)
    job = Job(tmp_path, str(tmp_path / "root"), top_k=400, teacher=folder)
    assert "capture.top_k=400 exceeds the teacher's vocabulary of 300 tokens" in refused(job)


def test_a_window_longer_than_the_teachers_context(tmp_path: Path):
    edits = {
        "window_tokens = 128": "window_tokens = 1000000",
        "pack_tokens = 128": "pack_tokens = 1000000",
        "global_batch_tokens = 1024": "global_batch_tokens = 2000000",
    }
    assert "the teacher's context is" in refused(Job(tmp_path, str(tmp_path / "root"), edits=edits))


def test_a_student_with_another_vocabulary(tmp_path: Path):
    other = tiny_llama_folder(vocab=2048)
    job = Job(tmp_path, str(tmp_path / "root"), edits={"teacher_layers = [0]": f'model = "{other}"'})
    message = refused(job)
    assert "512" in message
    assert "2,048" in message or "2048" in message


def test_a_teacher_without_weights(tmp_path: Path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "holds no weights" in refused(Job(tmp_path, str(tmp_path / "root"), teacher=folder))


def test_missing_teacher_folder(tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"), teacher=tmp_path / "nowhere")
    assert "nowhere" in refused(job)


def test_empty_corpus(tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"))
    for path in job.data.glob("*.jsonl"):
        path.write_text("")
    assert "corpus is empty: 2 source(s), 0 bytes" in refused(job)


@pytest.mark.parametrize(
    ("environment", "root", "expected"),
    [
        ({}, "s3://no-such-bucket-here/x", "no-such-bucket-here"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, None, "the secret key does not belong to the access key"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, None, "127.0.0.1:9"),
    ],
    ids=["wrong bucket", "wrong keys", "endpoint down"],
)
def test_an_unusable_store(
    environment: dict[str, str],
    root: str | None,
    expected: str,
    s3_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    job = Job(tmp_path, root or s3_uri)
    done = subprocess.run(
        [sys.executable, "-m", "distill_ray", "check", str(job.recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


AWKWARD = [
    b'{"text": "caf\xff\xfe not UTF-8"}\n',
    b'{"text": ""}\n',
    b'{"other": "column"}\n',
    b"not json\n",
    b'{"text": "' + b"all work and no play makes Jack a dull boy. " * 24_000 + b'"}\n',
]


@pytest.mark.long
def test_awkward_documents_are_dead_letters_and_the_long_one_is_captured(tmp_path: Path):
    job = Job(tmp_path, str(tmp_path / "root"), edits={"[capture]": "[capture]\nmax_refused = 1.0"})
    for path in job.data.glob("*.jsonl"):
        path.unlink()
    (job.data / "awkward.jsonl").write_bytes(b"".join(AWKWARD))
    job.call(command="capture")
    letters = Path(job.root, "dead-letters/tiny/v1.jsonl").read_text().splitlines()
    assert len(letters) == 4, letters
    for reason in ("UTF-8", "empty", "text", "JSON"):
        assert any(reason in letter for letter in letters), (reason, letters)
    assert sum(len(tokens) // 4 for _, _, tokens, _ in job.rows()) > 300_000


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    Job(folder, str(folder / "root")).call(command="capture")
    return folder


def copy_of(captured: Path, tmp_path: Path) -> Job:
    shutil.copytree(captured / "root", tmp_path / "root")
    shutil.copytree(captured / "data", tmp_path / "data")
    return Job(tmp_path, str(tmp_path / "root"))


@pytest.mark.long
def test_a_truncated_target_file_is_seen_and_only_its_unit_captured_again(captured: Path, tmp_path: Path):
    job = copy_of(captured, tmp_path)
    victim = job.unit_objects()[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    mended = job.call(command="capture")
    assert "1 of 12 target objects missing or cut short" in mended.stderr
    assert job.published()["targets"]["captured"] == 1
    assert targets.inspect(job.root + "/runs/tiny/v1", verify=True).problems == ()


@pytest.mark.long
def test_a_bit_flipped_target_file_is_refused_by_training_and_its_remedy_works(captured: Path, tmp_path: Path):
    job = copy_of(captured, tmp_path)
    victim = job.unit_objects()[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 3] ^= 4
    victim.write_bytes(data)
    failed = job.call(command="train", code=1)
    assert victim.stem in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "student" not in job.published()
    assert "delete the object and run capture again" in failed.stderr
    victim.unlink()
    job.call(command="capture")
    assert job.published()["targets"]["captured"] == 1
    assert targets.inspect(job.root + "/runs/tiny/v1", verify=True).problems == ()


@pytest.mark.long
def test_targets_of_another_teacher_are_refused(captured: Path, tmp_path: Path):
    job = copy_of(captured, tmp_path)
    other_teacher = tiny_llama_folder(vocab=512, seed=9)
    other = Job(tmp_path, job.root, teacher=other_teacher)
    refused_run = other.call(command="train", code=2)
    assert "capture_fingerprint" in refused_run.stderr
    other.call("--version", "v2", command="capture")
    first, second = (job.published(v)["targets"] for v in ("v1", "v2"))
    assert first["fingerprint"] != second["fingerprint"]
