"""The bench command: names, errors, and how it measures."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest

from distill_ray.units import HASH
from tests.bench import __main__ as command
from tests.bench import plan
from tests.bench.measure import apart, medians, peak_mib
from tests.bench.paged import PAGE, PagedStorage


def take(mib: int) -> None:
    assert sum(bytearray(mib << 20)) == 0


def fail() -> None:
    raise ValueError("planted")


def test_an_unknown_bench_names_those_that_exist():
    with pytest.raises(SystemExit, match=r"no bench 'nope'; there are: .*codec"):
        command.main(["nope", "--json", "x"])


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
    assert "".join(calls) == "ab" * 6
    assert set(seconds) == {"a", "b"}
    with pytest.raises(ValueError, match="at least 5"):
        medians({}, 4)


def test_peak_memory_is_that_of_the_work_alone():
    held = bytearray(300 << 20)  # this process's own memory must not count
    small, large = peak_mib(take, 1), peak_mib(take, 201)
    assert 190 < large - small < 240
    assert small < len(held) >> 20


def test_a_process_apart_gives_back_its_result():
    result, peak = apart(sum, [1, 2])
    assert result == 3
    assert 5 < peak < 2000


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
