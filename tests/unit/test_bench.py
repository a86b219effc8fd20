"""The bench command: names, errors, and how it measures."""

from __future__ import annotations

import json
import sys
import types

import pytest

from tests.bench import __main__ as command
from tests.bench.measure import medians, peak_mib


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


def test_a_failing_process_is_an_error():
    with pytest.raises(RuntimeError, match="fail failed"):
        peak_mib(fail)
