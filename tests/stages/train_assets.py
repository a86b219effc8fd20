"""Captured targets of the tiny teacher, and the plain float32 loop that training must agree with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_ray import capture, targets, teacher
from distill_ray.config import Recipe, parse_recipe
from distill_ray.ingest import BatchPlan, SeqRef
from distill_ray.lease import Lease
from distill_ray.schema import Sequence, SourceSlice, TargetRows, Unit
from distill_ray.storage import Storage
from tests.assets import TINY_VOCAB, tiny_teacher_folder

TOP_K = 16
TEMPERATURE = 2.0


def tiny_recipe(root: Path | str, version: str = "v1", **sections: dict[str, object]) -> Recipe:
    """Two CPU workers, fp32, three packs a batch, so that one worker's second micro-batch is always empty."""
    base: dict[str, dict[str, object]] = {
        "storage": {"root": str(root)},
        "corpus": {"sources": ["unused.jsonl"], "window_tokens": 48, "holdout": 0.0},
        "teacher": {"model": str(tiny_teacher_folder()), "engine": "transformers", "use_gpu": False},
        "capture": {"top_k": TOP_K, "temperatures": [1.0, TEMPERATURE]},
        "student": {"teacher_layers": [1]},
        "loss": {"temperature": TEMPERATURE, "hard_label_weight": 0.2},
        "train": {
            "epochs": 2,
            "global_batch_tokens": 3 * 64,
            "pack_tokens": 64,
            "learning_rate": 5e-3,
            "warmup_fraction": 0.1,
            "schedule": "wsd",
            "decay_fraction": 0.9,  # whatever resumes here does so while the rate falls
            "weight_decay": 0.1,
            "clip_norm": 0.7,
            "precision": "fp32",
            "workers": {"min": 2, "max": 2},
            "zero_stage": 2,
            "use_gpu": False,
            "checkpoint_every": 2,
            "keep_checkpoints": 3,
            "max_failures": 1,
        },
    }
    for name, values in sections.items():
        base[name] = values if name == "student" else {**base.get(name, {}), **values}
    return parse_recipe({"name": "tiny", "version": version, **base})


def make_targets(storage: Storage, recipe: Recipe, *, sequences: int = 36) -> targets.RunManifest:
    """Capture ragged random sequences with the recipe's own engine and write the run's manifest."""
    rng = np.random.default_rng(7)
    identity = capture.capture_identity(recipe)
    engine = teacher.open_engine(recipe.teacher, recipe.capture, recipe.corpus.window_tokens)
    units, summaries = [], {}
    for u in range(2):
        unit = Unit(f"{u:032x}", SourceSlice("file.jsonl", "0" * 64, "file", 0, 1), 1)
        made = [_sequence(rng, doc=100 * u + i) for i in range(sequences // 2)]
        rows = [r for r in engine.score([s.tokens for s in made]) if isinstance(r, TargetRows)]
        assert len(rows) == len(made)
        data, summary = targets.encode_unit(identity, unit, made, rows, [], 0.0)
        storage.put(targets.unit_key(identity, unit.hash), data)
        units.append(unit)
        summaries[unit.hash] = summary
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        entry = targets.write_run_manifest(storage, lease.token, identity, units, summaries)
    return targets.read_run_manifest(storage, entry)


def _sequence(rng: np.random.Generator, doc: int) -> Sequence:
    n = int(rng.integers(2, 48))
    mask = rng.random(n) < rng.choice([0.2, 0.6, 1.0])  # ragged: per-micro-batch means would differ
    mask[0], mask[-1] = False, True
    return Sequence(rng.integers(3, TINY_VOCAB, n).astype(np.int32), mask, doc)


@dataclass
class PlainLoop:
    """The reference: one process, float32, one sequence at a time, dense formulas, AdamW and clipping by hand."""

    recipe: Recipe
    manifest: targets.RunManifest
    storage: Storage

    def losses(self, plan: BatchPlan) -> list[float]:
        """Loss of every step of the plan."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.recipe.teacher.model, dtype=torch.float32)
        layers = self.recipe.student.teacher_layers
        assert layers is not None
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        parameters = list(model.parameters())
        first = [torch.zeros_like(p) for p in parameters]
        second = [torch.zeros_like(p) for p in parameters]
        curve = []
        for step in range(plan.steps):
            refs = [ref for pack in plan.batch(step) for ref in pack]
            total = torch.zeros(())
            count = sum(ref.supervised for ref in refs)
            for ref in refs:
                total = total + self._sequence_loss(model, ref)
            loss = total / count
            grads = list(torch.autograd.grad(loss, parameters))
            curve.append(float(loss.detach()))
            self._adamw(step, plan.steps, parameters, grads, first, second)
        return curve

    def _sequence_loss(self, model: torch.nn.Module, ref: SeqRef) -> Tensor:
        unit = targets.read_unit(self.storage, self.manifest.identity, ref.unit)
        stored = unit.sequence(ref.index)
        tokens = torch.from_numpy(stored.tokens.astype(np.int64))
        rows = torch.from_numpy(np.flatnonzero(stored.loss_mask[1:]))
        z = model(tokens[None]).logits[0, rows, :TINY_VOCAB]
        taught = unit.rows(ref.index, temperature=TEMPERATURE)
        ids = torch.from_numpy(taught.ids_NK.astype(np.int64))[rows]
        log_p = torch.from_numpy(taught.logprobs_NK)[rows]
        log_tail = torch.from_numpy(taught.log_tail_N)[rows]
        log_q = (z / TEMPERATURE).log_softmax(-1)
        kept_q = log_q.gather(1, ids)
        tail_q = log_q.scatter(1, ids, -math.inf).logsumexp(1)
        kl = (log_p.exp() * (log_p - kept_q)).sum() + (log_tail.exp() * (log_tail - tail_q)).sum()
        ce = -z.log_softmax(-1).gather(1, tokens[1:][rows][:, None]).sum()
        alpha = self.recipe.loss.hard_label_weight
        return (1 - alpha) * TEMPERATURE**2 * kl + alpha * ce

    def _adamw(
        self,
        step: int,
        steps: int,
        parameters: list[torch.nn.Parameter],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
    ) -> None:
        train = self.recipe.train
        norm = float(torch.sqrt(torch.stack([(g.double() ** 2).sum() for g in grads]).sum()))
        shrink = min(1.0, train.clip_norm / (norm + 1e-6))
        warmup = math.ceil(train.warmup_fraction * steps)
        if step < warmup:
            lr = train.learning_rate * (step + 1) / warmup
        else:
            falling = min(1.0, (steps - 1 - step) / math.ceil(train.decay_fraction * steps))
            lr = train.learning_rate * (train.final_lr_fraction + (1 - train.final_lr_fraction) * falling)
        b1, b2 = train.betas
        with torch.no_grad():
            for p, g, m, v in zip(parameters, grads, first, second, strict=True):
                g = g * shrink
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                p.mul_(1 - lr * train.weight_decay * (p.ndim > 1))
                m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
                p.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
