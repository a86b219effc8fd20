"""What saving costs the training thread: in the product, by a synchronous save and upload, and by torch's own DCP.

Real: two worker processes of one core each under torch.distributed (gloo) and DeepSpeed ZeRO-1, float32, the product's
engine, saver, lease and checkpoint format, about 2 GB of state, a real S3 server (SeaweedFS) on the same two cores and
disk. In every round each way saves once, in turns:

- ours: `Saver.begin` between two steps, steps while the upload goes on, `Saver.land` once all ranks' files are stored;
  blocked is `Saver.take`, greatest over ranks. Then it is restored from the server, every file's digest is verified,
  and the weights are compared bit by bit with what they were at `begin`.
- synchronous: the same files, uploaded and published before the call returns.
- `torch.distributed.checkpoint.async_save`, by default in a thread, of the same tensors on the same ranks, to local
  disk; blocked is the call. No step runs while it writes.

`checkpoint.blocked_fraction` is ours over synchronous, `checkpoint.blocked_vs_dcp_async` ours over DCP's.
`checkpoint.added_step_s` is by how much the median step is longer while an upload goes on: server, hashing and training
share two cores here, which they do not on a cluster. Simulated: weights and data are random, and batches are small.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from distill_ray import checkpoints
from distill_ray.checkpoints import StoredFile
from distill_ray.config.student import TrainSection
from distill_ray.lease import Lease, LeaseToken
from distill_ray.storage import Storage, open_storage
from distill_ray.student.engine import StudentEngine
from distill_ray.train.saving import Saver
from distill_ray.train.scratch import Scratch
from tests.bench.measure import LEAST_REPEATS
from tests.bench.step import STEPS, VOCAB, WORLD, batch, student
from tests.ranks import spawn
from tests.s3server import S3Server

RUN = "runs/bench/v1"
STATE_BYTES = 16
"""Of one parameter in float32: weight, master copy, two moments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=LEAST_REPEATS, help=f"saves of each way (default {LEAST_REPEATS})"
    )
    parser.add_argument("--mib", type=int, default=2048, help="of state, over both workers, about (default 2048)")
    parser.add_argument("--width", type=int, default=1024, help="of the model (default 1024)")
    parser.add_argument("--quiet-steps", type=int, default=3, help="steps without an upload, each round (default 3)")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `checkpoint.*`, medians over rounds.

    Raises:
        AssertionError: a restored checkpoint is not the state that was saved.
    """
    if arguments.rounds < LEAST_REPEATS:
        raise ValueError(f"{arguments.rounds} rounds; a median here takes at least {LEAST_REPEATS}")
    layer = 12 * arguments.width**2
    layers = max(1, round(((arguments.mib << 20) / STATE_BYTES - VOCAB * arguments.width) / layer))
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder)) as server:
        sizes = (arguments.width, layers, arguments.rounds, arguments.quiet_steps)
        spawn(_work, (folder, server.root, server.env, *sizes), WORLD)
        return figures(json.loads((Path(folder) / "rounds.json").read_text()))


def figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds, and their ratios."""
    blocked = {way: statistics.median(r[way] for r in rounds) for way in ("ours", "synchronous", "dcp_async")}
    quiet, busy = (statistics.median(s for r in rounds for s in r[name]) for name in ("quiet_steps", "busy_steps"))
    return {
        "checkpoint.blocked_fraction": blocked["ours"] / blocked["synchronous"],
        "checkpoint.blocked_vs_dcp_async": blocked["ours"] / blocked["dcp_async"],
        **{f"checkpoint.{way}_blocked_s": seconds for way, seconds in blocked.items()},
        "checkpoint.step_s": quiet,
        "checkpoint.added_step_s": busy - quiet,
        "checkpoint.in_flight_s": statistics.median(r["in_flight"] for r in rounds),
        "checkpoint.state_mib": statistics.median(r["bytes"] for r in rounds) / 2**20,
    }


class Worker:
    """One rank: a student that trains, and the ways to save it."""

    def __init__(self, storage: Storage, token: LeaseToken, width: int, layers: int, scratch: Path) -> None:
        section = TrainSection(precision="fp32", use_gpu=False, zero_stage=1, learning_rate=1e-4)
        self.module = student(width, layers, hard=False)
        self.engine = StudentEngine.start(self.module, section, micro_steps=1)
        self.storage, self.token, self.scratch = storage, token, scratch
        self.saver = Saver(storage, token)
        self.batch = batch(512, self.engine.rank)
        self.step = 0

    def train(self) -> tuple[float, int]:
        """(seconds of one step, ranks whose files have arrived)."""
        begun = time.perf_counter()
        result = self.engine.train_step(iter([self.batch]), STEPS, arrived=int(self.saver.arrived))
        self.step += 1
        return time.perf_counter() - begun, result.arrived

    def publish(self, step: int) -> Callable[[list[StoredFile]], None]:
        def act(files: list[StoredFile]) -> None:
            sizes = {"loss": 0.0, "world_size": WORLD, "zero_stage": 1, "plan": "bench"}
            checkpoints.publish(self.storage, self.token, step, files, **sizes)  # type: ignore[arg-type]

        return act

    def ours(self) -> dict[str, Any]:
        """The product's way, and proof that what it stored is what was there."""
        at, weights = self.step, [p.detach().clone() for p in self.module.parameters()]
        dist.barrier()
        begun = time.perf_counter()
        self.saver.begin(at, self.engine.stage, self.publish(at))
        busy = list[float]()
        while self.saver.in_flight:
            seconds, arrived = self.train()
            busy.append(seconds)
            if arrived == WORLD:
                self.saver.land()
        in_flight, blocked = time.perf_counter() - begun, self.saver.take()
        self.saver.drain()
        dist.barrier()
        return {"ours": blocked, "busy_steps": busy, "in_flight": in_flight, "bytes": self.restored(at, weights)}

    def restored(self, step: int, weights: list[Tensor]) -> int:
        """Restore what the run's record names, and compare; all ranks' bytes."""
        manifest = checkpoints.latest_whole(self.storage, RUN)
        assert manifest is not None
        assert manifest.step == step, f"step {manifest.step} is the newest, not {step}"
        with Scratch("restore") as own:
            names = self.engine.needed([f.name for f in manifest.files], self.engine.rank)
            folder = checkpoints.restore(self.storage, manifest, names, Path(own))
            (common,) = folder.glob("mp_rank_*_model_states.pt")
            stored = torch.load(common, weights_only=False)["module"]
            for (name, parameter), weight in zip(self.module.named_parameters(), weights, strict=True):
                assert torch.equal(stored[name], weight), f"{name} came back otherwise than it was saved"
                assert not torch.equal(parameter, weight), f"{name} stood still, so the comparison says nothing"
        return sum(f.size for f in manifest.files)

    def synchronous(self) -> float:
        """The same files, and nothing goes on until they count."""
        dist.barrier()
        begun = time.perf_counter()
        with Scratch("save") as folder:
            files = checkpoints.upload(self.storage, self.token, self.step, self.written(Path(folder)))
        everyone: list[Any] = [None] * WORLD
        dist.all_gather_object(everyone, files)
        if self.engine.rank == 0:
            self.publish(self.step)([f for files in everyone for f in files])
        dist.barrier()
        return time.perf_counter() - begun

    def written(self, folder: Path) -> list[Path]:
        """The same files straight from the state, with no copy in between."""
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        engine: Any = self.engine._engine
        copying, engine.checkpoint_engine = engine.checkpoint_engine, TorchCheckpointEngine(engine._config)
        engine.save_checkpoint(str(folder), tag="state", save_latest=False)
        engine.checkpoint_engine = copying
        return sorted(p for p in (folder / "state").iterdir() if p.is_file())

    def dcp_async(self) -> float:
        """DCP's call alone; its writing is waited for before anything else."""
        state, folder = self.state(), [str(self.scratch / f"dcp-{self.step}")]
        dist.barrier()
        begun = time.perf_counter()
        saving = dcp.async_save(state, checkpoint_id=folder[0])
        seconds = time.perf_counter() - begun
        saving.result()  # type: ignore[union-attr]
        dist.barrier()
        if self.engine.rank == 0:
            shutil.rmtree(folder[0])
        return seconds

    def state(self) -> dict[str, Tensor]:
        """The tensors of this rank's files: its share of the optimizer's, and on rank 0 the weights."""
        rank, optimizer = self.engine.rank, self.engine._optimizer
        parts = {f"{rank}.master.{i}": t for i, t in enumerate(optimizer.single_partition_of_fp32_groups)}
        for i, moments in enumerate(optimizer.optimizer.state.values()):
            parts |= {f"{rank}.{name}.{i}": t for name, t in moments.items()}
        if rank == 0:
            parts |= {name: p.detach() for name, p in self.module.named_parameters()}
        return parts


def _work(
    rank: int, folder: str, root: str, env: dict[str, str], width: int, layers: int, rounds: int, quiet_steps: int
) -> None:
    """One of the two workers; the first one holds the lease and writes the rounds."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)}
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **place, **env)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    storage = open_storage(f"{root}/bench")
    lease = Lease.acquire(storage, RUN) if rank == 0 else None
    box = [lease.token if lease else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    worker = Worker(storage, box[0], width, layers, Path(folder))
    found = [_round(worker, quiet_steps) for _ in range(rounds + 1)]
    if rank == 0:
        (Path(folder) / "rounds.json").write_text(json.dumps(found[1:]))  # the first one only warms up
    dist.barrier()
    if lease:
        lease.release()


def _round(worker: Worker, quiet_steps: int) -> dict[str, Any]:
    """Each way once; what blocks is the greatest over ranks."""
    quiet = [worker.train()[0] for _ in range(quiet_steps)]
    ours = worker.ours()
    ways = {"ours": ours.pop("ours"), "synchronous": worker.synchronous(), "dcp_async": worker.dcp_async()}
    blocked = torch.tensor(list(ways.values()), dtype=torch.float64)
    dist.all_reduce(blocked, dist.ReduceOp.MAX)
    worker.train()  # the next save is of another step
    return {**ours, **dict(zip(ways, blocked.tolist(), strict=True)), "quiet_steps": quiet}
