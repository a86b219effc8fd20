"""Training as a whole: Ray Train, DeepSpeed, checkpoints, against a plain loop."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distill_ray import train
from distill_ray.config import Recipe
from distill_ray.config.student import StudentSection
from distill_ray.errors import DistillError, StoppedError, UserError
from distill_ray.ingest import batch_id
from distill_ray.ingest.loader import PackLoader
from distill_ray.lease import Lease, read_published
from distill_ray.storage import Storage, open_storage
from distill_ray.targets import RunManifest
from distill_ray.telemetry import Progress
from distill_ray.train import driver
from distill_ray.train.board import Board
from distill_ray.train.worker import make_plan
from tests.assets import TINY_VOCAB, tiny_teacher_folder
from tests.stages.train_assets import PlainLoop, make_targets, tiny_recipe

pytestmark = pytest.mark.usefixtures("ray_cluster")


@dataclass
class Run:
    recipe: Recipe
    storage: Storage
    manifest: RunManifest

    def train(
        self,
        stop: threading.Event | None = None,
        progress: type[Progress] = Progress,
        board: type[Board] = Board,
        placement_wait_s: float = 900.0,
    ) -> dict[str, Any]:
        stop = stop or threading.Event()
        with Lease.acquire(self.storage, self.recipe.run_prefix) as lease:
            job = (self.recipe, self.storage, self.manifest, lease.token, stop, progress)
            return train.run(*job, board_class=board, placement_wait_s=placement_wait_s)

    def history(self) -> list[dict[str, float]]:
        data = self.storage.get(f"{self.recipe.run_prefix}/metrics.jsonl")
        return [json.loads(line) for line in data.splitlines()]

    def losses(self) -> list[float]:
        lines = self.history()
        assert [line["step"] for line in lines] == list(range(len(lines)))
        return [line["loss"] for line in lines]

    def batch_ids(self) -> list[float]:
        """What went into each step, as the workers counted it."""
        return [line["batch_id"] for line in self.history()]

    def planned_ids(self) -> list[int]:
        plan = make_plan(self.recipe, self.manifest)
        return [batch_id(ref for pack in plan.batch(step) for ref in pack) for step in range(plan.steps)]

    def student_folder(self, root: Path) -> Path:
        """The published student's folder; its key holds the lease's epoch."""
        return root / Path(read_published(self.storage, self.recipe.run_prefix)["student"]["key"]).parent

    def shard(self, step: int, rank: int) -> str:
        prefix = f"{self.recipe.run_prefix}/checkpoints/step-{step:08d}/"
        return next(i.key for i in self.storage.list(prefix) if f"zero_pp_rank_{rank}_" in i.key)


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
    # Ragged enough for the test to mean something: in the last batch one worker has nothing at all.
    assert len(curve) >= 8
    assert len(plan.batch(plan.steps - 1)) == 1
    return curve


class StopAfter5(Board):
    """Asks for a stop right after step 4, however fast the machine is."""

    def post(self, line: dict[str, float]) -> bool:
        return super().post(line) or line["step"] == 4


class KillAfter5(Board):
    """Kills one training worker right after step 4, the first time."""

    killed = False

    def post(self, line: dict[str, float]) -> bool:
        import psutil

        if line["step"] == 4 and not self.killed:
            self.killed = True
            raylet = psutil.Process().parent()
            assert raylet is not None
            workers = [p for p in raylet.children() if "TrainWorker" in "".join(p.cmdline()[:1])]
            assert len(workers) == 2, [p.cmdline()[:1] for p in raylet.children()]
            workers[1].kill()
        return super().post(line)


class FailAt3(Board):
    """Raises in the worker that has done step 3, every time."""

    met: Exception = ValueError("no such head")

    def start(self, step: int) -> None:
        super().start(step)
        self.note(f"group {step}")

    def post(self, line: dict[str, float]) -> int:
        if line["step"] == 3:
            raise self.met
        return super().post(line)


class OutOfMemoryAt3(FailAt3):
    met = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def listener(stop: threading.Event | None = None) -> Any:
    """A progress display class that keeps its notes and sets `stop` once five steps are shown."""

    class Listener(Progress):
        notes: ClassVar[list[str]] = []
        shown = 0

        def advance(self, count: int = 1, **fields: Any) -> None:
            super().advance(count, **fields)
            self.shown += count
            # Not before: the driver's own stop would then come at a step that depends on the machine's speed.
            if stop is not None and self.shown >= 5:
                stop.set()

        def note(self, text: str) -> None:
            super().note(text)
            self.notes.append(text)

    return Listener


def stop_after_5(run: Run) -> None:
    stop = threading.Event()
    with pytest.raises(StoppedError):
        run.train(stop, listener(stop), StopAfter5)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_zero_stages_give_the_loss_curve_of_a_plain_float32_loop(
    root: Path, reference: list[float], stage: int
) -> None:
    run = new_run(root, f"zero{stage}", train={"zero_stage": stage})
    entry = run.train()
    assert run.losses() == pytest.approx(reference, rel=1e-5)
    assert run.batch_ids() == run.planned_ids()
    assert entry["step"] == len(reference)
    assert entry == run.train(), "a published student is not trained again"


@pytest.mark.long
def test_stop_then_two_broken_checkpoints_fall_back_and_end_at_the_same_loss(
    root: Path, reference: list[float]
) -> None:
    run = new_run(root, "stopped")
    stop_after_5(run)
    published = read_published(run.storage, run.recipe.run_prefix)
    steps = sorted(e["step"] for name, e in published.items() if name.startswith("checkpoint/"))
    assert len(steps) == 3
    assert steps[-1] == len(run.history()) < len(reference)
    run.storage.delete(run.shard(steps[-1], rank=0))
    damaged = run.shard(steps[-2], rank=1)
    data = bytearray(run.storage.get(damaged))
    data[len(data) // 2] ^= 1
    run.storage.put(damaged, bytes(data))
    seen = listener()
    run.train(progress=seen)
    assert "is missing" in seen.notes[0]
    assert "SHA-256" in seen.notes[1]
    assert run.losses() == pytest.approx(reference, rel=1e-5)
    assert run.batch_ids() == run.planned_ids()


@pytest.mark.long
def test_another_number_of_workers_goes_on_from_the_checkpoint_and_ends_at_the_same_loss(
    root: Path, reference: list[float]
) -> None:
    run = new_run(root, "worlds")
    stop_after_5(run)
    other = new_run(root, "worlds", train={"seed": 1})
    with pytest.raises(UserError, match=r"batches of plan .* now give plan .* start a new --version"):
        other.train()
    other = new_run(root, "worlds", train={"zero_stage": 1})
    with pytest.raises(UserError, match="saved at ZeRO stage 2"):
        other.train()
    alone = new_run(root, "worlds", train={"workers": {"min": 1, "max": 1}})
    seen = listener()
    alone.train(progress=seen)
    assert alone.losses() == pytest.approx(reference, rel=1e-5)
    assert alone.batch_ids() == run.planned_ids()
    assert [note for note in seen.notes if "saved by 2 workers; converted for any number" in note] == seen.notes[:1]


@pytest.mark.long
def test_killed_worker_restarts_from_the_checkpoint_and_ends_at_the_same_loss(
    root: Path, reference: list[float]
) -> None:
    run = new_run(root, "crash")
    entry = run.train(board=KillAfter5)
    assert run.losses() == pytest.approx(reference, rel=1e-5)
    _a_group_started_after_publication_leaves_everything_as_it_is(run, entry)


@pytest.mark.long
@pytest.mark.parametrize(
    ("board", "groups", "says"),
    [
        (FailAt3, 1, "training met .*ValueError.* at step 3, which another try would meet again"),
        (OutOfMemoryAt3, 2, r"out of memory at step 3 a second time: .*Lower train.micro_batch_packs=1"),
    ],
)
def test_what_a_retry_cannot_mend_ends_the_run_at_once(
    root: Path, reference: list[float], board: type[Board], groups: int, says: str
) -> None:
    run, seen = new_run(root, board.__name__, train={"max_failures": 5}), listener()
    with pytest.raises(DistillError, match=says):
        run.train(progress=seen, board=board)
    assert len([note for note in seen.notes if note.startswith("group ")]) == groups
    seen = listener()
    run.train(progress=seen)
    assert run.losses() == pytest.approx(reference, rel=1e-5)


def _a_group_started_after_publication_leaves_everything_as_it_is(run: Run, entry: dict[str, Any]) -> None:
    def everything() -> dict[str, str]:
        """But what every command leaves: its lease, and what it has spent."""
        found = run.storage.list(run.recipe.run_prefix)
        return {i.key: i.version for i in found if "lease" not in i.key and "/usage/" not in i.key}

    before = everything()
    seen = listener()
    found = [None, entry]  # the driver is made to start a group, as Ray Train does when a worker dies at the very end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "published_student", lambda *_: found.pop(0))
        assert run.train(progress=seen) == entry
    assert everything() == before
    assert found == []


@pytest.mark.long
def test_a_cluster_without_room_for_the_workers_is_said_and_ends_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_SAY_WAITING_S", 0.5)
    run = new_run(root, "no-room", train={"workers": {"min": 9, "max": 9}})
    seen, threads = listener(), set(threading.enumerate())
    with pytest.raises(UserError, match=r"after \d+ s: train\.workers\.max=9 needs 9 CPU; the cluster has 4 CPU \("):
        run.train(progress=seen, placement_wait_s=3.0)
    assert seen.notes[0].startswith("waiting for resources: train.workers.max=9 needs 9 CPU; the cluster has 4 CPU")
    assert len(seen.notes) == 1
    # One that waits in Ray's core worker would crash this process at its next `ray.init()`.
    assert set(threading.enumerate()) <= threads, "threads left behind"


@pytest.mark.long
def test_lora_trains_adapters_only_and_merges(root: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run = new_run(
        root,
        "lora",
        student={"teacher_layers": [1], "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "up_proj"]}},
    )
    run.train()
    folder = run.student_folder(root)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    teacher = AutoModelForCausalLM.from_pretrained(run.recipe.teacher.model, dtype=torch.float32).state_dict()
    changed = {n for n, w in trained.items() if not torch.equal(w, teacher[n.replace("layers.0", "layers.1")])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    update = trained["model.layers.0.mlp.up_proj.weight"] - teacher["model.layers.1.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(update, atol=1e-5) <= 2


LORA = {"teacher_layers": [1], "lora": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "up_proj"]}}
BF16, RECOMPUTED = {"precision": "bf16"}, {"gradient_checkpointing": True}
MODES = [
    pytest.param(
        {"train": {"zero_stage": 3, **BF16, **RECOMPUTED}, "student": LORA}, None, id="all", marks=pytest.mark.slow
    ),
    pytest.param({"train": BF16}, 0.05, id="bf16", marks=pytest.mark.slow),
    pytest.param({"train": RECOMPUTED}, 1e-5, id="recomputed", marks=pytest.mark.slow),
    pytest.param({"train": {"zero_stage": 3}, "student": LORA}, None, id="lora-zero3", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sections", "rel"), MODES)
def test_bf16_recomputation_and_adapters_resume_bit_equal(
    root: Path,
    reference: list[float],
    sections: dict[str, dict[str, object]],
    rel: float | None,
    request: pytest.FixtureRequest,
) -> None:
    whole, cut = (new_run(root, f"{name}-{request.node.callspec.id}", **sections) for name in ("whole", "cut"))
    whole.train()
    stop_after_5(cut)
    assert 5 <= len(cut.history()) < len(whole.history())
    cut.train()
    assert cut.losses() == whole.losses()
    weights = [(run.student_folder(root) / "model.safetensors").read_bytes() for run in (whole, cut)]
    assert weights[0] == weights[1]
    assert all(line["grad_norm"] > 0 for line in whole.history())
    if rel is not None:
        assert whole.losses() == pytest.approx(reference, rel=rel)


@pytest.mark.long
def test_a_student_equal_to_its_teacher_has_kl_below_1e_3_at_every_position(root: Path) -> None:
    """Capture, codec, store, plan, packs, engine, loss and export: nothing on the way may move a token or a row."""
    import torch

    from distill_ray.losses import head_metrics
    from distill_ray.student.build import build_initial
    from distill_ray.student.module import DistillModule, loss_spec

    run = new_run(
        root,
        "same",
        student={"teacher_layers": [0, 1]},
        train={"learning_rate": 1e-12, "weight_decay": 0.0, "epochs": 1},
    )
    run.train()
    assert all(0 <= line["kl_t1"] < 1e-3 and 0 <= line["kl_t"] < 1e-3 for line in run.history())

    trained = run.recipe.model_copy(update={"student": StudentSection(model=str(run.student_folder(root)))})
    model, config = build_initial(trained, tiny_teacher_folder())
    module = DistillModule(model, loss_spec(config, TINY_VOCAB, run.recipe.loss))
    plan = make_plan(run.recipe, run.manifest)
    worst, rows = 0.0, 0
    with PackLoader(run.storage, run.manifest.identity, plan, micro_batch_packs=2) as batches, torch.no_grad():
        for batch in batches:
            hidden_ND = module.hidden_rows(batch)
            figures = head_metrics(hidden_ND, module.head.weight, None, batch.targets, vocab_size=TINY_VOCAB)
            worst, rows = max(worst, float(figures.kl_N.max())), rows + len(figures.kl_N)
    assert rows == sum(line["tokens"] for line in run.history())
    assert worst < 1e-3
