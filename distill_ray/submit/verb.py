"""The commands `submit`, `logs` and `stop`, as the command line gives them."""

from __future__ import annotations

import argparse
import shlex
import sys

from distill_ray.config import Recipe
from distill_ray.submit.client import Client, connect
from distill_ray.submit.follow import show_logs, wait
from distill_ray.submit.job import stop, submit


def job_command(recipe: Recipe, arguments: argparse.Namespace, options: list[str]) -> int:
    """Do what the arguments say; returns the exit code. Ctrl-C while a log is shown leaves the job alone.

    Args:
        recipe: of the run.
        arguments: of the command line.
        options: those among them that changed the recipe, for the commands that are named.
    """
    client = connect(arguments.address)
    if arguments.command == "stop":
        print(stop(client, recipe))
        return 0
    try:
        if arguments.command == "logs":
            return show_logs(client, recipe, follow=arguments.follow)
        return _submit(client, recipe, arguments, options)
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on\n{_next(recipe, arguments, options)}", file=sys.stderr)
        return 130


def _submit(client: Client, recipe: Recipe, arguments: argparse.Namespace, options: list[str]) -> int:
    submitted = submit(client, recipe, arguments.until)
    if submitted.attached:
        print(f"attached to {submitted.submission_id}, which brings the run up to {submitted.until}")
    else:
        print(f"submitted {submitted.submission_id}")
    if arguments.wait:
        return wait(client, recipe, submitted)
    print(_next(recipe, arguments, options))
    return 0


def _next(recipe: Recipe, arguments: argparse.Namespace, options: list[str]) -> str:
    """The commands that belong to this very run, also next week."""
    rest = [arguments.recipe, *options, "--version", recipe.version, "--address", arguments.address]
    lines = [
        ("follow", ["logs", *rest, "--follow"]),
        ("stop", ["stop", *rest]),
        ("where it stands", ["status", *rest]),
    ]
    return "\n".join(f"  {what + ':':<17} {shlex.join(['distill-ray', *command])}" for what, command in lines)
