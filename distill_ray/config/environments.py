"""`[cluster.environments]` and `[cluster.submit]`: what software parts of a run find, and how it is submitted."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distill_ray.config.kinds import Listed, Placement, Section


class Environment(Section):
    """Software of one part of the run; nothing stated: what the driver has."""

    py_executable: Placement[str | None] = Field(default=None, min_length=1)
    """Interpreter on the nodes, say `/opt/teacher/bin/python`; same Python minor and Ray version as the driver's."""
    pip: Placement[Listed[tuple[str, ...]]] = ()
    """Requirements that each node installs into an environment of its own before it starts the first process there."""
    conda: Placement[str | None] = Field(default=None, min_length=1)
    """Name of a conda environment on the nodes."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        stated = list(self.runtime_env())
        if len(stated) > 1:
            raise ValueError(f"{' and '.join(stated)} are ways to the same thing; state one")
        return self

    def runtime_env(self) -> dict[str, Any]:
        """As Ray's runtime_env of an actor; {} for the driver's own. The code of the job comes on top by itself."""
        stated = {"py_executable": self.py_executable, "pip": list(self.pip), "conda": self.conda}
        return {name: value for name, value in stated.items() if value}

    def options(self) -> dict[str, Any]:
        """The same as options of an actor or task; {} where there is nothing to state."""
        env = self.runtime_env()
        return {"runtime_env": env} if env else {}


class EnvironmentsSection(Section):
    """vllm and deepspeed pin different versions of torch on GPUs. Images are told apart by node groups instead
    (`cluster.pin_by_label`): Ray's `image_uri` admits no code of a job beside it."""

    teacher: Environment = Environment()
    """Of the actors that capture and audit; it must hold the extra `teacher`."""
    student: Environment = Environment()
    """Of training workers and of the task that scores; it must hold the extra `student`."""


class NodeGroup(Section):
    """Nodes of one kind that the autoscaler may bring up."""

    nodes: Placement[int] = Field(ge=1)
    """Greatest number of them, the present ones included."""
    gpus: Placement[int] = Field(default=0, ge=0)
    """GPUs of each."""
    cpus: Placement[int] = Field(default=1, ge=1)
    """CPUs of each."""
    role: Placement[Literal["teacher", "student"] | None] = None
    """Its value of the label `distill-ray/role`, as far as `cluster.pin_by_label` matters."""


class SubmitSection(Section):
    retries: Placement[int] = Field(default=0, ge=0, le=100)
    """How often `submit --wait` submits the run again after its driver failed or was lost; each goes on where the last
    one was. What the user has to mend (exit codes 2, 3 and 4) and what was stopped is not tried again."""
    retry_wait_s: Placement[float] = Field(default=75.0, ge=0)
    """Seconds before that. A driver that vanished holds its lease for up to 60 s, and another node's cannot know."""
    driver_labels: Placement[dict[str, str]] = Field(default_factory=dict)
    """Ray node labels that the driver's node must have, such as `{ "ray.io/market-type" = "on-demand" }`; none: the
    head node. Never state spot nodes: with its driver the whole run stops."""
    driver_cpus: Placement[float] = Field(default=1.0, ge=0)
    """CPUs that the driver reserves on a node chosen by `driver_labels`. On the head node it reserves nothing."""
    grows_to: Placement[Listed[tuple[NodeGroup, ...]]] = ()
    """What the cluster's autoscaler may add, which a dashboard does not tell; none: only present nodes count."""
