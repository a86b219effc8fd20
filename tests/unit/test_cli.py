"""The command line imports nothing heavy to answer, and never shows a user a traceback."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "numba")


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill_ray", *arguments], capture_output=True, text=True, check=False
    )


def heavy_after(*arguments: str) -> list[str]:
    """Heavy packages in a fresh interpreter's modules after the command ran."""
    code = (
        "import sys\nfrom distill_ray.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return ast.literal_eval(out.rsplit("HEAVY", 1)[1].strip())


@pytest.fixture
def wrong_recipe(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.toml"
    path.write_text('name = "x"\n[storage]\nroot = "r"\nrooot = 1\n')
    return path


def test_help_teaches():
    out = cli("--help")
    assert out.returncode == 0
    for word in ("check", "run", "inspect", "status", "s3://", "killed"):
        assert word in out.stdout


def test_help_and_a_wrong_recipe_import_nothing_heavy(wrong_recipe: Path):
    assert heavy_after("--help") == []
    assert heavy_after("check", str(wrong_recipe)) == []


@pytest.mark.parametrize("command", ["check", "run", "capture", "audit", "train", "evaluate", "export", "status", "gc"])
def test_user_errors_are_one_message_and_exit_code_2(command: str, wrong_recipe: Path):
    out = cli(command, str(wrong_recipe))
    assert out.returncode == 2
    assert "Traceback" not in out.stderr
    assert "storage.rooot: unknown key" in out.stderr


@pytest.mark.parametrize("command", ["submit", "logs", "stop"])
def test_commands_of_a_cluster_check_the_recipe_first_and_need_an_address(command: str, wrong_recipe: Path):
    arguments = (command, str(wrong_recipe), "--address", "http://127.0.0.1:9")
    assert "storage.rooot: unknown key" in cli(*arguments).stderr
    assert heavy_after(*arguments) == []
    out = cli(command, str(wrong_recipe))
    assert out.returncode == 2
    assert "--address" in out.stderr


def test_a_missing_recipe_names_the_shipped_ones():
    out = cli("run", "none.toml")
    assert out.returncode == 2
    assert "jobs/recipes/" in out.stderr
