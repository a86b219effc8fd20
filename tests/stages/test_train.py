"""Training as a whole: Ray Train, DeepSpeed, checkpoints, against a plain loop."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distill_ray import train
from distill_ray.config import Recipe
from distill_ray.errors import StoppedError, UserError
from distill_ray.lease import Lease, read_published
from distill_ray.session import ray_session
from distill_ray.storage import Storage, open_storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from distill_ray.train.worker import make_plan
from tests.stages.train_assets import PlainLoop, make_targets, tiny_recipe


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with ray_session("local", num_cpus=4):
        yield


@dataclass
class Run:
    recipe: Recipe
    storage: Storage
    manifest: RunManifest

    def train(self, stop: threading.Event | None = None, progress: Any = Progress) -> dict[str, Any]:
        with Lease.acquire(self.storage, self.recipe.run_prefix) as lease:
            return train.run(
                self.recipe, self.storage, self.manifest, lease.token, stop or threading.Event(), progress
            )

    def history(self) -> list[dict[str, float]]:
        data = self.storage.get(f"{self.recipe.run_prefix}/metrics.jsonl")
        return [json.loads(line) for line in data.splitlines()]

    def losses(self) -> list[float]:
        lines = self.history()
        assert [line["step"] for line in lines] == list(range(len(lines)))
        return [line["loss"] for line in lines]

    def checkpoint_files(self, step: int) -> list[str]:
        prefix = f"{self.recipe.run_prefix}/checkpoints/step-{step:08d}/"
        return [i.key for i in self.storage.list(prefix) if not i.key.endswith("manifest.json")]


def new_run(root: Path, version: str = "v1", **sections: dict[str, object]) -> Run:
    recipe = tiny_recipe(root, version, **sections)
    storage = open_storage(recipe.storage.root)
    return Run(recipe, storage, make_targets(storage, recipe))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def reference(root: Path) -> list[float]:
    run = new_run(root, "reference")
    plan = make_plan(run.recipe, run.manifest)
    curve = PlainLoop(run.recipe, run.manifest, run.storage).losses(plan)
    # The data must be ragged enough for the test to mean something: a short last batch, and several steps.
    assert len(curve) >= 5
    assert len(plan.batch(plan.steps - 1)) < plan.packs_per_batch
    return curve


class Watcher(Progress):
    """Calls `at[step]` once that many steps were shown."""

    at: dict[int, Callable[[], None]] = {}  # noqa: RUF012
    notes: list[str] = []  # noqa: RUF012

    def advance(self, count: int = 1, **fields: Any) -> None:
        super().advance(count, **fields)
        act = self.at.pop(self._done, None)
        if act is not None:
            act()

    def note(self, text: str) -> None:
        super().note(text)
        self.notes.append(text)


def watcher(at: dict[int, Callable[[], None]] | None = None) -> type[Watcher]:
    return type("ThisWatcher", (Watcher,), {"at": at or {}, "notes": []})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_give_the_loss_curve_of_a_plain_float32_loop(
    root: Path, reference: list[float], stage: int
) -> None:
    run = new_run(root, f"zero{stage}", train={"zero_stage": stage})
    entry = run.train()
    assert run.losses() == pytest.approx(reference, rel=1e-5)
    assert entry["step"] == len(reference)
    assert entry == run.train(), "a published student is not trained again"


def test_stop_then_two_broken_checkpoints_fall_back_and_end_at_the_same_loss(
    root: Path, reference: list[float]
) -> None:
    run = new_run(root, "stopped")
    stop = threading.Event()
    with pytest.raises(StoppedError):
        run.train(stop, watcher({5: stop.set}))
    stopped_at = len(run.history())
    steps = sorted(e["step"] for n, e in read_published(run.storage, run.recipe.run_prefix).items() if "checkpoint" in n)
    assert steps[-1] == stopped_at
    assert len(steps) >= 3
    shard = next(k for k in run.checkpoint_files(steps[-1]) if "optim_states" in k)
    run.storage.delete(shard)
    shard = next(k for k in run.checkpoint_files(steps[-2]) if "zero_pp_rank_1" in k)
    data = bytearray(run.storage.get(shard))
    data[len(data) // 2] ^= 1
    run.storage.put(shard, bytes(data))
    seen = watcher()
    run.train(progress=seen)
    assert any("is missing" in note for note in seen.notes)
    assert any("SHA-256" in note for note in seen.notes)
    assert run.losses() == pytest.approx(reference, rel=1e-5)


def test_other_world_size_is_refused_with_numbers(root: Path) -> None:
    run = new_run(root, "worlds")
    stop = threading.Event()
    with pytest.raises(StoppedError):
        run.train(stop, watcher({1: stop.set}))
    alone = new_run(root, "worlds", train={"workers": {"min": 1, "max": 1}})
    with pytest.raises(UserError, match="saved by 2 workers at ZeRO stage 2"):
        alone.train()


def test_killed_worker_restarts_from_the_checkpoint_and_ends_at_the_same_loss(
    root: Path, reference: list[float]
) -> None:
    run = new_run(root, "crash")
    run.train(progress=watcher({3: kill_one_worker}))
    assert run.losses() == pytest.approx(reference, rel=1e-5)


def kill_one_worker() -> None:
    import psutil

    workers = [p for p in psutil.Process().children(recursive=True) if "TrainWorker" in p.name() or _is_worker(p)]
    assert workers
    workers[-1].kill()


def _is_worker(process: Any) -> bool:
    import psutil

    try:
        return any("TrainWorker" in part for part in process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return False


def test_lora_trains_adapters_only_and_merges(root: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = new_run(
        root,
        "lora",
        student={"teacher_layers": [1], "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "up_proj"]}},
    )
    run.train()
    folder = root / run.recipe.run_prefix / "student"
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    teacher = AutoModelForCausalLM.from_pretrained(run.recipe.teacher.model, dtype=torch.float32).state_dict()
    changed = {n for n, w in trained.items() if not torch.equal(w, teacher[n.replace("layers.0", "layers.1")])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    update = trained["model.layers.0.mlp.up_proj.weight"] - teacher["model.layers.1.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(update, atol=1e-5) <= 2


def test_a_student_equal_to_its_teacher_has_kl_below_1e_3_at_every_position(root: Path) -> None:
    run = new_run(
        root,
        "same",
        student={"teacher_layers": [0, 1]},
        train={"learning_rate": 1e-12, "weight_decay": 0.0, "global_batch_tokens": 128},
    )
    run.train()
    assert all(0 <= line["kl_t1"] < 1e-3 and 0 <= line["kl_t"] < 1e-3 for line in run.history())
    assert all(math.isfinite(line["grad_norm"]) for line in run.history())
