"""The stages of a run, who works on it, and what the next `run` would do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_ray import standing
from distill_ray.config import Recipe
from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseRecord, is_live, lease_written_at, read_record
from distill_ray.registry import read_latest
from distill_ray.schema import ARTEFACT_OF
from distill_ray.status.progress import (
    CaptureProgress,
    TrainProgress,
    capture_progress,
    span,
    spent,
    train_progress,
)
from distill_ray.storage import Storage, open_storage


@dataclass(frozen=True)
class Status:
    """What storage says of the run."""

    run: str
    owner: str | None
    """Who holds the lease now; None when nobody does."""
    started: bool
    done: dict[str, dict[str, Any]]
    """Finished stage → its published entry."""
    due: dict[str, str] = field(default_factory=dict)
    """What the next `run` does: stage → why."""
    lease: str = ""
    """By whom and when the lease was last renewed."""
    captured: CaptureProgress | None = None
    trained: TrainProgress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage → wall seconds of the command that ended it."""
    forgotten: str = ""
    """What of its targets is gone on purpose."""
    cost: str = ""
    """What all commands held of devices, and dollars as far as prices are stated."""
    latest: str = ""
    """Where the run is exported: what `latest.json` names now, and why not this version."""
    audited: bool = True
    """Whether the recipe has its targets audited before training."""
    other_versions: tuple[str, ...] = ()
    """Where the run was never started: the versions that were, under the same root and name."""

    @property
    def next_stage(self) -> str | None:
        """The stage that the next `run` begins with; None where all stands."""
        return next(iter(self.due), None)

    @property
    def checkpoint_step(self) -> int | None:
        """Steps in the newest checkpoint."""
        return self.trained.checkpoint_step if self.trained else None

    def render(self) -> str:
        """Lines for a terminal."""
        if not self.started:
            known = ", ".join(self.other_versions) or "none"
            return f"run {self.run} was never started here; versions that were: {known}"
        lines = [f"run {self.run}: " + (f"owned by {self.owner}" if self.owner else "nobody is working on it")]
        lines.append(f"  {'lease':<9} {self.lease}")
        lines += [f"  {stage:<9} {self._stage(stage)}" for stage in ARTEFACT_OF]
        if self.cost:
            lines.append(f"  {'cost':<9} {self.cost}")
        lines.append(f"  {'next run':<9} " + self._next())
        return "\n".join(lines)

    def _stage(self, stage: str) -> str:
        took = f" in {span(self.seconds[stage])}" if stage in self.seconds else ""
        if stage == "audit":
            return self._audit()
        if stage in self.done:
            about = self.latest if stage == "export" else self._about(stage)
            return f"done{took}" + (f"; {about}" if about else "")
        if stage == "capture" and self.captured is not None:
            return self.captured.render()
        if stage == "train" and self.trained is not None and self.trained.steps:
            return self.trained.render()
        return "to do"

    def _about(self, stage: str) -> str:
        entry = self.done[stage]
        if stage == "capture":
            size = f"{entry['units']:,} units, {entry['rows']:,} rows, {entry['target_bytes'] / 1e9:.3g} GB"
            return size + (f"; forgotten: {self.forgotten}" if self.forgotten else "")
        if stage == "train" and self.trained is not None and self.trained.loss is not None:
            return f"{entry['step']:,} steps, last loss {self.trained.loss:.4g}"
        return ""

    def _next(self) -> str:
        if not self.due:
            return "does nothing: all stands"
        return "does " + "; ".join(f"{stage} ({why})" for stage, why in self.due.items())

    def _audit(self) -> str:
        entry = self.done.get("audit")
        if entry is None:
            return "to do" if self.audited else "off (audit.sequences = 0)"
        if entry["targets"] != self.done.get("capture", {}).get("sha256"):
            return "to do: the last one is of other targets"
        if not entry["passed"]:
            return f"FAILED: {entry['failure']}"
        return (
            f"done: {entry['sequences']} sequences, {entry['rows']:,} rows by {entry['path']} ({entry['dtype']}), "
            f"|Δ log p| ≤ {entry['worst_nats']:.1e} nats beyond the codec's rounding, allowed "
            f"{entry['tolerance']['logprob']:g}"
        )


def status(recipe: Recipe) -> Status:
    """Read the run's record and objects; works with the cluster gone.

    Args:
        recipe: names the storage root, the run and its version.
    """
    storage = open_storage(recipe.storage.root)
    record = read_record(storage, recipe.run_prefix)
    run = f"{recipe.name}/{recipe.version}"
    if record is None:
        keys = (info.key.split("/") for info in storage.list(f"runs/{recipe.name}/"))
        others = sorted({key[2] for key in keys if key[3:] == ["lease.json"]})
        return Status(run, None, False, {}, audited=recipe.audit.is_on, other_versions=tuple(others))
    published = record.published
    done = {s: published[name] for s, name in ARTEFACT_OF.items() if name in published}
    captured, trained = capture_progress(recipe, storage, published), train_progress(recipe, storage, published)
    timed = {n.removeprefix("timings/"): float(e["seconds"]) for n, e in published.items() if n.startswith("timings/")}
    return Status(
        run,
        f"{record.owner} (epoch {record.epoch})" if is_live(record) else None,
        True,
        done,
        due=standing.due(recipe, storage, published),
        lease=_lease(record, lease_written_at(storage, recipe.run_prefix), time.time()),
        captured=captured,
        trained=trained,
        seconds=timed,
        forgotten=standing.withdrawn(storage, recipe.run_prefix) or "",
        cost=spent(recipe, storage),
        latest=_latest(recipe, storage, published) if "export" in done else "",
        audited=recipe.audit.is_on,
    )


def _lease(record: LeaseRecord, written_at: float | None, now: float) -> str:
    when = "" if written_at is None else f"{span(now - written_at)} ago "
    by = f"by {record.owner} (epoch {record.epoch})"
    if record.expires_at == 0.0:
        return f"given back {when}{by}"
    line = f"last renewed {when}{by}"
    if is_live(record):
        return f"{line}, good for {span(record.expires_at - now)} more"
    if now >= record.expires_at:
        return f"{line}, ran out {span(now - record.expires_at)} ago: that driver is gone"
    return f"{line}: that process is dead, its lease can be taken over"


def _latest(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> str:
    try:
        current = read_latest(storage, recipe.name)
    except IntegrityError:
        return "latest.json is damaged; the same command as for this run writes it anew"
    if current is not None and current.version == recipe.version:
        return "it is the latest"
    reason = published.get("latest", {}).get("reason")
    return (f"the latest is {current.version}" if current else "there is no latest") + (f": {reason}" if reason else "")
