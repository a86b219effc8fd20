"""What each kind of target makes of a student: the orderings of the RS-KD paper (ACL 2025), seen or not.

Real: text (the standard library's prose and sources), a BPE of 8,192 ids trained on it, a Llama trained on one part of
it as teacher, students trained from random weights on another part that the teacher never saw, held-out text that
neither saw; targets made by the product's rows, codec and draws, losses the product's. Simulated: nothing but the size,
and there is no cluster: plain loops. The dense KL is plain torch's.

A student of every kind gets the same budget, batches, first weights and learning rate, at seeds 0, 1, 2. An
ordering is judged on the differences of each seed: 1 seen, −1 the contrary seen, 0 within noise (Student's t, 95 %).
"Near dense" is less than half of the way from dense to hard labels. Gradients are those of all weights on one batch at
the student that hard labels trained, and angles are to the dense gradient's. A gradient is unbiased where the mean over
redraws lies as far from the dense one as its standard error says: `bias_ratio` is that distance's square over its
expectation, 1 without bias; draws from a top 12 show how much a biased one has. Ids a row: `sampled_12` as many draws
as give 12 distinct ids on average, `head_tail_8_4` the top 8 and 4 draws: at most as many ids.

About 20 minutes on two cores, by timed steps of 0.18 s (teacher, one core) and 0.066 s (students): 2,540 of the first
on two cores, 39 times 469 of the others on one each. Both are timed again, and the estimate printed, before they begin.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_ray.losses import SparseTargets
from distill_ray.teacher.draws import DrawSpec
from distill_ray.teacher.seeds import row_keys
from tests.bench import lessons
from tests.bench.lessons import ROWS, Objective, Taught

SEEDS = (0, 1, 2)
KS, OBJECTIVES = (5, 12, 50), ("truncated", "renormalised", "bucket")
SAMPLED, HEAD, TAIL = "sampled_12", 8, 4
HEAD_TAIL = f"head_tail_{HEAD}_{TAIL}"
ARMS = ("ce", *(f"{o}_{k}" for k in KS for o in OBJECTIVES), SAMPLED, HEAD_TAIL, "dense")
T_95 = {2: 12.706, 3: 4.303}
"""Student's t by number of seeds."""
WORDS = {1: "seen", 0: "within noise", -1: "not seen"}
BIAS_LIMIT = 1.35
"""Of `bias_ratio`, whose own standard deviation is about 0.1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher-tokens", type=int, default=1_300_000, help="the teacher's text (default 1,300,000)")
    parser.add_argument("--student-tokens", type=int, default=240_000, help="the students' (default 240,000)")
    parser.add_argument("--held-out-tokens", type=int, default=20_000, help="scored (default 20,000)")
    parser.add_argument("--teacher-width", type=int, default=192, help="of 3 layers (default 192)")
    parser.add_argument("--student-width", type=int, default=64, help="of 2 layers (default 64)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="of 0, 1, 2 (default 3)")
    parser.add_argument("--redraws", type=int, default=400, help="for the check of bias (default 400)")
    parser.add_argument("--processes", type=int, default=2, help="students trained at once (default 2)")


@dataclass(frozen=True)
class Study:
    """All that a student's process needs."""

    taught: Taught
    held_out: Taught
    heads: dict[int, SparseTargets]
    drawn: dict[str, SparseTargets]
    draws: int
    width: int
    redraws: int

    def objective(self, arm: str) -> Objective:
        if arm == "ce":
            return lessons.sparse(self.heads[KS[0]], "bucket", hard=1.0)
        if arm == "dense":
            return lessons.dense(self.taught)
        if arm in self.drawn:
            return lessons.sparse(self.drawn[arm], "sampled" if arm == SAMPLED else "head_tail")
        name, k = arm.rsplit("_", 1)
        return lessons.sparse(self.heads[int(k)], name)


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Figures named `quality.*`; prints the orderings in words.

    Raises:
        AssertionError: a gradient that must be unbiased is not.
    """
    began, seeds = time.perf_counter(), SEEDS[: arguments.seeds]
    torch.set_num_threads(arguments.processes)
    wanted = (arguments.teacher_tokens, arguments.student_tokens, arguments.held_out_tokens)
    study = _study(lessons.windows(wanted), arguments)
    print(f"teacher and targets: {time.perf_counter() - began:.0f} s", flush=True)
    results = _students(study, seeds, arguments.processes)
    figures = _figures(results, seeds)
    orderings = _orderings(results, seeds)
    for name, value in orderings.items():
        print(f"  {name.removeprefix('quality.order.'):<44} {WORDS[int(value)]}")
    bias = {f"quality.{k}": v for k, v in results["ce", 0].items() if k.endswith("bias_ratio")}
    sizes = {
        "quality.sampled_draws": float(study.draws),
        "quality.sampled_distinct": float((study.drawn[SAMPLED].weights_NK > 0).sum(1).double().mean()),  # type: ignore[operator]
        "quality.kept_mass_12": float(-torch.expm1(study.heads[12].log_tail_N).double().mean()),
        "quality.teacher_loss": _teacher_loss(study.held_out),
        "quality.seconds": time.perf_counter() - began,
    }
    _require_unbiased(bias)
    return figures | orderings | bias | sizes


def _study(parts: list[Tensor], arguments: argparse.Namespace) -> Study:
    """Train the teacher, and capture."""
    mine, theirs, held_out = parts
    labels_N = mine[:, 1:].flatten()

    def hard(h: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(h @ weight.T, labels_N[rows], reduction="sum")

    teacher = lessons.model(arguments.teacher_width, 3, seed=9)
    students = len(ARMS) * arguments.seeds / arguments.processes
    for name, width, layers, windows, times in (
        ("teacher", arguments.teacher_width, 3, mine, 1.0),
        ("students", arguments.student_width, 2, theirs, students),
    ):
        step = _step_seconds(lessons.model(width, layers, 0), mine, hard)
        steps = -(-len(windows) // lessons.BATCH)
        print(f"{name}: {step:.3f} s a step, {steps} steps, about {step * steps * times:.0f} s", flush=True)
    lessons.train(teacher, mine, hard, 1, 9, 2e-3)
    teacher.eval()
    taught = Taught.by(teacher, theirs)
    heads = {k: lessons.head_targets(taught, k) for k in (*KS, HEAD)}
    draws = lessons.draws_for(taught, 12)
    drawn = {
        SAMPLED: lessons.drawn_targets(taught, heads[KS[0]], DrawSpec(draws, False, 1.0)),
        HEAD_TAIL: lessons.drawn_targets(taught, heads[HEAD], DrawSpec(TAIL, True, 1.0)),
    }
    return Study(taught, Taught.by(teacher, held_out), heads, drawn, draws, arguments.student_width, arguments.redraws)


def _step_seconds(of: Any, windows_WL: Tensor, objective: Objective) -> float:
    few = windows_WL[: 2 * lessons.BATCH]
    lessons.train(of, few, objective, 1, 0, 1e-3)
    begun = time.perf_counter()
    lessons.train(of, few, objective, 1, 0, 1e-3)
    return (time.perf_counter() - begun) / 2


# Students, each in a process that has one core.

_here: dict[str, Study] = {}


def _enter(path: str) -> None:
    torch.set_num_threads(1)
    _here["study"] = torch.load(path, weights_only=False)


def _student(job: tuple[str, int]) -> dict[str, float]:
    """Train one student, and score it; the one of hard labels also stands where gradients are compared."""
    arm, seed = job
    study = _here["study"]
    windows = study.taught.windows_WL
    student = lessons.model(study.width, 2, seed)
    lessons.train(student, windows, study.objective(arm), 1, seed, 3e-3)
    found = lessons.scores(student, study.held_out)
    if arm != "ce":
        return found
    picked = torch.arange(min(4 * lessons.BATCH, len(windows)))
    of = partial(lessons.gradient, student, windows[picked], torch.arange(len(picked) * ROWS))
    reference = of(study.objective("dense"))
    found |= {f"angle.{other}": lessons.angle(of(study.objective(other)), reference) for other in ARMS[:-1]}
    return found | (bias_ratios(study, student) if seed == SEEDS[0] else {})


def _students(study: Study, seeds: tuple[int, ...], processes: int) -> dict[tuple[str, int], dict[str, float]]:
    jobs = [(arm, seed) for arm in ARMS for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(study, path := str(Path(folder) / "study.pt"))
        with multiprocessing.get_context("spawn").Pool(processes, _enter, (path,)) as pool:
            return dict(zip(jobs, pool.map(_student, jobs, chunksize=1), strict=True))


# Bias.


def bias_ratios(study: Study, student: Any) -> dict[str, float]:
    """Of the gradients in a few rows' hidden states, over redraws; the teacher's numbers are exact here, not coded."""
    rows = torch.arange(min(64, ROWS))
    z = study.taught.logits(rows)
    exact = lessons.exact_targets(z, study.taught.labels_N[rows], HEAD)
    with torch.no_grad():
        h = lessons.hidden(student, study.taught.windows_WL[:1])[rows]
        weight = student.lm_head.weight.detach()
    every = torch.arange(len(rows))

    def of(objective: Objective) -> Tensor:
        leaf = h.clone().requires_grad_()
        return torch.autograd.grad(objective(leaf, weight, every), leaf)[0].double()

    def redrawn(spec: DrawSpec, name: str, logits_RV: Tensor) -> float:
        def once(number: int) -> Tensor:
            keys = torch.from_numpy(row_keys(number, 0, len(rows)))
            words = lessons.drawn_words(logits_RV, keys, spec, HEAD)
            return of(lessons.sparse(lessons.padded(words).targets(exact, "tail" if spec.tail_only else "all"), name))

        return _ratio(once, of(lessons.dense_kl(z)), study.redraws)

    top = z.scatter(1, z.topk(12).indices, 0.0)
    cut = torch.where(top == 0.0, z, -torch.inf)
    return {
        "sampled_bias_ratio": redrawn(DrawSpec(study.draws, False, 1.0), "sampled", z),
        "head_tail_bias_ratio": redrawn(DrawSpec(TAIL, True, 1.0), "head_tail", z),
        "sampled_of_top12_bias_ratio": redrawn(DrawSpec(study.draws, False, 1.0), "sampled", cut),
    }


def _ratio(once: Callable[[int], Tensor], dense: Tensor, redraws: int) -> float:
    total, squares = torch.zeros_like(dense), torch.zeros_like(dense)
    for number in range(redraws):
        gap = once(number) - dense
        total += gap
        squares += gap**2
    mean = total / redraws
    variance = (squares / redraws - mean**2) * redraws / (redraws - 1)
    return float((mean**2).sum() / (variance.sum() / redraws))


def _require_unbiased(bias: dict[str, float]) -> None:
    for name in ("quality.sampled_bias_ratio", "quality.head_tail_bias_ratio"):
        if bias[name] > BIAS_LIMIT:
            raise AssertionError(f"{name}={bias[name]:.2f}, above {BIAS_LIMIT}: the gradient over redraws is biased")
    if (control := bias["quality.sampled_of_top12_bias_ratio"]) <= BIAS_LIMIT:
        raise AssertionError(f"draws from a top 12 have a bias ratio of {control:.2f}: the check sees no bias at all")


# Figures.

Results = dict[tuple[str, int], dict[str, float]]


def _figures(results: Results, seeds: tuple[int, ...]) -> dict[str, float]:
    """Means and standard deviations over seeds."""
    found = {}
    for arm in ARMS:
        columns = {name: [results[arm, s][name] for s in seeds] for name in ("loss", "kl", "ece")}
        if arm != "dense":
            columns["angle"] = [results["ce", s][f"angle.{arm}"] for s in seeds]
        for name, values in columns.items():
            found[f"quality.{arm}.{name}"] = statistics.fmean(values)
            found[f"quality.{arm}.{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def _orderings(results: Results, seeds: tuple[int, ...]) -> dict[str, float]:
    """Each ordering as 1, 0 or −1."""

    def gap(worse: str, better: str, figure: str = "loss") -> list[float]:
        return [results[worse, s][figure] - results[better, s][figure] for s in seeds]

    def near(arm: str) -> list[float]:
        return [half / 2 - far for half, far in zip(gap("ce", "dense"), gap(arm, "dense"), strict=True)]

    steps = [gap("truncated_5", "truncated_12"), gap("truncated_12", "truncated_50"), gap("truncated_50", "dense")]
    angles = [results["ce", s]["angle.truncated_12"] - results["ce", s][f"angle.{SAMPLED}"] for s in seeds]
    claims = {
        "dense_better_than_ce": gap("ce", "dense"),
        "truncated_5_worse_than_ce": gap("truncated_5", "ce"),
        "truncated_12_worse_than_ce": gap("truncated_12", "ce"),
        "truncated_better_with_every_larger_k": [min(each) for each in zip(*steps, strict=True)],
        "bucket_12_better_than_truncated_12": gap("truncated_12", "bucket_12"),
        "bucket_12_better_than_ce": gap("ce", "bucket_12"),
        "bucket_12_near_dense": near("bucket_12"),
        "sampled_12_better_than_truncated_12": gap("truncated_12", SAMPLED),
        "sampled_12_better_than_ce": gap("ce", SAMPLED),
        "sampled_12_near_dense": near(SAMPLED),
        "head_tail_near_dense": near(HEAD_TAIL),
        "ece_of_truncated_12_above_ce": gap("truncated_12", "ce", "ece"),
        "ece_of_sampled_12_below_ce": gap("ce", SAMPLED, "ece"),
        "ece_of_dense_below_ce": gap("ce", "dense", "ece"),
        "gradient_of_sampled_12_nearer_than_truncated_12": angles,
    }
    return {f"quality.order.{name}": float(verdict(differences)) for name, differences in claims.items()}


def verdict(differences: list[float]) -> int:
    """1 where they are above 0 beyond the noise over seeds, −1 where below, 0 where neither can be said."""
    if len(differences) < 2:
        return 0
    mean = statistics.fmean(differences)
    noise = T_95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return 0 if abs(mean) <= noise else 1 if mean > 0 else -1


def _teacher_loss(held_out: Taught) -> float:
    sums = [torch.nn.functional.cross_entropy(z, held_out.labels_N[r], reduction="sum") for r, z, _ in held_out.parts()]
    return float(torch.stack(sums).sum() / len(held_out.labels_N))
