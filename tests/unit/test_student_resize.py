"""Two ranks save, one rank or four go on: after conversion the losses are those of the run that was never stopped."""

from __future__ import annotations

import json
import os
from dataclasses import replace
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
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model

STEPS, SAVED, PACKS = 4, 2, 4


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


def _train(rank: int, world: int, folder: str, stage: int, start: int, stop: int) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **place)
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}-{start}-{stop}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    section = TrainSection(
        precision="fp32", use_gpu=False, zero_stage=stage, learning_rate=1e-2, clip_norm=1.0, warmup_fraction=0.0
    )
    module = DistillModule(tiny_model(tiny_config(tie_word_embeddings=True)), LossSpec(VOCAB, 1.0, 0.2))
    engine = StudentEngine.start(module, section, micro_steps=PACKS // world)
    if start:
        engine.load(Path(folder) / "resized", universal=True)
    batches = iter(_batches(rank, world, start, stop))
    losses = [engine.train_step(batches, STEPS).loss for _ in range(start, stop)]
    if stop == SAVED:
        # Written after one more step: what is saved is the state at the call.
        write = engine.stage(Path(folder) / "saved")
        engine.train_step(iter(_batches(rank, world, stop, stop + 1)), STEPS)
        write()
    (Path(folder) / f"losses-{world}-{start}-{stop}.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


def _losses(folder: Path, stage: int, world: int, start: int, stop: int) -> list[float]:
    torch.multiprocessing.spawn(_train, args=(world, str(folder), stage, start, stop), nprocs=world)
    return json.loads((folder / f"losses-{world}-{start}-{stop}.json").read_text())


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)])
def test_a_converted_checkpoint_goes_on_at_another_size_as_if_never_stopped(tmp_path: Path, stage: int):
    whole = _losses(tmp_path, stage, 2, 0, STEPS)
    assert _losses(tmp_path, stage, 2, 0, SAVED) == whole[:SAVED]
    place = StudentEngine.place
    convert(place(tmp_path / "saved"), place(tmp_path / "resized"), stage, processes=2)
    for world in (1, 4) if stage == 2 else (1,):
        assert _losses(tmp_path, stage, world, SAVED, STEPS) == pytest.approx(whole[SAVED:], rel=1e-5)


def test_a_conversion_that_fails_says_what_deepspeed_said(tmp_path: Path):
    (tmp_path / "saved").mkdir()
    with pytest.raises(DistillError, match=r"could not convert the checkpoint in .* \(exit 1\): .*\w+Error"):
        convert(tmp_path / "saved", tmp_path / "out", 2, processes=1)
