"""The bench command: names, errors, and how it measures."""

from __future__ import annotations

import argparse
import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from distill_ray.targets.validate import check_rows
from distill_ray.teacher.flat import rows_from_flat
from distill_ray.units import HASH
from tests.bench import __main__ as command
from tests.bench import capture, idle, plan
from tests.bench.engines import EngineProcess
from tests.bench.measure import apart, medians, peak_mib
from tests.bench.paged import PAGE, PagedStorage
from tests.bench.rivals import rows_from_dicts
from tests.unit.targets_fakes import identity


def take(mib: int) -> None:
    assert sum(bytearray(mib << 20)) == 0


def fail() -> None:
    raise ValueError("planted")


def test_an_unknown_bench_names_those_that_exist():
    with pytest.raises(SystemExit, match=r"no bench 'nope'; there are: .*codec"):
        command.main(["nope", "--json", "x"])


def test_every_bench_can_be_asked_what_it_measures():
    for name in command.names():
        module = command.load(name)
        assert module.__doc__
        module.add_arguments(argparse.ArgumentParser())
        assert callable(module.run)


def test_no_name_names_them_too():
    with pytest.raises(SystemExit, match=r"usage: .* benches: .*codec"):
        command.main([])


def test_figures_are_printed_and_written_as_one_flat_object(tmp_path, monkeypatch, capsys):
    fake = types.ModuleType("fake", "A bench.")
    fake.add_arguments = lambda parser: parser.add_argument("--rows", type=int)
    fake.run = lambda arguments: {"fake.rows": float(arguments.rows)}
    monkeypatch.setattr(command, "names", lambda: ["fake"])
    monkeypatch.setitem(sys.modules, "tests.bench.fake", fake)
    command.main(["fake", "--rows", "7", "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == {"fake.rows": 7.0}
    assert "fake.rows" in capsys.readouterr().out


def test_rivals_take_turns():
    calls: list[str] = []
    seconds = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5)
    assert "".join(calls) == "ab" + "abba" * 2 + "ab"  # neither always runs after the other
    assert set(seconds) == {"a", "b"}
    with pytest.raises(ValueError, match="at least 5"):
        medians({}, 4)


@pytest.mark.long
def test_peak_memory_is_that_of_the_work_alone():
    held = bytearray(300 << 20)  # this process's own memory must not count
    small, large = peak_mib(take, 1), peak_mib(take, 201)
    assert 190 < large - small < 240
    assert small < len(held) >> 20


def test_a_process_apart_gives_back_its_result():
    result, peak = apart(sum, [1, 2])
    assert result == 3
    assert 5 < peak < 2000


@pytest.mark.long
def test_a_failing_process_is_an_error():
    with pytest.raises(RuntimeError, match="fail failed"):
        peak_mib(fail)


def test_a_listing_comes_page_by_page(tmp_path):
    np.save(tmp_path / "hashes.npy", np.array([f"{i:032x}".encode() for i in range(2 * PAGE + 1)], HASH))
    storage = PagedStorage(tmp_path / "root", "targets/x/", tmp_path / "hashes.npy")
    storage.put("targets/x/index/a", b"a")
    listed = storage.list("targets/x/")
    first = next(listed)
    assert (first.key, storage.list_calls) == (f"targets/x/{0:032x}.parquet", 1)
    assert len(list(listed)) == 2 * PAGE + 1
    assert storage.list_calls == 3
    assert [info.key for info in storage.list("targets/x/index/")] == ["targets/x/index/a"]
    assert list(storage.list("targets/y/")) == []
    assert storage.list_calls == 5
    assert (storage.get("targets/x/index/a"), storage.gets) == (b"a", 1)


def test_planning_is_measured_on_a_store_that_is_half_done(tmp_path):
    plan.make(tmp_path, sources=2)
    figures, before = plan.once(tmp_path)
    assert (figures["plan.units"], figures["plan.pending"]) == (2000, 1000)
    assert figures["plan.list_calls"] == 3
    assert figures["plan.gets"] == 2 + 1  # sources and index objects
    assert before > 0
    assert plan.medians_of([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}
    (tmp_path / "root/targets").rename(tmp_path / "root/gone")
    with pytest.raises(AssertionError, match="counts as not captured"):
        plan.once(tmp_path)


def made(requests: int = 2, positions: int = 50):
    """Rows in the three forms; dicts as vLLM builds them: the actual token first, a repeated id once."""
    words, prompts, columns = capture.finished(requests, positions)
    dicts = []
    for ids, logprobs, actual_rank in columns:
        rows = zip(ids.tolist(), logprobs.tolist(), actual_rank.tolist(), strict=True)
        ranked = [zip(i, lp, [rank, *range(1, len(i))], strict=True) for i, lp, rank in rows]
        dicts.append([None, *({i: types.SimpleNamespace(logprob=x, rank=r) for i, x, r in row} for row in ranked)])
    return words, prompts, columns, dicts


def test_all_ways_of_the_front_end_give_the_same_rows():
    words, prompts, columns, dicts = made()
    ours = capture.by_words(words, 2)
    by_dicts = [rows_from_dicts(d, p, capture.K, capture.VOCAB) for d, p in zip(dicts, prompts, strict=True)]
    flat = [
        rows_from_flat(*(c.flatten().numpy() for c in with_ranks(each)), prompt, capture.K, capture.VOCAB)
        for each, prompt in zip(columns, prompts, strict=True)
    ]
    capture.require_same(ours, [capture.packed(r) for r in by_dicts], [capture.packed(r) for r in flat])
    rank = words[:, 2 * capture.K + 2].numpy()
    assert 0 < (rank > capture.K).sum() < len(rank)  # actual tokens beyond the kept ones, too
    for rows in (by_dicts, flat):
        np.testing.assert_array_equal(np.concatenate([r.actual_rank_N for r in rows]), rank)
    with pytest.raises(AssertionError, match="differ"):
        capture.require_same(ours, ours[::-1])


def with_ranks(columns):
    ids, logprobs, rank = columns
    return ids, logprobs, torch.cat([rank[:, None], torch.arange(1, capture.K + 1).expand(len(ids), -1)], 1)


def test_dicts_of_another_prompt_are_refused():
    _, prompts, _, dicts = made(1)
    with pytest.raises(AssertionError, match="next one"):
        rows_from_dicts(dicts[0], prompts[0] + 1, capture.K, capture.VOCAB)


def test_ratios_are_medians_of_each_rounds_own():
    seconds = {
        ("worker", "capture"): [1.0, 10.0, 2.0],
        ("flat", "capture"): [3.0, 20.0, 2.0],
        ("worker", "bare"): [0.5, 6.0, 1.0],
        ("worker", "head"): [0.4, 3.0, 0.6],
    }
    figures = capture.ratios("m", seconds, 100)
    assert figures["capture.m_speedup_vs_flat"] == 2.0
    assert figures["capture.m_fraction_of_limit"] == pytest.approx(0.9)
    assert figures["capture.m_worker_capture_tokens_per_s"] == 50.0
    assert capture.memory("m", {"worker": 1.0, "flat": 4.0})["capture.m_peak_vs_flat"] == 0.25


@pytest.mark.long
def test_an_engine_that_fails_shows_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)engine's process failed.*UserError.*no-model"):
        EngineProcess("worker", tmp_path / "no-model", tmp_path / "log")


def test_the_simulated_teachers_rows_are_sound_and_come_at_its_rate(tmp_path):
    teacher = idle.SimulatedTeacher(2000, tmp_path / "log")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, idle.VOCAB, n).astype(np.int32) for n in (400, 2, 300)]
    sequences[0][1:40] = teacher._pool_PW[np.arange(39) + int(sequences[0][0]) & idle.POOL_ROWS - 1, 5]  # kept anyway
    started = time.monotonic()
    found = teacher.score(sequences)
    assert time.monotonic() - started >= (399 + 1 + 299) / 2000
    of = identity(idle.VOCAB, idle.K, (1.0,))
    for tokens, rows in zip(sequences, found, strict=True):
        assert 0.85 < check_rows(of, tokens, rows).mean() < 0.95
    ranks = np.concatenate([r.actual_rank_N for r in found])
    assert (ranks[:39] == 6).all()
    assert 0 < (ranks > idle.K).mean() < 0.2


def test_the_idle_share_counts_the_wait_for_the_first_unit_and_the_start_apart():
    spent = {"actors": 1, "start_s": 20.0, "staging_s": 5.0, "busy_s": 76.0, "idle_s": 4.0}
    uploads = [{"seconds": s, "bytes": 2**20} for s in (1.0, 9.0, 2.0)]
    found = idle.figures(spent, 1520, uploads)
    assert found["capture.teacher_idle_share"] == 0.05
    assert found["capture.teacher_idle_share_with_start"] == 0.24
    assert (found["capture.idle_rows_per_s"], found["capture.idle_rows_per_busy_s"]) == (19, 20)
    assert (found["capture.idle_units"], found["capture.idle_upload_s"]) == (3, 2.0)


def test_waits_are_told_by_when_the_engine_had_its_units():
    found = idle.waited([(1.0, 1.0), (5.0, 8.0), (8.5, 10.0), (10.5, 12.0), (14.0, 15.0)])
    assert found == {"capture.idle_first_wait_s": 4, "capture.idle_wait_s": 0.5, "capture.idle_longest_wait_s": 2}


def test_no_document_of_the_idle_bench_comes_twice(tmp_path):
    idle.write_corpus(tmp_path / "corpus.jsonl", 1 << 20)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) > 100
    assert (tmp_path / "corpus.jsonl").stat().st_size < (1 << 20) + (1 << 14)
