"""One of vLLM's worker processes is killed in the middle of a unit, in the real capture: some 2 minutes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distill_ray import teacher
from distill_ray.config import Recipe
from distill_ray.schema import TargetRows
from distill_ray.teacher.vllm_engine import VllmEngine
from tests.assets import TINY_VOCAB, tiny_llama_folder
from tests.stages.test_capture import TEXTS, _entry, _recipe, _run, _write

pytestmark = [pytest.mark.kill, pytest.mark.timeout(1800), pytest.mark.usefixtures("ray_cluster")]

KILLED_UNIT, KILLED_STEP = 3, 2
"""The worker dies before this step of this unit of its actor, counted from 1."""


@dataclass(frozen=True)
class Open:
    """Opens vLLM over two worker processes, whose units are logged; the first actor kills one of them."""

    recipe: Recipe
    folder: Path
    kill: bool

    def __call__(self) -> Watched:
        engine = teacher.open_engine(self.recipe.teacher, self.recipe.capture, self.recipe.corpus.window_tokens)
        assert isinstance(engine, VllmEngine)
        return Watched(engine, self.folder, self.kill)


class Watched:
    """The engine itself, with every step passing by."""

    def __init__(self, engine: VllmEngine, folder: Path, kill: bool) -> None:
        self._engine, self._folder, self._kill = engine, folder, kill
        self.vocab_size, self.notes = engine.vocab_size, engine.notes
        self._units = self._steps = 0
        self._step: Callable[[], Any] = engine._engine.step
        engine._engine.step = self._count

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        self._units, self._steps = self._units + 1, 0
        with (self._folder / "units.jsonl").open("a") as log:
            log.write(json.dumps([os.getpid(), sequences[0].tolist()]) + "\n")
        return self._engine.score(sequences)

    def close(self) -> None:
        self._engine.close()

    def _count(self) -> Any:
        self._steps += 1
        marker = self._folder / "killed.json"
        if self._kill and (self._units, self._steps) == (KILLED_UNIT, KILLED_STEP) and not marker.exists():
            workers = multiprocessing.active_children()
            marker.write_text(json.dumps([os.getpid(), [w.pid for w in workers]]))
            assert workers[1].pid is not None
            os.kill(workers[1].pid, signal.SIGKILL)
        return self._step()


def test_a_worker_killed_in_mid_batch_costs_its_actor_and_no_row(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", [f"{i} {text}" for i in range(250) for text in TEXTS])
    vllm = {
        "model": str(tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)),
        "engine": "vllm",
        "batch_tokens": 256,
        "tensor_parallel": 2,
    }
    manifests, entries = {}, {}
    for name in ("killed", "calm"):
        started = time.monotonic()
        folder = tmp_path / name
        recipe = _recipe(folder / "root", f"{tmp_path}/corpus/*", teacher=vllm, capture={"top_k": 64})
        manifests[name] = _run(recipe, Open(recipe, folder, kill=name == "killed"))
        entries[name] = _entry(recipe)
        print(f"{name}: {len(manifests[name].units)} units in {time.monotonic() - started:.0f} s")

    actor, workers = json.loads((tmp_path / "killed" / "killed.json").read_text())
    assert len(workers) == 2
    assert not any(psutil.pid_exists(pid) for pid in (actor, *workers)), "the actor ends, and the other worker with it"
    scored = [json.loads(line) for line in (tmp_path / "killed" / "units.jsonl").read_text().splitlines()]
    assert len({pid for pid, _ in scored}) == 2
    interrupted = [first for pid, first in scored if pid == actor][KILLED_UNIT - 1]
    assert [pid == actor for pid, first in scored if first == interrupted] == [True, False]
    assert entries["killed"]["teacher_of_command"]["actors"] == 2
    assert len(manifests["calm"].units) > 5

    objects = {
        name: {p.name: p.read_bytes() for p in (tmp_path / name / "root").glob("targets/*/*.parquet")}
        for name in manifests
    }
    assert objects["killed"] == objects["calm"]
    assert set(objects["calm"]) == {f"{u.unit}.parquet" for u in manifests["calm"].units}
