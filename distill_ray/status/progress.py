"""How far capture and training are, as their objects in storage tell: no cluster, no teacher, no source is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from distill_ray import corpus, cost, targets
from distill_ray.config import Recipe
from distill_ray.errors import DistillError, IntegrityError
from distill_ray.report import read_history
from distill_ray.storage import NotFoundError, Storage
from distill_ray.train.result import HISTORY_FILE
from distill_ray.train.worker import make_plan
from distill_ray.units import Units, in_sorted

_RECENT_STEPS = 50
"""Steps whose mean seconds tell how long the others will take."""
_HOUR = 3600.0


@dataclass(frozen=True)
class CaptureProgress:
    """Target objects of the run's capture."""

    done: int
    """Units of this run that have one; all of the capture where the run's own units are not known."""
    total: int | None
    """Units of the run; None where they are not known, and `unknown` says why."""
    unknown: str
    teacher_seconds: float
    """Spent on those that are done, as far as the index knows."""

    def render(self) -> str:
        """One line."""
        if self.total is None:
            return f"{self.done:,} units of this teacher stored; how many the run needs is not known: {self.unknown}"
        left = self.total - self.done
        line = f"{self.done:,} of {self.total:,} units done, {left:,} left"
        if left and self.done and self.teacher_seconds:
            line += f", about {span(left * self.teacher_seconds / self.done)} for one teacher replica"
        return line


@dataclass(frozen=True)
class TrainProgress:
    """The training history, which is stored every half minute."""

    steps: int
    """Optimizer steps that the history has, or the newest checkpoint if that is further."""
    total: int | None
    unknown: str
    """Why `total` is not known."""
    checkpoint_step: int | None
    seconds_per_step: float | None
    loss: float | None
    """Of the last step of the history."""
    damaged: str = ""
    """Why the history cannot be read."""

    @property
    def eta_s(self) -> float | None:
        """Seconds of the steps that are left, at the pace of the last ones."""
        if self.total is None or self.seconds_per_step is None:
            return None
        return (self.total - self.steps) * self.seconds_per_step

    def render(self) -> str:
        """One line."""
        total = f" of {self.total:,}" if self.total is not None else f" (of how many is not known: {self.unknown})"
        parts = [f"step {self.steps:,}{total}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.seconds_per_step is not None:
            parts.append(f"{self.seconds_per_step:.3g} s a step")
        if self.eta_s is not None:
            parts.append(f"{span(self.eta_s)} of training left")
        kept = (
            "no checkpoint yet" if self.checkpoint_step is None else f"last checkpoint at step {self.checkpoint_step}"
        )
        again = self.steps - (self.checkpoint_step or 0)
        line = ", ".join(parts) + f"; {kept}" + (f": {again:,} step(s) would be trained again" if again else "")
        return line + (f"; {self.damaged}" if self.damaged else "")


def capture_progress(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> CaptureProgress:
    """Units of the run that have a target object; what they hold is not verified here."""
    fingerprint = published.get("identity", {}).get("of", {}).get("capture_fingerprint")
    if fingerprint is None:
        return CaptureProgress(0, None, "no driver has come as far as planning the capture", 0.0)
    stored, _ = targets.object_sizes(storage, fingerprint)
    try:
        units = _planned(recipe, storage, fingerprint)
    except DistillError as error:
        table, _ = targets.load_table(storage, fingerprint, columns=("teacher_seconds",))
        return CaptureProgress(len(stored), None, str(error), float(table["teacher_seconds"].to_numpy().sum()))
    table, _ = targets.load_table(storage, fingerprint, only=units.hashes, columns=("teacher_seconds",))
    seconds = float(table["teacher_seconds"].to_numpy().sum())
    return CaptureProgress(int(in_sorted(stored, units.hashes).sum()), len(units), "", seconds)


def _planned(recipe: Recipe, storage: Storage, fingerprint: str) -> Units:
    # What the hashes need of the teacher is in every object of its capture; before the first one none can be done.
    first = next(iter(targets.each_object(storage, fingerprint)), None)
    tokenizer = "" if first is None else targets.open_unit(storage, fingerprint, first[0]).identity.tokenizer
    prompts = recipe.capture.generate is not None
    return corpus.plan_units(recipe.corpus, tokenizer, storage, prompts=prompts, cached_only=True)


def train_progress(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> TrainProgress:
    """Steps, pace and loss of the run's training, done or not."""
    saved = [int(e["step"]) for name, e in published.items() if name.startswith("checkpoint/")]
    checkpoint = max(saved, default=None)
    total, unknown = None, "the targets are not captured yet"
    if "targets" in published:
        try:
            total = make_plan(recipe, targets.read_run_manifest(storage, published["targets"])).steps
        except DistillError as error:
            unknown = str(error)
    history, damaged = _history(storage, f"{recipe.run_prefix}/{HISTORY_FILE}")
    recent = [line["seconds"] + line.get("save_s", 0.0) for line in history[-_RECENT_STEPS:]]
    return TrainProgress(
        steps=max(len(history), checkpoint or 0),
        total=total,
        unknown=unknown,
        checkpoint_step=checkpoint,
        seconds_per_step=sum(recent) / len(recent) if recent else None,
        # A skipped step has no loss where it was not finite.
        loss=next((line["loss"] for line in reversed(history) if "loss" in line), None),
        damaged=damaged,
    )


def _history(storage: Storage, key: str) -> tuple[list[dict[str, float]], str]:
    try:
        return read_history(storage.get(key)), ""
    except NotFoundError:
        return [], ""
    except IntegrityError as error:
        return [], str(error)


def spent(recipe: Recipe, storage: Storage) -> str:
    """What all commands of the run held so far, by stage, and dollars where prices are stated; empty where nothing."""
    usages, problems = cost.read_usage(storage, recipe.run_prefix)
    stages = cost.by_stage(usages)
    parts = []
    for stage, each in groupby(stages, key=lambda s: s.stage):
        group = list(each)
        seconds, busy = (sum(getattr(g.on, name) for g in group) for name in ("seconds", "busy_s"))
        share = f" ({busy / seconds:.0%} busy)" if seconds else ""
        parts.append(f"{stage} {seconds / _HOUR:.3g} {group[0].device} hours{share}")
    dollars = cost.dollars_by_stage(recipe.cost, stages)
    if cost.TOTAL in dollars:
        parts.append(f"${dollars[cost.TOTAL]:,.2f}")
    elif dollars:
        parts.append(f"${sum(dollars.values()):,.2f} of {' and '.join(dollars)}, the rest has no price")
    commands = len({u.epoch for u in usages})
    line = ", ".join(parts) + (f" in {commands} command(s)" if parts else "")
    return "; ".join(filter(None, [line, *(f"not counted: {problem}" for problem in problems)]))


def span(seconds: float) -> str:
    """A duration as a person says it: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    s = max(0, round(seconds))
    if s < 120:
        return f"{s} s"
    minutes = round(s / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
