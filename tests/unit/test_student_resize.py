"""Two ranks save, one, two or four go on: losses and weights end as those of the run that was never stopped."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_ray.config.student import TrainSection
from distill_ray.errors import DistillError
from distill_ray.ingest.batch import PackedBatch
from distill_ray.losses import LossSpec
from distill_ray.student.engine import StudentEngine
from distill_ray.student.module import DistillModule
from distill_ray.student.universal import convert
from tests.ranks import spawn
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model

STEPS, PACKS = 4, 4
SAVED = {1: 1, 2: 2, 3: 3}
"""Steps done when the run is stopped, by ZeRO stage."""


def _batches(rank: int, world: int, start: int, stop: int) -> list[PackedBatch]:
    """This rank's micro-batches of steps [start, stop): four packs a step, dealt out in turn."""
    rng = np.random.default_rng(3)
    found = []
    for step in range(stop):
        packs = [pack(rng, documents(rng, 3), 27, 0.7) for _ in range(PACKS)]
        supervised = sum(len(p.rows) for p in packs)
        mine = packs[rank::world]
        found += [
            replace(p, step=step, supervised=supervised, micro=i, micro_steps=len(mine))
            for i, p in enumerate(mine)
            if step >= start
        ]
    return found


@dataclass(frozen=True)
class Leg:
    """One worker group's part of a run."""

    world: int
    stage: int
    start: int
    stop: int
    keep: bool = True
    """Whether the state of the last step is saved."""

    @property
    def name(self) -> str:
        return f"{self.world}-{self.start}-{self.stop}"


def _train(rank: int, folder: Path, leg: Leg) -> None:
    world = leg.world
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **place)
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{leg.name}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    section = TrainSection(
        precision="fp32", use_gpu=False, zero_stage=leg.stage, learning_rate=1e-2, clip_norm=1.0, warmup_fraction=0.0
    )
    module = DistillModule(tiny_model(tiny_config(tie_word_embeddings=True)), LossSpec(VOCAB, 1.0, 0.2))
    engine = StudentEngine.start(module, section, micro_steps=PACKS // world)
    if leg.start:
        resized = world != 2
        engine.load(folder / ("resized" if resized else f"saved-{rank}"), universal=resized)
    batches = iter(_batches(rank, world, leg.start, leg.stop))
    losses = [engine.train_step(batches, STEPS).loss for _ in range(leg.start, leg.stop)]
    weights = engine.export_state()
    if leg.keep:
        # Written after one more step: what is saved is the state at the call.
        write = engine.stage(folder / f"saved-{rank}")
        engine.train_step(iter(_batches(rank, world, leg.stop, leg.stop + 1)), STEPS)
        write()
    if rank == 0:
        torch.save((losses, weights), folder / f"end-{leg.name}.pt")


def _end(folder: Path, leg: Leg) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the leg's steps and the weights after them."""
    spawn(_train, (folder, leg), leg.world)
    return torch.load(folder / f"end-{leg.name}.pt")


def _gather(folder: Path) -> None:
    """What upload and download do: every rank has the files it needs, and the converter all of them."""
    place, needed = StudentEngine.place, StudentEngine.needed
    files = {file.name: file for rank in (0, 1) for file in place(folder / f"saved-{rank}").iterdir()}
    for to in (folder / "all", *(place(folder / f"saved-{rank}") for rank in (0, 1))):
        to.mkdir(exist_ok=True)
        names = files if to == folder / "all" else needed(list(files), int(to.parent.name[-1]))
        for name in names:
            if not (to / name).exists():
                shutil.copyfile(files[name], to / name)


def _far(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """‖Δθ‖ / ‖θ‖ over all weights."""
    assert one.keys() == other.keys()
    distance, size = (
        torch.stack([x.double().norm() for x in tensors]).norm()
        for tensors in ([other[name] - one[name] for name in one], list(one.values()))
    )
    return float(distance / size)


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stopped_run_goes_on_as_if_never_stopped_at_any_number_of_workers(tmp_path: Path, stage: int):
    saved = SAVED[stage]
    losses, weights = _end(tmp_path, Leg(2, stage, 0, STEPS, keep=False))
    assert _end(tmp_path, Leg(2, stage, 0, saved))[0] == losses[:saved]
    _gather(tmp_path)
    again, same = _end(tmp_path, Leg(2, stage, saved, STEPS, keep=False))
    assert again == losses[saved:]
    assert all(torch.equal(same[name], weights[name]) for name in weights), _far(weights, same)
    convert(tmp_path / "all", StudentEngine.place(tmp_path / "resized"), stage, processes=2)
    for world in (1, 4) if stage == 2 else (1,):
        resized, other = _end(tmp_path, Leg(world, stage, saved, STEPS, keep=False))
        assert resized == pytest.approx(losses[saved:], rel=1e-5)
        assert _far(weights, other) <= 1e-5


def test_a_conversion_that_fails_says_what_deepspeed_said(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    with pytest.raises(DistillError, match=r"could not convert the checkpoint in .* \(exit 1\): .*\w+Error"):
        convert(tmp_path / "saved", tmp_path / "out", 2, processes=1)
