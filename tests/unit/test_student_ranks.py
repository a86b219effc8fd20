"""Two ranks with very unequal shares of a batch, in two real processes: the gradient is that of the whole batch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill_ray.config.student import TrainSection
from distill_ray.ingest.batch import PackedBatch
from distill_ray.losses import LossSpec
from distill_ray.student.engine import StudentEngine
from distill_ray.student.module import DistillModule
from distill_ray.student.schedule import learning_rate
from tests.ranks import spawn
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model

SPEC = LossSpec(VOCAB, 1.0, 0.2)
SECTION = TrainSection(
    precision="fp32", use_gpu=False, zero_stage=2, learning_rate=1e-2, clip_norm=1e9, warmup_fraction=0.0
)
STEPS = 3


def _batches() -> list[list[PackedBatch]]:
    """[step][rank]: the first rank supervises a tenth of its tokens, the second one all, and in the end nothing."""
    rng = np.random.default_rng(2)
    found = []
    for step in range(STEPS):
        shares = (0.1, 1.0) if step < STEPS - 1 else (1.0, 0.0)
        parts = [pack(rng, documents(rng, 3), 27, share) for share in shares]
        supervised = sum(len(p.rows) for p in parts)
        found.append([replace(p, step=step, supervised=supervised) for p in parts])
    return found


def _train(rank: int, folder: str) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **place)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    module = DistillModule(tiny_model(tiny_config()), SPEC)
    engine = StudentEngine.start(module, SECTION, micro_steps=1)
    results = [engine.train_step(iter([parts[rank]]), STEPS) for parts in _batches()]
    lines = [[result.loss, result.grad_norm, result.tokens] for result in results]
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(lines))


def test_two_uneven_ranks_step_as_one_process_does(tmp_path: Path):
    spawn(_train, (str(tmp_path),), 2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]

    plain = DistillModule(tiny_model(tiny_config()), SPEC).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=SECTION.betas, weight_decay=0.0)
    for step, parts in enumerate(_batches()):
        loss = torch.stack([plain(b)[0] for b in parts]).sum() / parts[0].supervised
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, SECTION)
        optimizer.step()
        expected = [float(loss.detach()), float(norm), parts[0].supervised]
        assert ranks[0][step] == pytest.approx(expected, rel=1e-4)
