"""A job's log, live: progress as a bar on a terminal and as the driver's own lines elsewhere; waiting for the end."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import IO, Any

import aiohttp

from distill_ray.config import Recipe
from distill_ray.errors import DistillError, StoppedError
from distill_ray.submit.client import Client
from distill_ray.submit.job import Submitted, require_latest, submit
from distill_ray.telemetry import Progress, say

_LOST = 8
"""Connections to a log in a row that may fail before the submitter gives up, some four minutes."""
_LONGEST_PAUSE_S = 60.0
_USERS_CODES = (2, 3, 4)
"""Exit codes of what only the user can change."""
_KNOWN = ("time", "stage", "event", "done", "total", "unit", "elapsed_s", "eta_s", "note")


class LogView:
    """Shows a driver's lines: progress on standard error, as a bar if that is a terminal; the rest on standard output.

    Args:
        out: where text goes.
        err: where progress goes.
    """

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._bar: Progress | None = None
        self._stage, self._done = "", 0

    def feed(self, line: str) -> None:
        """One line without its end."""
        record = _progress(line)
        if record is None:
            self.close()
            print(line, file=self._out, flush=True)
        elif self._err.isatty():
            self._draw(record)
        else:
            print(line, file=self._err, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def _draw(self, record: dict[str, Any]) -> None:
        stage, event = record["stage"], record["event"]
        if event == "note" and (self._bar is None or stage != self._stage):
            self.close()
            print(f"{stage}: {record['note']}", file=self._err, flush=True)
            return
        if self._bar is None or stage != self._stage:
            self.close()
            self._bar = Progress(stage, record["total"], record["unit"], stream=self._err).__enter__()
            self._stage, self._done = stage, 0
        if event == "note":
            self._bar.note(record["note"])
        done = int(record.get("done", self._done))
        fields = {name: value for name, value in record.items() if name not in _KNOWN}
        # What was there at the start took the driver no time; a restarted group of workers counts back.
        move = self._bar.skip if event == "start" or done < self._done else self._bar.advance
        move(done - self._done, **fields)
        self._done = done
        if event in ("end", "stopped"):
            self.close()


def _progress(line: str) -> dict[str, Any] | None:
    """The record of a progress line; None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and {"stage", "event"} <= record.keys()
    return record if whole and (record["event"] == "note" or {"total", "unit"} <= record.keys()) else None


def show_logs(client: Client, recipe: Recipe, *, follow: bool, view: LogView | None = None) -> int:
    """Show the log of the run's last job, with `follow` to its end; returns the exit code of the command.

    Raises UserError where the cluster knows no job of the run.
    """
    job = require_latest(client, recipe)
    if not follow:
        print(client.get_job_logs(job.submission_id), end="")
        return 0
    return wait(client, recipe, Submitted(job.submission_id, True, ""), view=view, retries=0)


def wait(
    client: Client,
    recipe: Recipe,
    submitted: Submitted,
    *,
    view: LogView | None = None,
    retries: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Show the job's log until it ends, submitting the run again as `[cluster.submit] retries` says.

    Returns:
        The driver's exit code; 130 where the job was stopped, 1 where it was lost.

    Raises:
        KeyboardInterrupt: the job goes on.
        DistillError: the cluster was lost sight of; the job may go on.
    """
    shown = view or LogView()
    section = recipe.cluster.submit
    left = section.retries if retries is None else retries
    try:
        while True:
            asyncio.run(_follow(client, submitted.submission_id, shown))
            ended = _ended(client, submitted.submission_id, sleep)
            code = exit_code(ended)
            _tell(ended, code)
            if left == 0 or not is_retried(ended, code):
                return code
            left -= 1
            say("submit", f"submitted again in {section.retry_wait_s:g} s; {left} retries left after that")
            sleep(section.retry_wait_s)
            submitted = submit(client, recipe, submitted.until)
            say("submit", f"{'attached to' if submitted.attached else 'submitted'} {submitted.submission_id}")
    finally:
        shown.close()


def exit_code(job: Any) -> int:
    """What the command ends with for a job that ended so (Ray's JobDetails)."""
    if job.status.value == "SUCCEEDED":
        return 0
    if job.status.value == "STOPPED":
        return StoppedError.exit_code
    code = job.driver_exit_code
    return code if code is not None and 0 < code < 256 else 1


def is_retried(job: Any, code: int) -> bool:
    """Whether the same run, submitted again, may end better."""
    return job.status.value == "FAILED" and code not in _USERS_CODES


def _tell(job: Any, code: int) -> None:
    if job.status.value == "FAILED" and job.driver_exit_code is None:
        # The driver never ran, or vanished: its log cannot say why.
        say("submit", f"{job.submission_id} {job.status.value}: {' '.join((job.message or '').split())[-1500:]}")
    else:
        say("submit", f"{job.submission_id} {job.status.value}, exit code {code}")


def _ended(client: Client, submission_id: str, sleep: Callable[[float], None]) -> Any:
    """The job once it has ended; its log may end a moment earlier."""
    while True:
        job = client.get_job_info(submission_id)
        if job.status.is_terminal():
            return job
        sleep(0.5)


async def _follow(client: Client, submission_id: str, view: LogView) -> None:
    """Feed every line of the log once, over as many connections as it takes."""
    seen = failed = 0
    while True:
        at = 0
        try:
            async for line in _lines(client.tail_job_logs(submission_id)):
                at += 1
                if at > seen:
                    view.feed(line)
                    seen, failed = at, 0
            return
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            failed += 1
            if failed > _LOST:
                raise DistillError(
                    f"lost sight of {submission_id} at {client.get_address()} ({error}); the job may go on: attach "
                    "with `distill-ray logs --follow`"
                ) from error
            await asyncio.sleep(min(_LONGEST_PAUSE_S, 2.0**failed))


async def _lines(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Whole lines without their ends; a chunk may end within one."""
    rest = ""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            yield line
    if rest:
        yield rest
