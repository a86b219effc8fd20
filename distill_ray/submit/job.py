"""A run's job on a cluster: submit or attach, stop, and where it stands."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_ray.config import Recipe, fingerprint, identity_of
from distill_ray.errors import DistillError, UserError
from distill_ray.submit.client import Client
from distill_ray.submit.naming import attempt_id, attempt_of, attempts, base_id
from distill_ray.submit.package import RECIPE_NAME, STOP_WAIT_S, lay_out
from distill_ray.submit.room import require_room

_COLLISIONS = 20
"""Submissions in a row that may find their id taken by somebody quicker whose job ended at once."""
_KILL_S = 60
"""Seconds in which Ray ends what did not stop by itself."""


@dataclass(frozen=True)
class Submitted:
    """A job of the run that is on its way."""

    submission_id: str
    attached: bool
    """It was there already."""
    until: str
    """The stage that it brings the run up to."""


def submit(client: Client, recipe: Recipe, until: str = "export") -> Submitted:
    """Submit the run, or attach to its job where one is on its way: at most one ever is.

    The id of the n-th job follows from the run alone, and a job is submitted only once its predecessor has ended, so
    of two submitters at once Ray refuses one, who then attaches.

    Args:
        client: of the cluster.
        recipe: the run.
        until: stage to bring it up to.

    Raises:
        UserError: the cluster cannot hold the run, which is said before anything is uploaded; or the job on its way
            is of a recipe that computes something else.
    """
    with tempfile.TemporaryDirectory(prefix="distill-ray-submit-") as folder:
        env: dict[str, Any] | None = None
        for _ in range(_COLLISIONS):
            last = latest(client, recipe)
            if last is not None and not last.status.is_terminal():
                return _attach(last, recipe)
            if env is None:
                require_room(client, recipe)
                env = lay_out(recipe, Path(folder))
            number = 1 if last is None else 1 + (attempt_of(last.submission_id, base_id(recipe)) or 0)
            submission_id = attempt_id(base_id(recipe), number)
            if _created(client, recipe, submission_id, env, until):
                return Submitted(submission_id, False, until)
    raise DistillError(f"{_COLLISIONS} submissions of {_run(recipe)} found their id taken by jobs that ended at once")


def latest(client: Client, recipe: Recipe) -> Any | None:
    """Ray's JobDetails of the run's last job; None where the cluster knows of none."""
    jobs = {job.submission_id: job for job in client.list_jobs()}
    numbers = attempts(jobs, base_id(recipe))
    return jobs[attempt_id(base_id(recipe), numbers[-1])] if numbers else None


def require_latest(client: Client, recipe: Recipe) -> Any:
    """The same; raises UserError, naming the versions that the cluster knows, where there is none."""
    found = latest(client, recipe)
    if found is not None:
        return found
    runs = {(job.metadata or {}).get("distill_ray_run", "") for job in client.list_jobs()}
    known = sorted(run.partition("/")[2] for run in runs if run.startswith(f"{recipe.name}/"))
    raise UserError(
        f"the cluster at {client.get_address()} knows no job of {_run(recipe)}; versions it knows: "
        f"{', '.join(known) or 'none'} (--version)"
    )


def stop(client: Client, recipe: Recipe, wait_s: float = STOP_WAIT_S + _KILL_S) -> str:
    """Stop the run's job and wait until it has stopped; returns a sentence. What is finished is kept.

    Raises UserError where there is no job, DistillError where it has not stopped after `wait_s` seconds.
    """
    job = require_latest(client, recipe)
    if job.status.is_terminal():
        return f"{job.submission_id} had ended before: {job.status.value}"
    client.stop_job(job.submission_id)
    deadline = time.monotonic() + wait_s
    while not (status := client.get_job_status(job.submission_id)).is_terminal():
        if time.monotonic() > deadline:
            raise DistillError(f"{job.submission_id} is still {status.value} {wait_s:.0f} s after it was told to stop")
        time.sleep(0.5)
    return f"{job.submission_id}: {status.value}; the next submit goes on from what is finished"


def describe(client: Client, recipe: Recipe) -> str:
    """Where the run's last job stands, in a line."""
    job = latest(client, recipe)
    if job is None:
        return f"no job of this run at {client.get_address()}"
    line = f"{job.submission_id} at {client.get_address()}: {job.status.value}"
    if job.driver_exit_code:
        line += f" with exit code {job.driver_exit_code}"
    if job.start_time:
        ended = job.end_time or time.time() * 1000
        line += f", {'took' if job.end_time else 'for'} {(ended - job.start_time) / 1000:,.0f} s"
    if job.driver_info:
        line += f", driver on {job.driver_info.node_ip_address}"
    return line


def _run(recipe: Recipe) -> str:
    return f"{recipe.name}/{recipe.version}"


def _computes(recipe: Recipe) -> str:
    """Of what is computed, and where it goes."""
    return fingerprint({"root": recipe.storage.root, "of": identity_of(recipe)})


def _attach(job: Any, recipe: Recipe) -> Submitted:
    metadata = job.metadata or {}
    if metadata.get("distill_ray_computes") != _computes(recipe):
        raise UserError(
            f"{job.submission_id} is {job.status.value} for {_run(recipe)}, with another recipe than this one (under "
            f"{metadata.get('distill_ray_root')}); stop it (`distill-ray stop`), or give this recipe its own --version"
        )
    return Submitted(job.submission_id, True, metadata["distill_ray_until"])


def _created(client: Client, recipe: Recipe, submission_id: str, env: dict[str, Any], until: str) -> bool:
    """False where somebody else was quicker."""
    command = "run" if until == "export" else until
    try:
        client.submit_job(
            # exec: what is signalled, and whose exit code counts, is the driver and no shell. Ray sets RAY_ADDRESS.
            entrypoint=f"exec python -m distill_ray {command} {RECIPE_NAME} --address auto",
            submission_id=submission_id,
            runtime_env=env,
            metadata={
                "distill_ray_run": _run(recipe),
                "distill_ray_root": recipe.storage.root,
                "distill_ray_until": until,
                "distill_ray_computes": _computes(recipe),
            },
            **_driver_place(recipe),
        )
    except RuntimeError as error:
        if f"{submission_id} already exists" in str(error):
            return False
        raise DistillError(f"the cluster at {client.get_address()} refuses the job: {error}") from error
    return True


def _driver_place(recipe: Recipe) -> dict[str, Any]:
    """Ray puts a job's driver on the head node as long as nothing is asked for it; no GPU in either case."""
    section = recipe.cluster.submit
    if not section.driver_labels:
        return {}
    return {"entrypoint_label_selector": section.driver_labels, "entrypoint_num_cpus": section.driver_cpus}
