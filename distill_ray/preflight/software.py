"""What is installed where it is needed, and whether the store is reached from there.

The driver needs neither vllm nor deepspeed: on a cluster one node of each group is asked, by a task that has what the
group's own processes have.
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Any

from distill_ray.config import Recipe
from distill_ray.config.cluster import STUDENT_ROLE, TEACHER_ROLE, Role
from distill_ray.config.environments import Environment
from distill_ray.errors import DistillError, UserError
from distill_ray.preflight.finding import Finding
from distill_ray.session import died, live_nodes
from distill_ray.storage import NotFoundError, Storage, open_storage

_ROLES: tuple[Role, ...] = (TEACHER_ROLE, STUDENT_ROLE)
_ANSWER_S = 240.0
"""Seconds that a node gets to start a process, ask the store and answer."""
_INSTALL_S = 600.0
"""Seconds more where it first installs `pip` requirements: as long as Ray itself allows for it."""


@dataclass(frozen=True)
class Group:
    """The nodes of a role, by one that is up."""

    role: Role
    node: dict[str, Any] | None
    """Ray's account of it; None where none is up."""
    environment: Environment
    extras: Mapping[str, str]
    """What the role's processes import, each with the extra of distill-ray that brings it."""
    key: str
    """Where the node writes to the store."""

    def __str__(self) -> str:
        return f"the {self.role}'s node {self.node['NodeManagerAddress'] if self.node else ''}"

    @property
    def at(self) -> tuple[str, str] | None:
        """Node and environment; groups with the same have the same to say. None where no node is up."""
        return (self.node["NodeID"], repr(self.environment)) if self.node else None

    @property
    def stated(self) -> str:
        """What the recipe states of the environment, in brackets."""
        stated = self.environment.runtime_env()
        return f" (cluster.environments.{self.role} = {stated})" if stated else ""


@dataclass(frozen=True)
class Report:
    """What a process on a node has."""

    python: str
    ray: str
    packages: Mapping[str, str | None]
    """Distribution and version by importable name; None where there is none of that name."""


def needed(recipe: Recipe, role: Role) -> dict[str, str]:
    """What processes of a role import, each with the extra of distill-ray that brings it."""
    if role == TEACHER_ROLE:
        vllm = {"vllm": "teacher" if recipe.teacher.use_gpu else "teacher-cpu"}
        return {"transformers": "teacher"} | (vllm if "vllm" in (recipe.teacher.engine, recipe.audit.engine) else {})
    lora = {"peft": "student"} if recipe.student.lora else {}
    return {"transformers": "student", "deepspeed": "student"} | lora


def environment_of(recipe: Recipe, role: Role) -> Environment:
    """Of a role's processes."""
    return getattr(recipe.cluster.environments, role)


def installed_here(recipe: Recipe, *, alone: bool) -> Finding:
    """What this process has; where no cluster works for it (`alone`), it has what every role needs.

    Raises UserError naming what is missing.
    """
    wanted, apart = {"transformers": "student"}, []
    for role in _ROLES if alone else ():
        if environment_of(recipe, role).runtime_env():
            apart.append(f"cluster.environments.{role} is not asked: only a running cluster's is (--address)")
        else:
            wanted |= needed(recipe, role)
    for package, extra in wanted.items():
        if find_spec(package) is None:
            raise UserError(f"package {package} is not installed here; install distill-ray[{extra}]")
    return Finding("packages", "; ".join([", ".join(sorted(wanted)), *apart]))


def ask_groups(recipe: Recipe) -> list[Finding]:
    """Ask one live node of each role what it has, and let it write under the root. Ray is connected.

    A role without a node now is not asked: no node is brought up for a check.

    Raises:
        UserError: a node lacks a package, has another Python or Ray, does not reach the store, or does not answer.
        DistillError: the process that was asked died, its node did not.
    """
    storage, found = open_storage(recipe.storage.root), groups(recipe)
    try:
        answers = _ask(found, storage)
        return [_finding(group, answers.get(group.at), storage) for group in found]
    finally:
        for group in found:
            storage.delete(group.key)


def groups(recipe: Recipe) -> list[Group]:
    """Teachers and training workers, each by a node that is up and stays. Ray is connected."""
    from ray._private import state

    leaving, name = state.state.get_draining_nodes(), f"check-{uuid.uuid4().hex}"
    # Each writes where its role may (infra/terraform/roles.tf); a teacher may delete nowhere, so the driver does.
    asked: list[tuple[Role, bool, str]] = [
        (TEACHER_ROLE, recipe.teacher.use_gpu, "targets"),
        (STUDENT_ROLE, recipe.train.use_gpu, f"{recipe.run_prefix}/checkpoints"),
    ]
    found = []
    for role, gpu, place in asked:
        nodes = [node for node in live_nodes(recipe.cluster.selector(role)) if node["NodeID"] not in leaving]
        fitting = [node for node in nodes if node["Resources"].get("GPU") or not gpu]
        node = fitting[0] if fitting else None
        found.append(Group(role, node, environment_of(recipe, role), needed(recipe, role), f"{place}/{name}"))
    return found


def look(packages: Sequence[str], storage: Storage, keys: Sequence[str]) -> Report:
    """Runs on a node: what a process there has; leaves an object at each key. Raises StorageError."""
    for key in keys:
        next(iter(storage.list(f"{key.rpartition('/')[0]}/")), None)
        storage.put(key, b"check")
    return report(packages)


def report(packages: Sequence[str]) -> Report:
    """What this process has."""
    known = packages_distributions()
    found = {
        name: " ".join(f"{each} {version(each)}" for each in known.get(name, [])) if find_spec(name) else None
        for name in packages
    }
    return Report(platform.python_version(), version("ray"), found)


def require(group: Group, found: Report, here: Report) -> None:
    """Raises UserError where a node's answer is not what its processes, and those here, need."""
    if (minor(found.python), found.ray) != (minor(here.python), here.ray):
        raise UserError(
            f"{group} has Python {found.python} and Ray {found.ray}, the driver has {here.python} and {here.ray}: what "
            f"one sends, the other cannot read; give all the same Ray and minor version of Python{group.stated}"
        )
    lacking = [name for name in group.extras if found.packages[name] is None]
    if lacking:
        raise UserError(
            f"{group} lacks {', '.join(lacking)}; install distill-ray[{group.extras[lacking[0]]}] in its image, or "
            f"state a cluster.environments.{group.role} that holds it{group.stated}"
        )


def require_seen(group: Group, storage: Storage) -> None:
    """Raises UserError where what the node wrote is not in the driver's store."""
    try:
        storage.get(group.key)
    except NotFoundError:
        raise UserError(
            f"{group} wrote under {storage.uri}, and it is not there for the driver: the folder is that node's own; "
            "let storage.root be a folder that all nodes share, or s3://bucket/prefix"
        ) from None


def minor(python: str) -> str:
    """Of "3.11.9": "3.11"."""
    return python.rpartition(".")[0]


def _ask(groups: Sequence[Group], storage: Storage) -> dict[tuple[str, str] | None, Any]:
    """The coming answer of each node and environment."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    answers = {}
    for at in filter(None, {group.at for group in groups}):
        alike = [group for group in groups if group.at == at]
        # On that very node or not at all: the autoscaler is asked for nothing. It takes no GPU, so it waits for none.
        place = NodeAffinitySchedulingStrategy(at[0], soft=False)
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place, **alike[0].environment.options()}
        packages, keys = sorted({name for group in alike for name in group.extras}), [group.key for group in alike]
        answers[at] = ray.remote(look).options(**options).remote(packages, storage, keys)
    return answers


def _finding(group: Group, answer: Any, storage: Storage) -> Finding:
    what = f"{group.role}s"
    if group.node is None:
        return Finding(what, "not asked what they have: no node of theirs is up, and a check brings up none")
    found = _answer(group, answer)
    if found is None:
        return Finding(what, f"not asked what they have: {group} went away before it answered")
    require(group, found, report([]))
    require_seen(group, storage)
    packages = ", ".join(found.packages[name] or "" for name in group.extras)
    return Finding(what, f"{packages}, Python {found.python} and Ray {found.ray} on {group}, which writes to the store")


def _answer(group: Group, answer: Any) -> Report | None:
    """None where the node is gone. Raises what `ask_groups` raises."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError, RuntimeEnvSetupError

    limit = _ANSWER_S + (_INSTALL_S if group.environment.pip else 0.0)
    try:
        return ray.get(answer, timeout=limit)
    except GetTimeoutError:
        ray.cancel(answer, force=True)
        raise UserError(
            f"{group} did not answer within {limit:.0f} s{group.stated}; look at its logs under "
            "/tmp/ray/session_latest/logs: no process starts there, or the store does not answer it"
        ) from None
    except RuntimeEnvSetupError as error:
        raise UserError(f"{group} cannot make its environment{group.stated}: {_last(error)}; correct it") from error
    except RayTaskError as error:
        if isinstance(error.cause, DistillError):
            raise UserError(f"from {group}: {error.cause}") from error
        raise UserError(
            f"{group} cannot run distill-ray: {_last(error)}; install distill-ray[{next(iter(group.extras.values()))}] "
            "there, or use `distill-ray submit`, which brings the code"
        ) from error
    except RayError as error:
        if group.node and group.node["NodeID"] not in {node["NodeID"] for node in live_nodes()}:
            return None
        raise died(f"the process that {group} was asked through died", error) from error


def _last(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
