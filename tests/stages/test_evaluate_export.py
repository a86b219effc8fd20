"""Evaluation and export on real models: figures against dense ones, the report, the folder, idempotence, the gate."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distill_ray import evaluate, export
from distill_ray.errors import IntegrityError, LeaseLostError, StoppedError, UserError
from distill_ray.lease import Lease, document_entry, publish, read_whole_folder
from distill_ray.registry import publish_latest, read_latest
from distill_ray.report import read_report, to_bytes
from distill_ray.schema import Sequence
from distill_ray.storage import open_storage
from distill_ray.student.published import stage_student
from tests.assets import TINY_VOCAB, tiny_llama_folder, tiny_teacher_folder
from tests.stages.trained_run import (
    HELD_OUT,
    K,
    Run,
    prompt_logits,
    random_sequences,
    row_logits,
    store_capture,
    store_student,
    tiny_recipe,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sequence]]:
    """Storage of a captured and trained run, made once; each test works on a copy."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("template") / "root")
    storage = open_storage(recipe.storage.root)
    sequences = random_sequences()
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        store_capture(storage, recipe, lease.token, sequences)
        store_student(storage, recipe, lease.token, tiny_teacher_folder())
    return Path(recipe.storage.root), sequences


@pytest.fixture
def trained(template: tuple[Path, list[Sequence]], tmp_path: Path) -> Iterator[Run]:
    root, sequences = template
    shutil.copytree(root, tmp_path / "root")
    recipe = tiny_recipe(tmp_path / "root")
    storage = open_storage(recipe.storage.root)
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        yield Run(recipe, storage, lease.token, sequences)


def _evaluate(run: Run, **options: Any) -> dict[str, Any]:
    return evaluate.run(run.recipe, run.storage, run.manifest, run.token, **options)


def _dense_figures(model: PreTrainedModel, teacher: PreTrainedModel, held_out: list[Sequence]) -> dict[str, float]:
    """The report's figures from whole distributions, one sequence at a time, with neither packing nor codec."""
    nll, kl, accept, agree, confidence, correct = [], [], [], [], [], []
    for s in held_out:
        p_NV, q_NV = (torch.from_numpy(row_logits(m, s)).log_softmax(-1).numpy() for m in (teacher, model))
        for t in np.flatnonzero(s.loss_mask[1:]):
            kept = np.argsort(-p_NV[t])[:K]
            p, q = (np.append(np.exp(x[t, kept]), -np.expm1(np.log(np.exp(x[t, kept]).sum()))) for x in (p_NV, q_NV))
            nll.append(-q_NV[t, s.tokens[t + 1]])
            kl.append((p * np.log(p / q)).sum())
            accept.append(np.minimum(p, q).sum())
            agree.append(q_NV[t].argmax() == p_NV[t].argmax())
            confidence.append(np.exp(q_NV[t].max()))
            correct.append(q_NV[t].argmax() == s.tokens[t + 1])
    where = np.minimum((np.array(confidence) * 10).astype(int), 9)
    gaps = [abs(np.sum((np.array(confidence) - correct)[where == b])) for b in range(10)]
    return {
        "perplexity": float(np.exp(np.mean(nll))),
        "kl_t1": float(np.mean(kl)),
        "acceptance": float(np.mean(accept)),
        "top1_agreement": float(np.mean(agree)),
        "ece": float(np.sum(gaps) / len(nll)),
        "rows": len(nll),
    }


@pytest.mark.usefixtures("ray_cluster")
def test_figures_equal_dense_ones_and_the_report_is_published(trained: Run) -> None:
    report = _evaluate(trained, timings={"capture": 1.5})
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder(), dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder(), dtype=torch.float32)
    before.model.layers = before.model.layers[:1]
    held_out = [s for s in trained.sequences if s.doc_key in HELD_OUT]
    for name, model in (("teacher", teacher), ("before", before), ("after", teacher)):
        dense = _dense_figures(model, teacher, held_out)
        for metric, value in dense.items():
            # The codec's bound: 8-bit gaps, float16 log-probabilities.
            assert report[name][metric] == pytest.approx(value, abs=5e-3, rel=5e-3), (name, metric)
    assert report["teacher"]["kl_t1"] == 0
    assert report["after"]["kl_t1"] < 1e-3 < 0.05 < report["before"]["kl_t1"]
    assert report["tokens"] == {
        "captured": sum(len(s.tokens) for s in trained.sequences[:4]),
        "reused": sum(len(s.tokens) for s in trained.sequences[4:]),
        "supervised_train": 100,
        "held_out": report["after"]["rows"],
    }
    assert report["identity"]["capture"] == trained.manifest.fingerprint
    assert report["identity"]["units"] == 2
    assert report["timings"]["seconds"]["capture"] == 1.5
    assert report["timings"]["tokens_per_s"].keys() == {"teacher", "train", "evaluate"}
    assert sum(report["kept_mass"]["counts"]) == report["teacher"]["rows"]
    assert read_report(trained.storage, trained.recipe.run_prefix) == report
    assert b"<svg" in trained.storage.get(f"{trained.recipe.run_prefix}/report.html")


@pytest.mark.usefixtures("ray_cluster")
def test_a_diverged_student_is_refused_by_name_and_no_report_is_written(trained: Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder(), dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(tiny_teacher_folder()).save_pretrained(tmp_path / "broken")
    store_student(trained.storage, trained.recipe, trained.token, tmp_path / "broken")
    with pytest.raises(UserError, match="not finite"):
        _evaluate(trained)
    assert "report" not in trained.published
    assert trained.storage.head(f"{trained.recipe.run_prefix}/report.json") is None


@pytest.mark.usefixtures("ray_cluster")
def test_a_stop_ends_evaluation_and_writes_nothing(trained: Run) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        _evaluate(trained, stop=stop)
    assert "report" not in trained.published


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_the_scoring_task_arrives_as_itself_without_rays_wrapping(trained: Run) -> None:
    trained.storage.put(f"{trained.recipe.run_prefix}/student/config.json", b"{}")
    with pytest.raises(IntegrityError, match=r"^[^\n]*config.json has 2 bytes[^\n]*$") as caught:
        _evaluate(trained)
    assert type(caught.value) is IntegrityError


@pytest.mark.parametrize("damage", ["a step more", "a step less", "missing"])
def test_a_history_that_is_not_the_published_one_is_refused(trained: Run, damage: str) -> None:
    key = trained.published["student"]["history"]["key"]
    lines = trained.storage.get(key).splitlines(keepends=True)
    if damage == "missing":
        trained.storage.delete(key)
    else:
        trained.storage.put(key, b"".join(lines[:1] if damage == "a step less" else [*lines, b'{"step": 2}\n']))
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl.*run `distill-ray train` again"):
        _evaluate(trained)


def test_nothing_held_out_is_known_before_training(trained: Run) -> None:
    assert evaluate.require_held_out(trained.manifest, trained.recipe).steps > 0
    with pytest.raises(UserError, match=r"held_out.*0 of 10 sequences.*corpus.holdout=0.0"):
        evaluate.require_held_out(trained.manifest, trained.with_(corpus={"holdout": 0.0}).recipe)
    with pytest.raises(UserError, match="unknown metric"):
        evaluate.require_held_out(trained.manifest, trained.with_(evaluate={"require": {"klt1": 1.0}}).recipe)


def _report(run: Run, passed: bool = True) -> dict[str, Any]:
    figures = {"perplexity": 9.0, "kl_t1": 0.2, "top1_agreement": 0.9, "ece": 0.01, "acceptance": 0.9, "rows": 10}
    identity = dict.fromkeys(("capture", "corpus", "teacher", "tokenizer", "student", "recipe"), "0123abcd")
    bound = {
        "metric": "after.kl_t1",
        "sense": "at most",
        "bound": 0.3 if passed else 0.1,
        "value": 0.2,
        "passed": passed,
    }
    return {
        **dict.fromkeys(("teacher", "before", "after"), figures),
        "identity": {**identity, "name": "tiny", "version": run.recipe.version, "units": 2},
        "gate": {"kl_t1": bound},
        "recipe": {
            "student": {"teacher_layers": [0]},
            "loss": {"objective": "bucket", "temperature": 1.0, "hard_label_weight": 0.0},
        },
    }


def _export(run: Run, *, passed: bool = True) -> export.ExportResult:
    return export.run(run.recipe, run.storage, run.token, _report(run, passed))


def test_the_exported_folder_is_the_student_in_the_stated_type(trained: Run) -> None:
    result = _export(trained)
    assert (result.is_latest, result.reason) == (True, "")
    folder = Path(result.uri)
    assert folder.parent == Path(trained.storage.uri, "models/tiny/2026-W47")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    student = prompt_logits(tiny_teacher_folder(), torch.float32)
    assert (prompt_logits(folder, torch.float32) - student).abs().max() < 0.02 * student.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_teacher_folder()).get_vocab()
    assert tokenizer.chat_template
    card = (folder / "README.md").read_text()
    for text in ('license: "apache-2.0"', "0123abcd", '"teacher_layers"', "student after"):
        assert text in card, text
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = {f["name"]: (f["size"], f["sha256"]) for f in manifest["files"]}
    found = {p.name: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in folder.iterdir()}
    del found["manifest.json"]
    assert stored == found
    latest = read_latest(trained.storage, "tiny")
    assert latest is not None
    assert (latest.version, latest.entry["sha256"]) == ("2026-W47", trained.published["export"]["sha256"])


def test_float32_export_keeps_every_bit(trained: Run) -> None:
    result = _export(trained.with_(export={"dtype": "float32"}))
    assert torch.equal(prompt_logits(result.uri, torch.float32), prompt_logits(tiny_teacher_folder(), torch.float32))


def _versions(run: Run) -> dict[str, str]:
    return {info.key: info.version for info in run.storage.list("models/")}


def test_a_second_export_touches_nothing(trained: Run) -> None:
    _export(trained)
    before = _versions(trained)
    assert _export(trained).is_latest
    assert _versions(trained) == before


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_are_released_once_the_export_stands_unless_the_recipe_keeps_them(trained: Run, keep: bool) -> None:
    publish(trained.storage, trained.token, "checkpoint/step-00000001", {"key": "c", "sha256": "s", "step": 1})
    _export(trained.with_(train={"keep_checkpoints_after_export": keep}))
    assert ("checkpoint/step-00000001" in trained.published) == keep


@pytest.mark.parametrize("damage", ["unpublished", "missing weights", "short tokenizer", "stray shard", "other dtype"])
def test_an_export_that_is_not_whole_is_done_again(trained: Run, damage: str) -> None:
    first = _export(trained).uri
    prefix = first.removeprefix(f"{trained.storage.uri}/")
    if damage == "unpublished":
        publish(trained.storage, trained.token, "export", None)
        trained.storage.delete(f"{prefix}/manifest.json")
    elif damage == "missing weights":
        trained.storage.delete(f"{prefix}/model.safetensors")
    elif damage == "short tokenizer":
        trained.storage.put(f"{prefix}/tokenizer.json", b"{}")
    elif damage == "stray shard":
        publish(trained.storage, trained.token, "export", None)
        trained.storage.put(f"{prefix}/model-00001-of-00002.safetensors", b"left by another layout")
    else:
        trained = trained.with_(export={"dtype": "float32"})
    result = _export(trained)
    assert result.is_latest
    assert (result.uri == first) == (damage != "other dtype")
    folder = Path(result.uri)
    names = {info.key.rpartition("/")[2] for info in trained.storage.list("models/tiny/2026-W47/")}
    assert {f["name"] for f in json.loads((folder / "manifest.json").read_text())["files"]} == names - {"manifest.json"}
    assert not [n for n in names if n.startswith("model-0")]
    assert torch.isfinite(prompt_logits(folder, torch.float32)).all()


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("at", ["publish", "_move_latest", "_remove_others"])
def test_what_latest_names_is_whole_whenever_a_second_export_is_killed(
    trained: Run, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def latest_is_whole() -> None:
        latest = read_latest(trained.storage, "tiny")
        assert latest is not None
        read_whole_folder(trained.storage, latest.entry)

    _export(trained)
    again = trained.with_(export={"dtype": "float32"})

    def kill(*_: Any, **__: Any) -> None:
        raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(export, at, kill)
        with pytest.raises(_KilledError):
            _export(again)
    latest_is_whole()
    _export(again)
    latest_is_whole()
    assert len({info.key.split("/")[3] for info in trained.storage.list("models/tiny/2026-W47/")}) == 1


def test_a_student_that_misses_a_bound_is_kept_but_not_the_latest(trained: Run) -> None:
    before = publish_latest(trained.storage, "tiny", "2026-W46", {"key": "old"})
    result = _export(trained, passed=False)
    assert (result.is_latest, result.reason) == (
        False,
        "the student misses 1 bound(s): after.kl_t1 = 0.2, required at most 0.1",
    )
    assert read_latest(trained.storage, "tiny") == before
    assert (Path(result.uri) / "model.safetensors").exists()


def _other_version(run: Run, version: str, *, passed: bool = True, outdated: bool = False) -> None:
    """A version of the same model, as its own run left it."""
    prefix = f"models/tiny/{version}/0"
    data = b'{"files": []}'
    run.storage.put(f"{prefix}/manifest.json", data)
    entry = document_entry(f"{prefix}/manifest.json", data) | {"report": "r"}
    with Lease.acquire(run.storage, f"runs/tiny/{version}") as lease:
        publish(run.storage, lease.token, "report", {"sha256": "another" if outdated else "r"})
        publish(run.storage, lease.token, "export", entry)
        decided = {"export": entry["sha256"], "passed": passed, "reason": "", "model": entry}
        publish(run.storage, lease.token, "latest", decided)


@pytest.mark.parametrize("others", [True, False])
def test_a_version_that_misses_a_bound_set_later_gives_way_to_the_newest_that_kept_its_own(
    trained: Run, others: bool
) -> None:
    if others:
        _other_version(trained, "2026-W44")
        _other_version(trained, "2026-W43")
        _other_version(trained, "2026-W45", outdated=True)
        _other_version(trained, "2026-W46", passed=False)
    assert _export(trained).is_latest
    result = _export(trained, passed=False)
    latest = read_latest(trained.storage, "tiny")
    assert (latest and latest.version) == ("2026-W44" if others else None)
    assert "misses 1 bound" in result.reason
    if latest is not None:
        read_whole_folder(trained.storage, latest.entry)


@pytest.mark.parametrize("at", ["_move_latest", "_remove_others", "require_owned"])
def test_a_driver_frozen_in_its_export_undoes_nothing_of_its_successors(
    trained: Run, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = getattr(export, at)
    trained.storage.put("models/tiny/2026-W47/old/model.safetensors", b"of an older export")

    def frozen(*args: Any) -> Any:
        if at == "require_owned":
            act(*args)  # it looks just before it loses the lease
        monkeypatch.undo()
        record = json.loads(trained.storage.get(f"{trained.recipe.run_prefix}/lease.json"))
        trained.storage.put(
            f"{trained.recipe.run_prefix}/lease.json", json.dumps({**record, "epoch": record["epoch"] + 1}).encode()
        )
        successor = replace(trained, token=replace(trained.token, epoch=trained.token.epoch + 1))
        _export(successor.with_(export={"dtype": "float32"}))
        return None if at == "require_owned" else act(*args)

    if at == "require_owned":
        publish_latest(trained.storage, "tiny", "2026-W48", {})  # so that the first look is the removal's
    monkeypatch.setattr(export, at, frozen)
    with pytest.raises(LeaseLostError):
        _export(trained)
    published, latest = trained.published["export"], read_latest(trained.storage, "tiny")
    read_whole_folder(trained.storage, published)
    assert latest is not None
    assert latest.version == "2026-W48" or latest.entry["sha256"] == published["sha256"]


def test_last_weeks_late_run_does_not_take_the_place_of_this_weeks(trained: Run) -> None:
    publish_latest(trained.storage, "tiny", "2026-W48", {"key": "newer"})
    result = _export(trained)
    assert not result.is_latest
    assert "the latest stays 2026-W48" in result.reason


def _published_report(run: Run, *, passed: bool = True) -> None:
    data = to_bytes(_report(run, passed))
    run.storage.put("runs/report.json", data)
    publish(run.storage, run.token, "report", document_entry("runs/report.json", data))


def test_an_export_is_undone_until_its_files_and_latest_are_as_decided(trained: Run) -> None:
    def undone() -> str | None:
        return export.undone(trained.recipe, trained.storage)

    _published_report(trained)
    assert undone() == "it was interrupted"
    _export(trained)
    assert undone() is None
    record = trained.storage.get("models/tiny/latest.json")
    for damaged, reason in ((None, "missing"), (b"[]", "no registry record"), (record.replace(b"W47", b"W40"), "W40")):
        if damaged is None:
            trained.storage.delete("models/tiny/latest.json")
        else:
            trained.storage.put("models/tiny/latest.json", damaged)
        assert reason in (undone() or ""), damaged
        assert _export(trained).is_latest
        assert undone() is None
    publish_latest(trained.storage, "tiny", "2026-W48", {"key": "newer"})
    assert undone() is None
    _published_report(trained, passed=False)
    assert "changed" in (undone() or "")


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing", "other manifest"])
def test_a_damaged_student_is_neither_scored_nor_exported(trained: Run, damage: str) -> None:
    key = f"{trained.recipe.run_prefix}/student/model.safetensors"
    data = bytearray(trained.storage.get(key))
    if damage == "truncated":
        trained.storage.put(key, bytes(data[:-100]))
    elif damage == "bit flipped":
        data[-100] ^= 1
        trained.storage.put(key, bytes(data))
    elif damage == "missing":
        trained.storage.delete(key)
    else:
        trained.storage.put(trained.published["student"]["key"], b"{}")
    with pytest.raises(IntegrityError, match=r"safetensors|manifest\.json.*published was"):
        stage_student(trained.storage, trained.published["student"])
    with pytest.raises(IntegrityError, match="run `distill-ray train` again"):
        _export(trained)
    assert not _versions(trained)


def test_a_driver_that_lost_its_lease_publishes_neither_report_nor_model(trained: Run) -> None:
    old = replace(trained, token=replace(trained.token, epoch=trained.token.epoch - 1))
    with pytest.raises(LeaseLostError):
        _export(old)
    assert "export" not in trained.published
    assert read_latest(trained.storage, "tiny") is None


_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64)
prompt = {"prompt_token_ids": list(range(3, 40))}
out = llm.generate(prompt, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
print("RESULT", json.dumps([next(iter(row.values())).logprob for row in out[0].prompt_logprobs[1:]]))
"""


@pytest.mark.slow
def test_the_exported_folder_loads_in_vllm_with_the_students_log_probabilities(trained: Run) -> None:
    # vLLM's CPU attention has no kernel for the other tiny models' heads of 16.
    store_student(trained.storage, trained.recipe, trained.token, tiny_llama_folder(vocab=TINY_VOCAB, heads=2))
    folder = _export(trained).uri
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _VLLM, folder],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    got = torch.tensor(json.loads(line.removeprefix("RESULT ")))
    tokens = torch.arange(3, 40)
    expected = prompt_logits(folder, torch.float32)[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    assert (got - expected).abs().max() < 2e-3
