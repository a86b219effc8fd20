"""How fast teacher and student are: stated by the recipe, or measured by a version that can speak for this one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from distill_ray import cost
from distill_ray import report as reports
from distill_ray.config import Recipe, fingerprint, identity_of
from distill_ray.cost import Rate
from distill_ray.errors import IntegrityError
from distill_ray.lease import read_document, read_published
from distill_ray.registry import version_order
from distill_ray.storage import Storage
from distill_ray.targets import CaptureIdentity

_WHO = {"capture": "teacher", "train": "student"}


def rates(
    recipe: Recipe, storage: Storage, identity: CaptureIdentity | None, notes: list[str]
) -> dict[str, Rate | str]:
    """Of "capture" and "train", or why there is none.

    The newest version with a report speaks for those up to this one: the teacher's rate where teacher and devices are
    the same, the student's where student, precision and devices are.

    Args:
        recipe: may state them; names the run.
        storage: the recipe's root.
        identity: the capture; None where it is not known: no teacher's rate is then taken from another version.
        notes: told of every report that cannot be read.
    """
    found: dict[str, Rate | str] = {stage: _stated(recipe, stage) for stage in _WHO}
    for prefix in _versions(recipe, storage):
        wanted = [stage for stage, rate in found.items() if isinstance(rate, str)]
        if not wanted:
            break
        try:
            report = reports.read_report(storage, prefix)
            found |= {
                stage: _measured(recipe, storage, prefix, report, identity, stage) or found[stage] for stage in wanted
            }
        except IntegrityError as error:
            notes.append(str(error))
    return found


def _stated(recipe: Recipe, stage: str) -> Rate | str:
    who = _WHO[stage]
    tokens_s, start_s = (getattr(recipe.cost.rates, f"{who}_{name}") for name in ("tokens_s", "start_s"))
    if tokens_s is not None:
        return Rate(tokens_s, start_s, "stated")
    return (
        f"cost.rates.{who}_tokens_s is not stated, and no version of {recipe.name} has measured it with this {who} on "
        "such devices"
    )


def _versions(recipe: Recipe, storage: Storage) -> list[str]:
    """Prefixes of the versions with a report up to this one, the newest first."""
    root = f"runs/{recipe.name}/"
    keys = (info.key.removeprefix(root) for info in storage.list(root))
    versions = {key.partition("/")[0] for key in keys if key.count("/") == 1 and key.endswith("/report.json")}
    upto = [version for version in versions if version_order(version) <= version_order(recipe.version)]
    return [root + version for version in sorted(upto, key=version_order, reverse=True)]


def _measured(
    recipe: Recipe,
    storage: Storage,
    prefix: str,
    report: Mapping[str, Any],
    identity: CaptureIdentity | None,
    stage: str,
) -> Rate | None:
    """What one version measured; None where it cannot speak for this recipe."""
    if stage == "capture":
        same = identity is not None and report["identity"]["teacher"] == fingerprint(dict(identity.teacher))
    else:
        then, now = report["recipe"], json.loads(json.dumps(identity_of(recipe)))
        same = (then.get("student"), then.get("train", {}).get("precision")) == (
            now["student"],
            now["train"]["precision"],
        )
    if not same:
        return None
    usages, problems = cost.read_usage(storage, prefix)
    if problems:
        raise IntegrityError("; ".join(problems))
    share = 1.0 if stage == "capture" else _tokens_by_supervised(storage, prefix)
    return _rate(recipe, usages, stage, prefix.rpartition("/")[2], share)


def _rate(recipe: Recipe, usages: Iterable[cost.Usage], stage: str, version: str, share: float) -> Rate | None:
    holds = cost.held(recipe, stage)
    nodes = [
        node
        for usage in usages
        if (usage.stage, usage.device, usage.devices) == (stage, holds.device, holds.count)
        for node in usage.nodes
    ]
    processes, tokens = sum(node.processes for node in nodes), sum(node.tokens for node in nodes)
    ready = sum(node.busy_s + node.idle_s for node in nodes) / holds.count
    if not tokens or not ready:
        return None
    most = max(nodes, key=lambda node: node.busy_s).node_type
    start = sum(node.start_s for node in nodes) / holds.count / processes
    return Rate(tokens * share / ready, start, f"measured in {version} on {most}", most)


def _tokens_by_supervised(storage: Storage, prefix: str) -> float:
    """All tokens of a training for each supervised one; usage counts these alone."""
    entry = read_published(storage, prefix)["student"]["history"]
    history = reports.read_history(read_document(storage, entry, "the next version measures the student's rate again"))
    tokens, supervised = (sum(step[name] for step in history) for name in ("input_tokens", "tokens"))
    return tokens / supervised
