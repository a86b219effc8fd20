"""The images' locks, made anew: `make locks`, with uv on the PATH and whatever index it is set up with.

A version stays as long as pyproject.toml allows it; take its line out of the lock to let it move. A pin names the
SHA-256 of every file that x86-64 Linux may install: wheels for this Python and glibc, the source where there is none.
"""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCKS = {"driver": [], "teacher-gpu": ["--extra", "teacher"], "student-gpu": ["--extra", "student"]}
# As the images are: Python 3.11 and Ubuntu 22.04's glibc.
_PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_35")


def main() -> None:
    """Write all of them."""
    for name, extras in LOCKS.items():
        path = ROOT / "requirements" / f"{name}.lock"
        head = f"# What infra/images/{name.removesuffix('-gpu')}.Dockerfile installs; made by `make locks`.\n"
        path.write_text(head + lock(path, extras))


def lock(path: Path, extras: list[str]) -> str:
    """The lines of a lock whose versions are those at `path` as far as they may be."""
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text(path.read_text())
        _compile("pyproject.toml", *extras, "--output-file", str(pins))
        # The one format that tells files apart: for a requirements file uv would name those of all platforms.
        packages = tomllib.loads(_compile(str(pins), "--no-deps", "--format", "pylock.toml"))["packages"]
    return "".join(" ".join([f"{p['name']}=={p['version']}", *_hashes(p)]) + "\n" for p in packages)


def _hashes(package: dict[str, Any]) -> list[str]:
    files = package.get("wheels") or [package["sdist"]]
    return sorted(f"--hash=sha256:{file['hashes']['sha256']}" for file in files)


def _compile(*arguments: str) -> str:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *_PLATFORM, *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
