"""Run one bench, print its figures as a table, and write them as one flat JSON object.

    python -m tests.bench codec --json codec.json

Each bench is a module of this package with `add_arguments(parser)` and `run(arguments) → {name: number}`; its docstring
is its help. A new module is found by itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType

from tests import bench

HELPERS = {"__main__", "engines", "lessons", "measure", "paged", "rivals"}


def names() -> list[str]:
    """The benches there are, without importing any."""
    return sorted({m.name for m in pkgutil.iter_modules(bench.__path__)} - HELPERS)


def load(name: str) -> ModuleType:
    """The module of one bench.

    Raises:
        SystemExit: no such bench; names those that exist.
    """
    if name not in names():
        raise SystemExit(f"no bench {name!r}; there are: {', '.join(names())}")
    return importlib.import_module(f"{bench.__name__}.{name}")


def table(figures: dict[str, float]) -> str:
    """Names and figures in two columns."""
    width = max(map(len, figures), default=0)
    return "\n".join(f"{name:<{width}}  {value:>14,.6g}" for name, value in figures.items())


def main(arguments: list[str] | None = None) -> None:
    first = argparse.ArgumentParser(prog="python -m tests.bench", add_help=False)
    first.add_argument("name", nargs="?")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.name is None:
        raise SystemExit(f"usage: python -m tests.bench NAME --json FILE; benches: {', '.join(names())}")
    module = load(chosen.name)
    parser = argparse.ArgumentParser(prog=f"python -m tests.bench {chosen.name}", description=module.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    module.add_arguments(parser)
    parsed = parser.parse_args(rest)
    figures = module.run(parsed)
    print(table(figures))
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
