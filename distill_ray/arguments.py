"""What the command line takes, and the help that it gives."""

from __future__ import annotations

import argparse
from typing import Any

_EPILOG = """\
a first run:        make quickstart
see the data:       distill-ray preview my.toml
check a recipe:     distill-ray check my.toml
the whole job:      distill-ray run my.toml
on S3:              distill-ray run my.toml --root s3://bucket/prefix
next week's data:   distill-ray run my.toml --version 2026-W48
where it stands:    distill-ray status my.toml
on a cluster:       distill-ray submit my.toml --address http://head:8265 --wait
what can go:        distill-ray gc my.toml
weekly, Kubernetes: distill-ray render my.toml --kind cronjob | kubectl apply -f -

Every command can be stopped (Ctrl-C) or killed at any moment; the same command goes on where it was.
"""

_STAGE_HELP = {
    "run": "capture, audit, train, evaluate and export; does only what is missing",
    "capture": "store the teacher's soft targets for the corpus",
    "audit": "… then score a sample of the stored rows again by another path, and compare",
    "train": "… then train the student",
    "evaluate": "… then score teacher, student before and student after on held-out targets",
    "export": "… then publish the student as a Hugging Face folder (the same as run)",
}


def parser() -> argparse.ArgumentParser:
    """Every command and its arguments."""
    found = argparse.ArgumentParser(
        prog="distill-ray",
        description="Distil a large language model into a small one on a Ray cluster, weekly and restartably.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="find what is wrong with a recipe before money is spent")
    _recipe_arguments(check)
    check.add_argument("--address", help="Ray cluster whose nodes are counted and asked, instead of this machine")
    preview = commands.add_parser(
        "preview", help="show what the corpus becomes: sequences, and what of them is learned"
    )
    _recipe_arguments(preview)
    preview.add_argument("--documents", type=int, default=5, metavar="N", help="how many are shown (default: 5)")
    preview.add_argument("--json", action="store_true", help="one JSON object for each sequence or refused document")
    for name, text in _STAGE_HELP.items():
        command = commands.add_parser(name, help=text)
        _recipe_arguments(command)
        command.add_argument("--address", help="Ray cluster to use (default: RAY_ADDRESS, else a private local one)")
        if name == "audit":
            _audit_arguments(command)
    status = commands.add_parser("status", help="show where a run stands, from storage alone")
    _recipe_arguments(status)
    status.add_argument(
        "--address", metavar="URL", help="also say where its job stands on the cluster of this dashboard"
    )
    _job_arguments(commands)
    _render_arguments(
        commands.add_parser("render", help="write Kubernetes manifests that run a recipe, once or weekly")
    )
    _gc_arguments(commands.add_parser("gc", help="show, and with --delete remove, what no run refers to any more"))
    inspect = commands.add_parser("inspect", help="describe stored soft targets")
    inspect.add_argument("uri", help="a targets/<fingerprint> folder, one of its objects, or a run's folder")
    inspect.add_argument("--verify", action="store_true", help="read every byte and check every checksum")
    return found


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="TOML recipe; see jobs/recipes/")
    parser.add_argument("--root", help="replaces storage.root: a local folder or s3://bucket/prefix")
    parser.add_argument("--version", help="version of the run (default: the recipe's, else the ISO week)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="SECTION.KEY=VALUE",
        help="replaces a value of the recipe, written as there: train.epochs=3 (may be repeated)",
    )


def changing(arguments: argparse.Namespace) -> list[str]:
    """The options again that change what the recipe says, but for its version."""
    root = ["--root", arguments.root] if arguments.root is not None else []
    return [*root, *(word for change in arguments.changes for word in ("--set", change))]


def _job_arguments(commands: Any) -> None:
    submit = commands.add_parser("submit", help="run it as a job of a cluster, or attach to its job there")
    submit.add_argument("--wait", action="store_true", help="show its progress and end with its exit code")
    submit.add_argument("--until", choices=tuple(_STAGE_HELP)[1:], default="export", help="stage to bring it up to")
    logs = commands.add_parser("logs", help="show what the run's job on a cluster printed")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends, and end with its exit code")
    for parser in (submit, logs, commands.add_parser("stop", help="stop the run's job on a cluster; work is kept")):
        _recipe_arguments(parser)
        parser.add_argument(
            "--address", required=True, metavar="URL", help="dashboard of the cluster, http://head:8265"
        )


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sequences", type=int, metavar="N", help="replaces audit.sequences: how many are compared")
    parser.add_argument("--unit", action="append", metavar="HASH", help="compare all of this unit (may be repeated)")
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), help="replaces audit.engine")


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only say what would go (the default)")
    how.add_argument("--delete", action="store_true", help="remove it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--days", type=float, default=30.0, metavar="N", help="leave what is younger (default: 30)")
    what.add_argument(
        "--forget",
        metavar="SOURCE",
        help="instead, a withdrawn source (URI or glob): all stored rows of its content, and who was trained on them; "
        "exit code 4 where a student was",
    )


def _render_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    kinds = ("rayjob", "raycronjob", "cronjob", "raycluster")
    parser.add_argument("--kind", required=True, choices=kinds, help="one run, a weekly run (two ways), or a cluster")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", metavar="FILE", help="write there instead of to the standard output")
    where.add_argument("--create", action="store_true", help="create the run on the cluster this pod runs in (rayjob)")
