"""`distill-ray status`: where a run stands, from storage alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_ray.config import Recipe
from distill_ray.errors import IntegrityError
from distill_ray.lease import is_live, read_record
from distill_ray.registry import read_latest
from distill_ray.schema import ARTEFACT_OF
from distill_ray.storage import Storage, open_storage


@dataclass(frozen=True)
class Status:
    """What the run's record says."""

    run: str
    owner: str | None
    """Who holds the lease now; None when nobody does."""
    started: bool
    done: dict[str, dict[str, Any]]
    """Finished stage → its published entry."""
    next_stage: str | None
    checkpoint_step: int | None
    latest: str = ""
    """Where the run is exported: what `latest.json` names now, and why not this version."""
    audited: bool = True
    """Whether the recipe has its targets audited before training."""
    other_versions: tuple[str, ...] = ()
    """Where the run was never started: the versions that were, under the same root and name."""

    def render(self) -> str:
        """Lines for a terminal."""
        if not self.started:
            known = ", ".join(self.other_versions) or "none"
            return f"run {self.run} was never started here; versions that were: {known}"
        lines = [f"run {self.run}: " + (f"owned by {self.owner}" if self.owner else "nobody is working on it")]
        for stage in ARTEFACT_OF:
            if stage == "audit":
                lines.append(f"  {stage:<9} {self._audit()}")
            elif stage in self.done:
                lines.append(f"  {stage:<9} done" + (f"; {self.latest}" if stage == "export" and self.latest else ""))
            elif stage == "train" and self.checkpoint_step is not None:
                lines.append(f"  {stage:<9} last checkpoint at step {self.checkpoint_step}")
            else:
                lines.append(f"  {stage:<9} to do")
        return "\n".join(lines)

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
    """Read the run's record; works with the cluster gone.

    Args:
        recipe: names the storage root, the run and its version.
    """
    storage = open_storage(recipe.storage.root)
    record = read_record(storage, recipe.run_prefix)
    run = f"{recipe.name}/{recipe.version}"
    if record is None:
        keys = (info.key.split("/") for info in storage.list(f"runs/{recipe.name}/"))
        others = sorted({key[2] for key in keys if key[3:] == ["lease.json"]})
        started = next(iter(ARTEFACT_OF))
        return Status(run, None, False, {}, started, None, audited=recipe.audit.is_on, other_versions=tuple(others))
    done = {s: record.published[name] for s, name in ARTEFACT_OF.items() if name in record.published}
    steps = [e["step"] for name, e in record.published.items() if name.startswith("checkpoint/")]
    owner = f"{record.owner} (epoch {record.epoch})" if is_live(record) else None
    wanted = [s for s in ARTEFACT_OF if s != "audit" or (recipe.audit.is_on and "train" not in done)]
    following = next((s for s in wanted if s not in done), None)
    latest = _latest(recipe, storage, record.published) if "export" in done else ""
    return Status(run, owner, True, done, following, max(steps, default=None), latest, recipe.audit.is_on)


def _latest(recipe: Recipe, storage: Storage, published: Mapping[str, Mapping[str, Any]]) -> str:
    try:
        current = read_latest(storage, recipe.name)
    except IntegrityError:
        return "latest.json is damaged; the same command as for this run writes it anew"
    if current is not None and current.version == recipe.version:
        return "it is the latest"
    reason = published.get("latest", {}).get("reason")
    return (f"the latest is {current.version}" if current else "there is no latest") + (f": {reason}" if reason else "")
