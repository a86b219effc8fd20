"""Capture through real Ray Data, with the reference teacher on a tiny model."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_ray import capture, session, targets, teacher
from distill_ray.config import Recipe, parse_recipe
from distill_ray.errors import DistillError, StoppedError, UserError
from distill_ray.lease import Lease, read_published
from distill_ray.schema import TargetRows
from distill_ray.storage import open_storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from tests.assets import open_with_bos, smollm2_folder, tiny_teacher_folder

TEXTS = ["import threading and then wait", "a class is an object too", "errors should never pass silently"]

pytestmark = pytest.mark.usefixtures("ray_cluster")


class ShortTeacher:
    """A teacher with made-up rows that refuses sequences of exactly `refused` tokens."""

    vocab_size = 512
    version = "made up"
    notes = ("it makes its rows up",)

    def __init__(self, refused: int = -1, marker: Path | None = None, seconds: float = 0.0) -> None:
        self._refused, self._marker, self._seconds = refused, marker, seconds

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        time.sleep(self._seconds)
        if self._marker is not None and not self._marker.exists():
            self._marker.touch()
            os._exit(1)
        return [f"{len(s)} tokens displease" if len(s) == self._refused else self._rows(s) for s in sequences]

    def score_again(self, sequences: list[np.ndarray]) -> None: ...

    def close(self) -> None: ...

    def _rows(self, tokens: np.ndarray) -> TargetRows:
        """The actual token at ½, its successor at ¼, the rest in the tail."""
        n = len(tokens) - 1
        actual = tokens[1:].astype(np.int32)
        return TargetRows(
            ids_NK=np.stack([actual, (actual + 1) % self.vocab_size], axis=1).astype(np.int32),
            logprobs_NK=np.tile(np.log(np.float32([0.5, 0.25])), (n, 1)),
            log_tail_N=np.full(n, np.log(0.25), np.float32),
            actual_logprob_N=np.full(n, np.log(0.5), np.float32),
            actual_rank_N=np.ones(n, np.int32),
        )


def _recipe(root: Path, sources: str, version: str = "v1", **changes: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "t",
        "version": version,
        "storage": {"root": str(root)},
        "corpus": {"sources": [sources], "window_tokens": 64, "unit_bytes": 4096},
        "teacher": {
            "model": str(tiny_teacher_folder()),
            "engine": "transformers",
            "dtype": "float32",
            "use_gpu": False,
        },
        "capture": {"top_k": 2, "temperatures": [1.0]},
        "student": {"teacher_layers": [0]},
        "train": {"pack_tokens": 64, "global_batch_tokens": 64},
    }
    for section, values in changes.items():
        data[section] = data.get(section, {}) | values
    return parse_recipe(data)


def _write(folder: Path, name: str, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def _run(recipe: Recipe, factory: Any = None, progress: type[Progress] = Progress) -> RunManifest:
    storage = open_storage(recipe.storage.root)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        return capture.run(recipe, storage, lease.token, threading.Event(), progress, engine_factory=factory)


def _entry(recipe: Recipe) -> dict[str, Any]:
    return read_published(open_storage(recipe.storage.root), recipe.run_prefix)["targets"]


def test_rows_are_the_reference_teachers(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    recipe = _recipe(
        tmp_path / "root", f"{tmp_path}/corpus/*.jsonl", capture={"top_k": 16, "temperatures": [1.0, 2.0]},
        loss={"temperature": 2.0},
    )  # fmt: skip
    manifest = _run(recipe)
    engine = teacher.open_engine(recipe.teacher, recipe.capture, recipe.corpus.window_tokens)
    storage = open_storage(recipe.storage.root)
    seen = 0
    for unit in manifest.units:
        stored = targets.read_unit(storage, manifest.identity, unit.unit, expect_sha256=unit.object_sha256)
        for i in range(len(stored)):
            (exact,) = engine.score([stored.sequence(i).tokens])
            assert isinstance(exact, TargetRows)
            for t in (1.0, 2.0):
                rows = stored.rows(i, t)
                np.testing.assert_array_equal(rows.ids_NK, exact.ids_NK)
                tail = exact.log_tail_N if t == 1.0 else exact.log_tail_at[t]
                np.testing.assert_allclose(np.exp(rows.log_tail_N), np.exp(tail), atol=2e-3)
            np.testing.assert_allclose(stored.rows(i).logprobs_NK, exact.logprobs_NK, atol=0.1)
            np.testing.assert_array_equal(stored.sequence(i).actual_rank_N, exact.actual_rank_N)
            seen += 1
    assert seen == len(TEXTS)


def test_the_rows_of_every_window_are_those_of_a_dense_teacher_given_bos_and_the_window(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_teacher_folder(), tmp_path / "teacher")
    bos = open_with_bos(folder)
    text = " ".join(f"{TEXTS[i % 3]} {i}" for i in range(60))
    _write(tmp_path / "corpus", "a.jsonl", [text])
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", capture={"top_k": 16}, teacher={"model": str(folder)})
    manifest = _run(recipe)
    assert len(manifest.units) == 1
    stored = targets.read_unit(
        open_storage(recipe.storage.root), manifest.identity, manifest.units[0].unit, expect_sha256=None
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    wanted = [[bos, *plain[at : at + 63]] for at in range(0, len(plain) - 1, 62)]  # 64 with BOS, one repeated
    assert len(stored) == len(wanted) >= 10
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apart = 0.0
    for i, window in enumerate(wanted):
        found, rows = stored.sequence(i), stored.rows(i)
        assert found.tokens.tolist() == window
        assert found.loss_mask.tolist() == [False, i == 0, *[True] * (len(window) - 2)]
        with torch.no_grad():
            dense, headless = (
                model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy() for ids in (window, window[1:])
            )
        kept = np.take_along_axis(dense[:-1], rows.ids_NK, 1)
        np.testing.assert_allclose(-np.sort(-kept, 1), -np.sort(-dense[:-1], 1)[:, :16], atol=1e-5)
        np.testing.assert_allclose(rows.logprobs_NK, kept, atol=0.1)
        np.testing.assert_allclose(found.actual_logprob_N, dense[range(len(window) - 1), window[1:]], atol=5e-3)
        apart = max(apart, float(np.abs(dense[1:] - headless).max()))
    assert apart > 1, "BOS does not matter to this teacher, and nothing was shown"


def test_second_run_captures_nothing_and_a_new_file_only_its_units(tmp_path: Path) -> None:
    factory = partial(ShortTeacher)
    first = _write(tmp_path / "corpus", "a.jsonl", TEXTS * 60)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    before = _run(recipe, factory)
    assert len(before.units) > 1
    assert (_entry(recipe)["captured"], _entry(recipe)["reused"]) == (len(before.units), 0)
    spent = _entry(recipe)["teacher_of_command"]
    assert spent["actors"] == 1
    assert spent["busy_s"] >= sum(u.teacher_seconds for u in before.units) - 1e-3 > 0
    assert spent["idle_s"] > 0
    again = _run(recipe, factory)
    assert [u.object_sha256 for u in again.units] == [u.object_sha256 for u in before.units]
    assert (_entry(recipe)["captured"], _entry(recipe)["reused"]) == (0, len(before.units))
    assert _entry(recipe)["teacher_of_command"]["actors"] == 0
    objects = {p: p.stat().st_mtime_ns for p in (tmp_path / "root").glob("targets/*/*.parquet")}

    with gzip.open(first.parent / "b.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "a new week's text"}) + "\n")
    weekly = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", version="v2")
    after = _run(weekly, factory)
    assert (_entry(weekly)["captured"], _entry(weekly)["reused"]) == (1, len(before.units))
    assert {u.unit for u in before.units} < {u.unit for u in after.units}
    assert all(p.stat().st_mtime_ns == m for p, m in objects.items())


def test_dead_letters_are_listed_once_whatever_is_rerun(tmp_path: Path) -> None:
    path = _write(tmp_path / "corpus", "a.jsonl", [*TEXTS, ""])
    with path.open("ab") as stream:
        stream.write(b'{"text": "\xff\xfe"}\n')
    lenient = {"max_refused": 1.0}
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", capture=lenient)
    manifest = _run(recipe, ShortTeacher)
    lengths = np.concatenate([u.lengths for u in manifest.units])
    letters = tmp_path / "root" / "dead-letters" / recipe.name / f"{recipe.version}.jsonl"
    first = [json.loads(line) for line in letters.read_text().splitlines()]
    assert [d["record"] for d in first] == [3, 4]
    assert manifest.dead == 2
    _run(recipe, ShortTeacher)
    assert [json.loads(line) for line in letters.read_text().splitlines()] == first

    # Another capture (top_k = 1 … is another fingerprint) whose teacher refuses one sequence for its own reasons.
    other = _recipe(tmp_path / "other", f"{tmp_path}/corpus/*", capture=lenient)
    manifest = _run(other, partial(ShortTeacher, refused=int(lengths[0])))
    letters = tmp_path / "other" / "dead-letters" / other.name / f"{other.version}.jsonl"
    reasons = [json.loads(line)["reason"] for line in letters.open()]
    assert manifest.sequences == int((lengths != lengths[0]).sum())
    assert sum("displease" in r for r in reasons) == int((lengths == lengths[0]).sum())


def test_more_refused_documents_than_allowed_stop_a_capture_as_soon_as_that_is_certain(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", [*TEXTS, ""] * 100)
    documents, bad = 100 * len(TEXTS) + 100, 100
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    with pytest.raises(UserError, match="documents captured so far are refused") as early:
        _run(recipe, ShortTeacher)
    counts = re.match(r"(\d+) of the (\d+) documents", str(early.value))
    assert counts
    refused, seen = map(int, counts.groups())
    assert refused < bad
    assert seen < documents
    assert f"unit(s) {refused} × empty: no text. Every captured unit is kept" in str(early.value)
    kept = list(Path(tmp_path, "root").glob("targets/*/*.parquet"))
    assert kept

    store = open_storage(recipe.storage.root)
    allowed = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", capture={"max_refused": 0.5})
    notes = list[str]()

    class Noted(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    manifest = _run(allowed, ShortTeacher, Noted)
    told = f"{bad} of {documents} documents ({bad / documents:.2%}) are refused: {bad} × empty: no text"
    assert told in notes
    entry = read_published(store, recipe.run_prefix)["targets"]
    assert (entry["documents"], entry["refused"]) == (documents, {"empty: no text": bad})
    assert entry["reused"] >= len(kept)
    assert manifest.dead == bad

    with pytest.raises(UserError, match=re.escape(f"{told}. capture.max_refused=0.01 allows fewer")):
        _run(recipe, ShortTeacher)


def test_all_documents_dead_is_the_users_error(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", ["", ""])
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", capture={"max_refused": 1.0})
    with pytest.raises(UserError, match="none of the corpus's 2 documents"):
        _run(recipe, ShortTeacher)
    assert "targets" not in read_published(open_storage(recipe.storage.root), recipe.run_prefix)


def test_a_teacher_that_dies_is_replaced_and_its_unit_redone(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS * 60)
    marker = tmp_path / "died"
    killed = _run(_recipe(tmp_path / "killed", f"{tmp_path}/corpus/*"), partial(ShortTeacher, marker=marker))
    assert marker.exists()
    whole = _run(_recipe(tmp_path / "whole", f"{tmp_path}/corpus/*"), ShortTeacher)
    assert [(u.unit, u.object_sha256) for u in killed.units] == [(u.unit, u.object_sha256) for u in whole.units]
    assert killed.sequences == len(TEXTS) * 60


class DyingTeacher(ShortTeacher):
    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        os._exit(1)


@pytest.mark.long
def test_a_teacher_that_always_dies_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    with pytest.raises(
        DistillError, match=r"capture process died, and 4 retries .* out of memory.* log .* same command"
    ):
        _run(recipe, DyingTeacher)
    assert _run(recipe, ShortTeacher).sequences == len(TEXTS)


def test_a_full_cluster_is_said_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @ray.remote(num_cpus=4)
    class Hog:
        def ready(self) -> None:
            pass

    class Listener(Progress):
        def note(self, text: str) -> None:
            notes.append(text)
            ray.kill(hog)

    notes: list[str] = []
    hog = Hog.remote()
    ray.get(hog.ready.remote())
    monkeypatch.setattr(session, "SAY_FULL_S", 0.5)
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    manifest = _run(_recipe(tmp_path / "root", f"{tmp_path}/corpus/*"), partial(ShortTeacher), Listener)
    assert manifest.sequences == len(TEXTS)
    assert notes[0] == "waiting for resources: a teacher needs 1 CPU; the cluster has 4 CPU (0 free)"


@pytest.mark.long
def test_a_pool_with_work_for_more_teachers_grows(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS * 400)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", teacher={"replicas": {"min": 1, "max": 2}})
    manifest = _run(recipe, partial(ShortTeacher, seconds=1.5))
    assert len(manifest.units) >= 12
    spent = _entry(recipe)["teacher_of_command"]
    assert spent["actors"] == 2
    assert spent["busy_s"] >= 1.5 * len(manifest.units) - 1e-3


def test_progress_tells_the_time_left_by_bytes_the_teachers_hours_and_once_what_it_has_to_say(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS * 200)
    lines: list[dict[str, Any]] = []
    notes: list[str] = []

    class Listener(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

        def advance(self, count: int = 1, weight: float | None = None, **fields: Any) -> None:
            super().advance(count, weight, **fields)
            assert weight is not None
            assert self._pace.left is not None
            lines.append({"bytes": weight, "left": self._pace.left, **fields})

    recipe = _recipe(
        tmp_path / "root", f"{tmp_path}/corpus/*", teacher={"use_gpu": False}, cost={"teacher_gpu_hour": 1.0}
    )
    manifest = _run(recipe, partial(ShortTeacher, seconds=0.05), Listener)
    size = (tmp_path / "corpus" / "a.jsonl").stat().st_size
    assert len(lines) == len(manifest.units) > 5
    assert sum(line["bytes"] for line in lines) == size
    assert (lines[-1]["left"], lines[-1]["rows_left"]) == (0, 0)
    half = lines[len(lines) // 2]
    assert half["rows_left"] == pytest.approx(manifest.rows * half["left"] / size, rel=0.05)
    assert half["rows_per_s"] > 0
    assert 0 <= half["teacher_idle_share"] < 1
    assert lines[-1]["teacher_hours"] * 3600 >= 0.05 * len(lines) - 0.2
    assert lines[-1]["teacher_dollars"] == 0  # no GPU
    assert notes == ["teacher: it makes its rows up"]


def test_stop_keeps_and_indexes_what_is_finished(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS * 200)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    stop, threads = threading.Event(), set(threading.enumerate())

    class StopsAfterTwo(Progress):
        def advance(self, count: int = 1, **fields: Any) -> None:
            super().advance(count, **fields)
            if "kept_mass" in fields and self._done >= 2:
                stop.set()

    storage = open_storage(recipe.storage.root)
    with Lease.acquire(storage, recipe.run_prefix) as lease, pytest.raises(StoppedError):
        capture.run(
            recipe, storage, lease.token, stop, StopsAfterTwo, engine_factory=partial(ShortTeacher, seconds=0.3)
        )
    # One that waits in Ray's core worker would crash this process at its next `ray.init()`.
    assert set(threading.enumerate()) <= threads, "threads left behind"
    identity = capture.capture_identity(recipe)
    indexed = targets.load_index(storage, identity)
    assert len(indexed) >= 2
    manifest = _run(recipe, ShortTeacher)
    assert _entry(recipe)["reused"] >= len(indexed)
    assert manifest.sequences == len(TEXTS) * 200


def test_an_engine_that_cannot_open_says_why(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", capture={"top_k": 512}, corpus={"window_tokens": 32})
    too_many = recipe.capture.model_copy(update={"top_k": 513})
    with pytest.raises(UserError, match=r"capture\.top_k=513 exceeds the teacher's vocabulary of 512"):
        _run(recipe, partial(teacher.open_engine, recipe.teacher, too_many, 32))


def test_a_source_that_changes_under_capture_is_the_users_error(tmp_path: Path) -> None:
    from distill_ray.capture import pool

    path = _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    from distill_ray import corpus

    identity = capture.capture_identity(recipe)
    tokenizer = corpus.load_tokenizer(recipe.teacher.model, False)
    units = corpus.plan_units(recipe.corpus, identity.tokenizer, None)
    path.unlink()
    work = pool.Work(recipe, open_storage(recipe.storage.root), identity, tokenizer, units, ShortTeacher)
    stream = pool.summaries(work, threading.Event())
    with pytest.raises(UserError, match=r"^[^\n]*a\.jsonl[^\n]*$"):
        list(stream)


@pytest.mark.long
def test_vllm_teaches_in_a_ray_data_actor(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    vllm = {"model": str(smollm2_folder()), "engine": "vllm", "batch_tokens": 256}
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*", teacher=vllm, capture={"top_k": 64})
    started = time.monotonic()
    manifest = _run(recipe)
    print(f"vLLM capture of {manifest.rows} rows in {time.monotonic() - started:.0f} s")
    assert manifest.sequences == len(TEXTS)
    assert manifest.dead == 0
    assert 0.5 < manifest.mean_kept_mass < 1
    assert manifest.identity.vocab_size == 49_152
