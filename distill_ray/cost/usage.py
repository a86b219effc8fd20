"""What commands spent on the stages of a run, kept in its folder: `<run>/usage/e<epoch>-<stage>.json`.

One object for each command (its lease's epoch) and stage, written again and again while the stage runs. So what a run
has spent is their sum, whatever was killed and whoever resumed it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Literal

from distill_ray.config import Recipe
from distill_ray.cost.spent import ActorTime
from distill_ray.errors import IntegrityError
from distill_ray.lease import LeaseToken, put_owned
from distill_ray.schema import ARTEFACT_OF
from distill_ray.storage import NotFoundError, Storage

SCHEMA_VERSION = 1
Device = Literal["GPU", "CPU process"]
_HOUR = 3600.0


@dataclass(frozen=True)
class NodeUsage:
    """Processes on nodes of one type; seconds are device seconds, a process's times the devices it holds."""

    node_type: str
    processes: int
    start_s: float
    """Until they were ready for work: staging and loading of weights."""
    busy_s: float
    idle_s: float
    done: int
    """Units, steps or batches finished, some of them perhaps again."""
    tokens: int
    """In them: all tokens of a capture's units, supervised ones of a training's steps."""

    @property
    def seconds(self) -> float:
        """Device seconds, whatever was done in them."""
        return self.start_s + self.busy_s + self.idle_s


@dataclass(frozen=True)
class Usage:
    """What one command spent on one stage, by node type."""

    stage: str
    epoch: int
    """The lease's, which tells commands apart."""
    device: Device
    devices: int
    """Held by each process."""
    ended: bool
    """False where the command still runs or was killed: some seconds at its end are not in it."""
    nodes: tuple[NodeUsage, ...]


@dataclass(frozen=True)
class StageUsage:
    """All commands together: one stage on one type of node."""

    stage: str
    device: Device
    commands: int
    on: NodeUsage


def sum_by_node(times: Iterable[ActorTime], devices: int) -> tuple[NodeUsage, ...]:
    """By node type, ascending."""
    ordered = sorted(times, key=lambda t: t.node_type)
    found = []
    for node_type, each in groupby(ordered, key=lambda t: t.node_type):
        group = list(each)
        start, busy, idle = (
            round(devices * sum(s), 3)
            for s in zip(*((t.staging_s + t.loading_s, t.busy_s, t.idle_s) for t in group), strict=True)
        )
        done, tokens = sum(t.done for t in group), sum(t.tokens for t in group)
        found.append(NodeUsage(node_type, len(group), start, busy, idle, done, tokens))
    return tuple(found)


def write_usage(storage: Storage, token: LeaseToken, usage: Usage) -> None:
    """Write the object of this command and stage whole. Raises LeaseLostError, StorageError."""
    data = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(usage)}, indent=1, sort_keys=True) + "\n"
    put_owned(storage, token, f"{_prefix(token.run_prefix)}e{token.epoch:04d}-{usage.stage}.json", data.encode())


def read_usage(storage: Storage, run_prefix: str) -> tuple[list[Usage], list[str]]:
    """What all commands spent on the run, by epoch and stage, and a sentence for each object that cannot be read."""
    found, problems = list[Usage](), list[str]()
    order = list(ARTEFACT_OF)
    for info in storage.list(_prefix(run_prefix)):
        try:
            found.append(_parse(storage.get(info.key), f"{storage.uri}/{info.key}"))
        except NotFoundError:
            continue  # removed since it was listed
        except IntegrityError as error:
            problems.append(str(error))
    return sorted(found, key=lambda u: (u.epoch, order.index(u.stage))), problems


def _parse(data: bytes, where: str) -> Usage:
    try:
        fields = json.loads(data)
        if fields.pop("schema_version") != SCHEMA_VERSION or fields["stage"] not in ARTEFACT_OF:
            raise ValueError("another version of the software wrote it")
        return Usage(**fields | {"nodes": tuple(NodeUsage(**node) for node in fields["nodes"])})
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{where} ({len(data)} bytes) does not say what a command spent: {error}; restore it, or delete it: what "
            "it held is then missing from the run's cost"
        ) from error


def by_stage(usages: Iterable[Usage]) -> list[StageUsage]:
    """The sum over commands, in the order of the stages."""
    order = list(ARTEFACT_OF)
    pairs = [(usage, node) for usage in usages for node in usage.nodes]

    def key(pair: tuple[Usage, NodeUsage]) -> tuple[int, str, str]:
        return order.index(pair[0].stage), pair[0].device, pair[1].node_type

    found = []
    for _, each in groupby(sorted(pairs, key=key), key=key):
        group = list(each)
        usage, total = group[0]
        for _, node in group[1:]:
            names = ("processes", "start_s", "busy_s", "idle_s", "done", "tokens")
            total = replace(total, **{name: getattr(total, name) + getattr(node, name) for name in names})
        found.append(StageUsage(usage.stage, usage.device, len({u.epoch for u, _ in group}), total))
    return found


def hours_held(
    storage: Storage,
    recipe: Recipe,
    stage: str | None = None,
    *,
    device: Device = "GPU",
    but_epoch: int | None = None,
) -> float:
    """Device hours that processes of this run have held, over all commands, the one that asks and its rivals included.

    A running or killed command counts up to its last word, some seconds ago; targets that other runs captured count
    nothing.

    Args:
        storage: the recipe's root.
        recipe: names the run.
        stage: of this one alone; None: of all.
        device: which are counted.
        but_epoch: a command that is left out.

    Raises:
        IntegrityError: an object of the run's usage is damaged, so that the sum is not known.
    """
    usages, problems = read_usage(storage, recipe.run_prefix)
    if problems:
        raise IntegrityError("; ".join(problems))
    return device_hours([u for u in usages if stage in (None, u.stage) and u.epoch != but_epoch], device)


def device_hours(usages: Iterable[Usage], device: Device) -> float:
    """Hours that devices of one kind were held."""
    return sum(node.seconds for usage in usages if usage.device == device for node in usage.nodes) / _HOUR


def _prefix(run_prefix: str) -> str:
    return f"{run_prefix}/usage/"
