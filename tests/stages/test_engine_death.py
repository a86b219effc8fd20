"""Processes of a teacher that die in the real capture, each at its own moment: every row is captured once.

vLLM's EngineCore is a process of its own, as on GPUs, and on CPUs each worker is, too.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest

from distill_ray import teacher
from distill_ray.config import Recipe
from distill_ray.errors import DistillError
from distill_ray.schema import TargetRows
from distill_ray.teacher.vllm_engine import VllmEngine
from tests.assets import TINY_VOCAB, tiny_llama_folder
from tests.stages.test_capture import TEXTS, ShortTeacher, _entry, _recipe, _run, _write

pytestmark = [pytest.mark.kill, pytest.mark.timeout(1800), pytest.mark.usefixtures("ray_cluster")]

KILLED_UNIT, KILLED_STEP = 3, 2
"""The process dies before this step of this unit of its actor, counted from 1."""


@dataclass(frozen=True)
class Open:
    """Opens vLLM, whose units are logged; the first actor kills one of the engine's processes, or itself."""

    recipe: Recipe
    folder: Path
    kill: Literal["worker", "actor"] | None

    def __call__(self) -> Watched:
        engine = teacher.open_engine(self.recipe.teacher, self.recipe.capture, self.recipe.corpus.window_tokens)
        assert isinstance(engine, VllmEngine)
        return Watched(engine, self.folder, self.kill)


class Watched:
    """The engine itself, with every step passing by."""

    def __init__(self, engine: VllmEngine, folder: Path, kill: str | None) -> None:
        self._engine, self._folder, self._kill = engine, folder, kill
        self.vocab_size, self.notes, self.version = engine.vocab_size, engine.notes, engine.version
        self._units = self._steps = 0
        self._step: Callable[[], Any] = engine._engine.step
        engine._engine.step = self._count

    def score(self, sequences: list[np.ndarray]) -> list[TargetRows | str]:
        self._units, self._steps = self._units + 1, 0
        with (self._folder / "units.jsonl").open("a") as log:
            log.write(json.dumps([os.getpid(), sequences[0].tolist()]) + "\n")
        return self._engine.score(sequences)

    def score_again(self, sequences: list[np.ndarray]) -> list[TargetRows | str] | None:
        return self._engine.score_again(sequences)

    def close(self) -> None:
        self._engine.close()

    def _count(self) -> Any:
        self._steps += 1
        marker = self._folder / "killed.json"
        if self._kill and (self._units, self._steps) == (KILLED_UNIT, KILLED_STEP) and not marker.exists():
            engine = [(p.pid, p.name()) for p in psutil.Process().children(recursive=True)]
            marker.write_text(json.dumps([os.getpid(), engine]))
            workers = [pid for pid, name in engine if "Worker" in name]
            os.kill(workers[1] if self._kill == "worker" else os.getpid(), signal.SIGKILL)
        return self._step()


class Gone(threading.Thread):
    """Waits for the kill, then until no process of the actor and its engine is left."""

    def __init__(self, marker: Path) -> None:
        super().__init__(daemon=True)
        self._marker, self.seconds = marker, math.inf
        self.start()

    def run(self) -> None:
        while not self._marker.exists() or not self._marker.read_text():
            time.sleep(0.05)
        began = time.monotonic()
        while any(psutil.pid_exists(pid) for pid in self.pids()):
            time.sleep(0.05)
        self.seconds = time.monotonic() - began

    def pids(self) -> list[int]:
        actor, engine = json.loads(self._marker.read_text())
        return [actor, *(pid for pid, _ in engine)]


def test_a_process_killed_in_mid_batch_costs_its_actor_and_no_row(tmp_path: Path) -> None:
    _write(tmp_path / "corpus", "a.jsonl", [f"{i} {text}" for i in range(250) for text in TEXTS])
    vllm = {
        "model": str(tiny_llama_folder(vocab=TINY_VOCAB, hidden=128, heads=4)),
        "engine": "vllm",
        "batch_tokens": 256,
        "tensor_parallel": 2,
    }
    runs: dict[str, Literal["worker", "actor"] | None] = {"calm": None, "worker": "worker", "actor": "actor"}
    manifests, objects = {}, {}
    for name, kill in runs.items():
        folder = tmp_path / name
        recipe = _recipe(folder / "root", f"{tmp_path}/corpus/*", teacher=vllm, capture={"top_k": 64})
        gone = Gone(folder / "killed.json")
        manifests[name] = _run(recipe, Open(recipe, folder, kill))
        objects[name] = {p.name: p.read_bytes() for p in (folder / "root").glob("targets/*/*.parquet")}
        if kill:
            _assert_replaced(folder, recipe)
            # Outside Ray EngineCore and workers outlive their parent's SIGKILL (vllm-project/vllm#55510); in an actor
            # Ray ends its whole process group. Were it otherwise, GPU memory would be gone until somebody looked.
            gone.join(60)
            print(f"{name} killed: no process of the engine {gone.seconds:.1f} s later")
            assert gone.seconds < math.inf
    assert len(manifests["calm"].units) > 5
    assert set(objects["calm"]) == {f"{u.unit}.parquet" for u in manifests["calm"].units}
    assert objects["worker"] == objects["calm"]
    assert objects["actor"] == objects["calm"]


def _assert_replaced(folder: Path, recipe: Recipe) -> None:
    """A second actor took the place of the killed one, and the unit that it was at."""
    actor, engine = json.loads((folder / "killed.json").read_text())
    names = " ".join(name for _, name in engine)
    assert names.count("Worker") == 2
    assert "EngineCore" in names, "the engine's scheduler is a process of its own, as on GPUs"
    scored = [json.loads(line) for line in (folder / "units.jsonl").read_text().splitlines()]
    assert len({pid for pid, _ in scored}) == 2
    interrupted = [first for pid, first in scored if pid == actor][KILLED_UNIT - 1]
    assert [pid == actor for pid, first in scored if first == interrupted] == [True, False]
    assert _entry(recipe)["teacher_of_command"]["actors"] == 2


@dataclass(frozen=True)
class FailsToOpen:
    """A teacher whose first starts fail: by what they raise, or with their process."""

    folder: Path
    times: int
    dies: bool

    def __call__(self) -> ShortTeacher:
        with (self.folder / "starts").open("a") as log:
            log.write("x")
        if (self.folder / "starts").stat().st_size <= self.times:
            if self.dies:
                os._exit(1)
            raise RuntimeError("CUDA out of memory")
        return ShortTeacher()


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_a_teacher_that_fails_to_start_twice_starts_the_third_time(tmp_path: Path, dies: bool) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS * 20)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    assert _run(recipe, FailsToOpen(tmp_path, 2, dies)).sequences == len(TEXTS) * 20
    assert (tmp_path / "starts").stat().st_size == 3


@pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
def test_a_teacher_that_never_starts_ends_the_run(tmp_path: Path, dies: bool) -> None:
    _write(tmp_path / "corpus", "a.jsonl", TEXTS)
    recipe = _recipe(tmp_path / "root", f"{tmp_path}/corpus/*")
    with pytest.raises(DistillError, match="could not be started, 3 times in a row"):
        _run(recipe, FailsToOpen(tmp_path, 99, dies))
    assert (tmp_path / "starts").stat().st_size == 3
