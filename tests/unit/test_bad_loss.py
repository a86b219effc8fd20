"""A loss that goes wrong: which steps are bad, and that a skipped one leaves the training state bit for bit alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distill_ray.config.student import TrainSection
from distill_ray.errors import UserError
from distill_ray.ingest.batch import PackedBatch
from distill_ray.lease import Lease
from distill_ray.losses import LossSpec
from distill_ray.storage import open_storage
from distill_ray.student.engine import StepResult, StudentEngine
from distill_ray.student.module import DistillModule
from distill_ray.train.bad_loss import check, line_of, spike_bound
from distill_ray.train.job import Job
from distill_ray.train.keeping import Keeper
from distill_ray.train.saving import Saver
from tests.ranks import spawn
from tests.stages.train_assets import tiny_recipe
from tests.unit.student_fakes import VOCAB, documents, pack, tiny_config, tiny_model

SKIP = TrainSection(on_bad_loss="skip", loss_spike=3.0)
MICRO = 2


def lines(losses: Sequence[float]) -> list[dict[str, float]]:
    return [line_of(i, {"loss": loss}, math.isfinite(loss)) for i, loss in enumerate(losses)]


def result(loss: float = 1.0, grad_norm: float = 1.0, skipped: int = 0) -> StepResult:
    return StepResult(loss, 0.0, 0.0, 0.0, 1.0, 1.0, 1e-3, grad_norm, 10, 0, skipped=skipped)


def test_the_bound_is_a_multiple_of_the_median_of_recent_applied_steps() -> None:
    assert spike_bound(TrainSection(), lines([1.0] * 90)) == math.inf
    assert spike_bound(SKIP, lines([1.0] * 9)) == math.inf
    assert spike_bound(SKIP, lines([1.0] * 9 + [math.nan])) == math.inf
    assert spike_bound(SKIP, lines([1.0] * 9 + [math.nan, 9.0])) == 3.0
    # Of the last fifty that were applied: the early ones no longer count, and skipped ones never do.
    assert spike_bound(SKIP, lines([-1.0] * 40)) == math.inf
    assert spike_bound(SKIP, lines([7.0] * 60 + [2.0] * 24 + [math.nan] + [1.0] * 26)) == 3.0


@pytest.mark.parametrize(
    ("bad", "bound", "said"),
    [
        (result(math.nan), math.inf, "the loss of step 7 is nan; lower train.learning_rate=2e-05 or use"),
        (result(math.inf), math.inf, "the loss of step 7 is inf; lower"),
        (result(2.0, math.inf, 1), math.inf, "the gradient norm of step 7 is inf at a loss of 2.0; lower"),
        (result(9.5), 9.0, r"the loss of step 7 is 9.5, above train.loss_spike=3.0 times the median of .*, 9; lower"),
        (result(9.5, math.inf, 1), 9.0, r"the loss of step 7 is 9.5, above train.loss_spike=3.0 times the median"),
    ],
)
def test_a_bad_step_stops_or_is_skipped_but_ten_in_a_row_stop(bad: StepResult, bound: float, said: str) -> None:
    stop = SKIP.model_copy(update={"on_bad_loss": "stop"})
    with pytest.raises(UserError, match=said):
        check(stop, 7, bad, bound, lines([1.0] * 7))
    assert check(SKIP, 7, result(), bound, lines([1.0] * 7))
    assert not check(SKIP, 7, bad, bound, lines([1.0] * 7))
    assert not check(SKIP, 7, bad, bound, lines([math.nan] * 20 + [1.0] + [math.nan] * 8))
    with pytest.raises(UserError, match=r"the 10th step in a row that was skipped; lower"):
        check(SKIP, 7, bad, bound, lines([1.0] + [math.nan] * 9))


def test_a_line_is_json_whatever_the_loss_and_says_that_it_was_skipped() -> None:
    line = line_of(4, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1}, good=False)
    assert json.loads(json.dumps(line, allow_nan=False)) == {"step": 4, "lr": 0.1, "skipped": 1}
    assert line_of(4, {"loss": 0.5}, good=True) == {"step": 4, "loss": 0.5}


def test_no_checkpoint_is_written_where_every_step_since_the_last_one_was_skipped(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train={"checkpoint_every": 2})
    storage = open_storage(str(tmp_path))
    with Lease.acquire(storage, recipe.run_prefix) as lease:
        saver = Saver(storage, lease.token)
        engine: Any = SimpleNamespace(rank=0, world=1, stage=lambda folder: list)
        manifest: Any = None
        keeper = Keeper(Job(recipe, storage, manifest, lease.token, None), saver, engine, "plan", print)
        keeper.save(3, lines([1.0, math.nan, math.nan]))
        assert not saver.in_flight
        keeper.save(4, lines([1.0, math.nan, math.nan, 2.0]))
        assert saver.in_flight


def _steps(kinds: str) -> list[list[PackedBatch]]:
    """A step a letter; in `n`, NaN in the first micro-batch's targets gives a finite loss and a NaN gradient."""
    rng, found = np.random.default_rng(5), []
    for step, kind in enumerate(kinds):
        packs = [pack(rng, documents(rng, 3), 27, 0.7) for _ in range(MICRO)]
        supervised = sum(len(p.rows) for p in packs)
        if kind == "n":
            first = packs[0].targets
            packs[0] = replace(packs[0], targets=replace(first, logprobs_NK=first.logprobs_NK * math.nan))
        found.append(
            [replace(p, step=step, micro=i, micro_steps=MICRO, supervised=supervised) for i, p in enumerate(packs)]
        )
    return found


def _state(engine: StudentEngine) -> list[Any]:
    """The weights, and every tensor and counter of the optimizer that DeepSpeed drives."""
    wrapped, weights = engine._optimizer, engine.export_state()
    assert weights is not None
    inner = getattr(wrapped, "optimizer", wrapped)
    found: list[Any] = [p for group in inner.param_groups for p in group["params"]]
    assert inner.state
    for state in inner.state.values():
        found += state.values()
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in [*found, *weights.values()]]


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def _train(rank: int, folder: str, stage: int, precision: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    section = TrainSection.model_validate(
        {"precision": precision, "use_gpu": False, "zero_stage": stage, "learning_rate": 1e-2, "warmup_fraction": 0.0}
    )
    module = DistillModule(tiny_model(tiny_config()), LossSpec(VOCAB, 1.0, 0.2))
    kind = ""
    module.register_forward_hook(lambda _, __, sums: torch.cat([sums[:1] * (math.nan if kind == "l" else 1), sums[1:]]))
    engine = StudentEngine.start(module, section, micro_steps=MICRO)
    figures, kinds = [], "ggngsglg"
    first, *steps = _steps(kinds)
    engine.train_step(iter(first), len(kinds))
    before = _state(engine)
    for kind, batches in zip(kinds[1:], steps, strict=True):
        found = engine.train_step(iter(batches), len(kinds), skip_above=1e-3 if kind == "s" else math.inf)
        after = _state(engine)
        figures.append([found.skipped, _same(before, after), math.isfinite(found.loss), math.isfinite(found.grad_norm)])
        before = after
    (Path(folder) / "figures.json").write_text(json.dumps(figures))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(2, "fp32")]
    + [pytest.param(*mode, marks=pytest.mark.long) for mode in ((1, "bf16"), (3, "bf16"))]
    + [pytest.param(*mode, marks=pytest.mark.slow) for mode in ((1, "fp32"), (2, "bf16"), (3, "fp32"))],
)
def test_a_skipped_step_leaves_weights_and_optimizer_bit_for_bit(tmp_path: Path, stage: int, precision: str) -> None:
    spawn(_train, (str(tmp_path), stage, precision), 1)
    # Skipped, state as before, loss finite, gradient norm finite.
    good, gradient, spike = [0, False, True, True], [1, True, True, False], [1, True, True, False]
    loss = [1, True, False, False]
    assert json.loads((tmp_path / "figures.json").read_text()) == [good, gradient, good, spike, good, loss, good]
