"""A training step on soft targets beside the same step on hard labels, at ZeRO-1 and ZeRO-3, and how full packs are.

Real: two worker processes of one core each under torch.distributed (gloo) and DeepSpeed, the product's engine, module
and packed batches, AdamW, float32; a head of SmolLM2's size (49,152 × 576) on a body of few layers, so that the head
is most of the work. Both steps take the same batches through the same code; on hard labels torch's
`F.linear_cross_entropy`, pinned to its fast setting, stands where the product's fused loss does (default recipe:
`bucket`, k = 64, α = 0.1). Both engines live in the same processes and step in turns. Simulated: weights and targets
are random, and batches lie ready in memory: what decoding them costs is the `ingest` bench's.

`step.packing_fill` is that of the product's plan over a log-normal mix of document lengths, numbers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.codec import CODEC_VERSION
from distill_ray.config.loss import LossSection
from distill_ray.config.student import TrainSection
from distill_ray.ingest import build_plan
from distill_ray.ingest.batch import PackedBatch
from distill_ray.losses import LossSpec, SparseTargets
from distill_ray.schema import UnitSummary
from distill_ray.student.engine import StudentEngine
from distill_ray.student.module import DistillModule, HeadLoss
from distill_ray.targets import CaptureIdentity, ManifestUnit, RunManifest
from tests.bench.loss import RIVAL
from tests.bench.measure import medians
from tests.ranks import spawn

VOCAB, K, WORLD, STAGES = 49_152, 64, 2, (1, 3)
DOCUMENT = 512
STEPS = 1000
"""That the learning rate's schedule is told of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each kind and stage (default 7)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, each worker (default 1,024)")
    parser.add_argument("--width", type=int, default=576, help="of the model (default 576)")
    parser.add_argument("--layers", type=int, default=4, help="of its body (default 4)")
    parser.add_argument("--sequences", type=int, default=200_000, help="that are packed (default 200,000)")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `step.*`; `kd_over_ce` is the lesser of both stages'."""
    figures = {"step.packing_fill": packing_fill(arguments.sequences)}
    sizes = (arguments.tokens, arguments.width, arguments.layers, arguments.repeats)
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_work, (folder, stage, *sizes), WORLD)
            seconds = json.loads((Path(folder) / "seconds.json").read_text())
        for kind, taken in seconds.items():
            figures[f"step.zero{stage}_{kind}_tokens_per_s"] = WORLD * arguments.tokens / taken
        figures[f"step.kd_over_ce_zero{stage}"] = seconds["ce"] / seconds["kd"]
    return figures | {"step.kd_over_ce": min(figures[f"step.kd_over_ce_zero{stage}"] for stage in STAGES)}


class HardLabels(HeadLoss):
    """The same head on hard labels alone, by torch's fused loss."""

    def forward(self, hidden_ND: Tensor, targets: SparseTargets, spec: LossSpec) -> Tensor:
        loss = F.linear_cross_entropy(hidden_ND, self.weight, targets.labels_N, reduction="sum", options=RIVAL)
        loss = loss.double()[None]
        none = torch.zeros(4, dtype=torch.float64)
        count = torch.tensor([len(targets)], dtype=torch.float64)
        return torch.cat([loss, none[:2], loss.detach(), none[2:], count])


def student(width: int, layers: int, hard: bool) -> DistillModule:
    """The model with either loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    loss = LossSection()
    module = DistillModule(
        LlamaForCausalLM(config),
        LossSpec(VOCAB, loss.temperature, loss.hard_label_weight, loss.objective),
    )
    if hard:
        module.head = HardLabels(module.head.weight, module.head.bias, module.head.spec)
    return module


def batch(tokens: int, rank: int) -> PackedBatch:
    """One full pack of documents of DOCUMENT tokens, every one but their first supervised."""
    generator = torch.Generator().manual_seed(rank)
    count = tokens // DOCUMENT
    ids = torch.randint(VOCAB, (1, tokens), generator=generator)
    rows = (torch.arange(count)[:, None] * DOCUMENT + torch.arange(DOCUMENT - 1)).flatten()
    kept = (torch.randint(VOCAB, (len(rows), 1), generator=generator) + torch.arange(K) * (VOCAB // K)) % VOCAB
    logprobs = ((-1.3 * torch.arange(1, K + 1).log()).log_softmax(0) - 0.1).expand(len(rows), K).contiguous()
    log_tail = torch.full((len(rows),), -0.1).expm1().neg().log()
    empty = torch.zeros(len(rows))
    return PackedBatch(
        ids,
        torch.arange(tokens)[None] % DOCUMENT,
        torch.arange(tokens)[None] // DOCUMENT,
        rows,
        SparseTargets(kept, logprobs, log_tail, ids[0, rows + 1]),
        empty,
        empty.long(),
        tokens,
        supervised=WORLD * len(rows),
    )


def _work(rank: int, folder: str, stage: int, tokens: int, width: int, layers: int, repeats: int) -> None:
    """One of the two workers; the first one writes the seconds."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)}
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0", **place)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    section = TrainSection(precision="fp32", use_gpu=False, zero_stage=stage, learning_rate=1e-4)
    mine = batch(tokens, rank)

    def stepping(hard: bool) -> Callable[[], None]:
        engine = StudentEngine.start(student(width, layers, hard), section, micro_steps=1)

        def once() -> None:
            # The ranks begin together, and train_step ends with all of them.
            torch.distributed.barrier()
            engine.train_step(iter([mine]), STEPS)

        return once

    seconds = medians({"kd": stepping(hard=False), "ce": stepping(hard=True)}, repeats)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    torch.distributed.barrier()


def packing_fill(sequences: int, pack_tokens: int = 4096) -> float:
    """Share of the packs' tokens that hold data: documents of log-normal length, median 400, cut at a pack."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.0, 1.0, sequences), 2, pack_tokens).astype(np.int32)
    keys = rng.integers(0, 2**63, sequences, dtype=np.uint64)
    summary = UnitSummary("0" * 32, lengths, lengths - 1, keys, 1, "0" * 64, 0.0, 0, 0.0)
    identity = CaptureIdentity({"weights": "none"}, "none", VOCAB, K, (1.0,), CODEC_VERSION)
    manifest = RunManifest(identity, (ManifestUnit(summary, 1, "made up"),))
    return build_plan(manifest, holdout=0.0, split="train", pack_tokens=pack_tokens, packs_per_batch=64).fill
