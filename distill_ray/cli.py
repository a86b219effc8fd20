"""The command line.

Exit codes: 0 done, 1 damaged data or a failure, 2 the user can mend it, 3 the student missed a bound, 4 a student was
trained on the source that `gc --forget` names, 130 stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from distill_ray.arguments import changing, parser
from distill_ray.config import Recipe, load_recipe, parse_recipe
from distill_ray.errors import DistillError, StoppedError, UserError


def _with_audit(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe as the arguments of `audit` change it; placement alone, so it stays the same run."""
    stated = {"engine": arguments.engine, "sequences": arguments.sequences, "units": arguments.unit}
    if arguments.sequences is not None and arguments.unit is None:
        stated["units"] = []
    changes = {name: value for name, value in stated.items() if value is not None}
    data = recipe.model_dump()
    return parse_recipe({**data, "audit": {**data["audit"], **changes}}, arguments.recipe)


def main(argv: list[str] | None = None) -> int:
    """Entry point of `distill-ray`; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        return _dispatch(arguments, own_process=argv is None)
    except StoppedError as error:
        resume = _resume_command(arguments, sys.argv[1:] if argv is None else argv)
        print(f"\nstopped: {error}\nnothing finished is lost; resume with:\n  {resume}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return StoppedError.exit_code
    except DistillError as error:
        print(f"distill-ray: {error}", file=sys.stderr)
        return error.exit_code


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return load_recipe(arguments.recipe, root=arguments.root, version=arguments.version, changes=arguments.changes)


def _resume_command(arguments: argparse.Namespace, argv: list[str]) -> str:
    """This very command for a shell, with the version spelt out: next week's default would be another run."""
    import shlex
    import shutil

    program = ["distill-ray"] if shutil.which("distill-ray") else [sys.executable, "-m", "distill_ray"]
    recipe = _recipe(arguments)
    version = [] if arguments.version else ["--version", recipe.version]
    return shlex.join([*program, *argv, *version])


def _dispatch(arguments: argparse.Namespace, *, own_process: bool) -> int:
    if arguments.command == "inspect":
        return _inspect(arguments.uri, verify=arguments.verify)
    recipe = _recipe(arguments)
    if arguments.command == "status":
        from distill_ray.status import status

        print(status(recipe).render())
        if arguments.address:
            from distill_ray.submit import connect, describe

            print(f"  {'job':<9} {describe(connect(arguments.address), recipe)}")
        return 0
    if arguments.command in ("submit", "logs", "stop"):
        from distill_ray.submit.verb import job_command

        return job_command(recipe, arguments, changing(arguments))
    if arguments.command == "gc":
        return _gc(recipe, arguments)
    if arguments.command == "render":
        return _render(recipe, arguments)
    if arguments.command == "preview":
        if own_process and not recipe.teacher.trust_remote_code:  # a model's own code may want torch
            _hide_torch()
        return _preview(recipe, arguments)
    if arguments.command == "check":
        from distill_ray.cost import forecast_sentence
        from distill_ray.forecast import predict
        from distill_ray.preflight import check

        for finding in check(recipe, address=arguments.address):
            print(f"ok  {finding.what:<9} {finding.fact}")
        print(f"ok  {'forecast':<9} {forecast_sentence(predict(recipe))}")
        return 0
    if arguments.command == "audit":
        recipe = _with_audit(recipe, arguments)
    return _run(recipe, "export" if arguments.command == "run" else arguments.command, arguments.address)


def _hide_torch() -> None:
    """For this process torch is not installed: a tokenizer does without, and importing it takes the most of `preview`'s
    time. transformers asks once and keeps the answer, so this is for a process that does nothing else."""
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that PyTorch was not found


def _preview(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from distill_ray.preview import preview

    for line in preview(recipe, arguments.documents, as_json=arguments.json, colour=sys.stdout.isatty()):
        print(line)
    return 0


def _gc(recipe: Recipe, arguments: argparse.Namespace) -> int:
    import time

    from distill_ray import gc
    from distill_ray.storage import open_storage
    from distill_ray.telemetry import Progress

    storage = open_storage(recipe.storage.root)
    done = "removed" if arguments.delete else "dry run: nothing was removed; add --delete to remove it"
    if arguments.forget is not None:
        with Progress("forget", None, "objects looked at") as shown:
            found = gc.find(storage, arguments.forget, shown.advance)
        print(found.render())
        if arguments.delete:
            with Progress("forget", sum(map(len, found.units.values())), "objects") as shown:
                gc.forget(storage, found, shown.advance)
        print(done)
        return 4 if any(run.student for run in found.runs) else 0
    if not arguments.days >= 0:
        raise UserError(f"--days {arguments.days}: state a number of days, 0 or more")
    garbage = gc.collect(storage, older_than=time.time() - arguments.days * 86400)
    print(garbage.render())
    if arguments.delete:
        with Progress("gc", None, "objects") as shown:
            gc.remove(storage, garbage, shown.advance)
    print(done)
    return 0


def _render(recipe: Recipe, arguments: argparse.Namespace) -> int:
    from distill_ray import render

    text = Path(arguments.recipe).read_text(encoding="utf-8")
    documents = render.manifests(recipe, text, arguments.kind, tuple(changing(arguments)))
    if arguments.create:
        print("\n".join(render.create(documents, render.ApiServer.of_this_pod())))
        return 0
    caption = f"distill-ray render --kind {arguments.kind}, from the recipe {recipe.name}: change that, not this"
    if arguments.output is None:
        print(render.to_yaml(documents, caption), end="")
        return 0
    try:
        Path(arguments.output).write_text(render.to_yaml(documents, caption), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {arguments.output}: {error.strerror}") from error
    return 0


def _inspect(uri: str, *, verify: bool) -> int:
    from distill_ray.targets import inspect

    report = inspect(uri, verify=verify)
    print(report.render())
    return 1 if report.problems else 0


class _Stopper:
    """Turns SIGINT and SIGTERM into a clean stop.

    Capture, audit, training and evaluation watch the event and stop by themselves; the short stages are simply left. An
    exception out of a signal's handler would leave Ray's wait as a SystemError.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.stage = "check"

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def enter(self, stage: str) -> None:
        self.stage = stage
        if self.event.is_set():
            raise StoppedError(f"before {stage}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.event.is_set()
        self.event.set()
        if again or self.stage not in ("capture", "audit", "train", "evaluate"):
            raise StoppedError(f"{signal.Signals(number).name} during {self.stage}")
        print(
            f"\n{signal.Signals(number).name}: stopping {self.stage} cleanly; once more to leave at once",
            file=sys.stderr,
        )


def _run(recipe: Recipe, until: str, address: str | None) -> int:
    stopper = _Stopper()
    stopper.install()
    from distill_ray import pipeline
    from distill_ray.report import failures, render_table
    from distill_ray.telemetry import say

    say("run", f"{recipe.name}/{recipe.version} under {recipe.storage.root}")
    result = pipeline.run(
        recipe,
        until=until,
        address=address,
        stop=stopper.event,
        on_stage=stopper.enter,
        on_finding=lambda found: say("check", f"{found.what}: {found.fact}"),
    )
    if result is None:
        print(f"{until}: done; distill-ray status shows the run")
        return 0
    print(render_table(result.report))
    for note in result.notes:
        print(f"note    {note}")
    print(f"report  {result.report_uri}")
    if result.model_uri is not None:
        print(f"model   {result.model_uri}")
    missed = failures(result.report["gate"])
    if missed:
        latest = "it is kept, but not as latest" if until == "export" else "run `distill-ray export` to settle latest"
        print(f"the student missed evaluate.require: {'; '.join(missed)}; {latest}", file=sys.stderr)
        return 3
    return 0
