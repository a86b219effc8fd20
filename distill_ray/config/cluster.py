"""`[cluster]`: the Ray cluster that a run is placed on. All of it is placement.

Of the running job only `pin_by_label` is read; the rest is what `distill-ray render` writes into manifests.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from distill_ray.config.environments import EnvironmentsSection, SubmitSection
from distill_ray.config.kinds import Listed, Placement, Section

ROLE_LABEL = "distill-ray/role"
"""Ray node label that tells which part of a run a node is for."""
TEACHER_ROLE, STUDENT_ROLE = "teacher", "student"
Role = Literal["teacher", "student"]

_KUBERNETES_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_CRON_FIELD = re.compile(r"[0-9A-Za-z*/,-]+")


def _named(value: str) -> str:
    if not _KUBERNETES_NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a Kubernetes name; use lower-case letters, digits and '-', a letter first, at most 63"
        )
    return value


KubernetesName = Annotated[str, AfterValidator(_named)]


class NodesSection(Section):
    """Pods of one role, one Ray node each."""

    image: Placement[str | None] = None
    """Container image with distill-ray in it; its Ray and Python versions equal those of the other roles'."""
    cpus: Placement[int] = Field(default=8, ge=1)
    """CPUs of one pod."""
    memory_gib: Placement[int] = Field(default=32, ge=1)
    """Memory of one pod, GiB; Ray's object store takes 30 % of it."""
    disk_gib: Placement[int] = Field(default=100, ge=1)
    """Local disk of one pod, GiB: model weights, and checkpoints on their way to storage."""
    node_selector: Placement[dict[str, str]] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that the pods may run on, say `{ "eks.amazonaws.com/nodegroup" = "teachers" }`."""
    service_account: Placement[KubernetesName | None] = None
    """Kubernetes service account; distill-ray-driver, -teacher or -student unless stated."""
    aws_role: Placement[str | None] = Field(default=None, pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/.+$")
    """ARN of the IAM role that the service account stands for on EKS; None: it has its rights by another way."""


class WorkersSection(NodesSection):
    """Pods of one role that come and go."""

    gpus_per_node: Placement[int] = Field(default=8, ge=1, le=64)
    """GPUs of one Kubernetes node; a pod has as many at most. A teacher that needs more spans several."""
    gpu_product: Placement[str | None] = None
    """Label value of `nvidia.com/gpu.product` that the nodes must have, say `NVIDIA-H100-80GB-HBM3`."""
    spot: Placement[bool] = False
    """Whether the pods may run on spot nodes."""
    idle_timeout_s: Placement[int] = Field(default=60, ge=1)
    """Seconds without work after which a pod is removed."""


class TeacherNodes(WorkersSection):
    """Pods of teachers: as many as `teacher.replicas.max` need, from none."""

    cpus: Placement[int] = Field(default=16, ge=1)
    """CPUs of one pod; they also read and tokenise."""
    memory_gib: Placement[int] = Field(default=256, ge=1)
    """Memory of one pod, GiB."""
    disk_gib: Placement[int] = Field(default=100, ge=1)
    """Local disk of one pod, GiB; the teacher's weights are copied there, and pods share their node's disk."""
    spot: Placement[bool] = True
    """Whether the pods may run on spot nodes; a lost teacher's unit is captured again."""


class StudentNodes(WorkersSection):
    """Pods of training workers: as many as `train.workers.max` need, from none."""

    cpus: Placement[int] = Field(default=64, ge=1)
    """CPUs of one pod; at least one for each worker in it."""
    memory_gib: Placement[int] = Field(default=512, ge=1)
    """Memory of one pod, GiB."""
    disk_gib: Placement[int] = Field(default=500, ge=1)
    """Local disk of one pod, GiB; checkpoints lie there before they are uploaded."""


class ClusterSection(Section):
    pin_by_label: Placement[bool] = Field(default=False)
    """True: teachers run only on nodes with the Ray label `distill-ray/role=teacher`, training workers only on those
    with `distill-ray/role=student`; the manifests of `distill-ray render` give nodes these labels."""
    environments: Placement[EnvironmentsSection] = EnvironmentsSection()
    """Software of teacher and student, where they cannot share one environment."""
    submit: Placement[SubmitSection] = SubmitSection()
    """How `distill-ray submit` hands the run to the cluster."""
    namespace: Placement[KubernetesName] = "distill-ray"
    """Kubernetes namespace of everything rendered; it must exist."""
    head: Placement[NodesSection] = NodesSection()
    """The head pod, which also runs the driver: without a GPU, never on spot nodes; it needs neither engine."""
    teacher: Placement[TeacherNodes] = TeacherNodes()
    """Pods of teachers."""
    student: Placement[StudentNodes] = StudentNodes()
    """Pods of training workers."""
    priority_class: Placement[KubernetesName | None] = None
    """Priority class of all pods; it must exist."""
    queue: Placement[KubernetesName | None] = None
    """Kueue's local queue; with one, the job is created suspended and Kueue admits it. Kueue needs its feature gate
    ElasticJobsViaWorkloadSlices, since the cluster scales itself."""
    spot_taint: Placement[str] = "distill-ray/spot"
    """Key of the taint that spot nodes carry; only roles with `spot` tolerate it. Pods of teachers and of training
    workers also tolerate the taint `distill-ray/role` of their own role, which keeps others off their nodes."""
    secrets: Placement[Listed[tuple[KubernetesName, ...]]] = ()
    """Names of Kubernetes secrets whose keys become environment variables of every pod (AWS_ACCESS_KEY_ID, …): where
    no service account stands for a role."""
    region: Placement[str | None] = None
    """AWS_REGION of every pod."""
    endpoint_url: Placement[str | None] = None
    """AWS_ENDPOINT_URL of every pod, for an S3 server that is not AWS's."""
    schedule: Placement[str] = "0 2 * * 1"
    """When the weekly job starts, UTC: minute, hour, day of month, month, day of week. Mondays at 02:00."""
    deadline_hours: Placement[float] = Field(default=120.0, gt=0, le=1000)
    """Hours after which an attempt is ended; it is not tried again then."""
    retries: Placement[int] = Field(default=3, ge=0)
    """Attempts after a failed one, each on a new cluster; what was finished is in storage."""
    keep_finished_s: Placement[int] = Field(default=600, ge=0)
    """Seconds that a finished job's cluster is kept, for its logs."""
    drain_s: Placement[int] = Field(default=60, ge=1, le=600)
    """Seconds in which a node that is told to go may finish; AWS gives spot nodes 120 from the notice on."""

    @field_validator("schedule")
    @classmethod
    def _five_fields(cls, value: str) -> str:
        fields = value.split()
        if len(fields) != 5 or not all(_CRON_FIELD.fullmatch(field) for field in fields):
            raise ValueError(f'{value!r} is not five fields of cron, say "0 2 * * 1" for Mondays at 02:00 UTC')
        return value

    def selector(self, role: Role) -> dict[str, str]:
        """Ray label selector of what runs for a role; empty where nothing is pinned."""
        return {ROLE_LABEL: role} if self.pin_by_label else {}

    def besides(self, role: Role) -> dict[str, str]:
        """Ray label selector of tasks that may run anywhere but on nodes of that role; empty likewise."""
        return {ROLE_LABEL: f"!{role}"} if self.pin_by_label else {}
