"""infra/terraform against a mock AWS: made, found unchanged, removed; and what is planned is what a reviewer allows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.stack_faults import GPU_ROLES, faults, resources, role_policies, statements
from tests.cluster.terraform import SOURCE, Stack, mock_aws, unavailable

pytestmark = [pytest.mark.long, pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")]
KUEUE = SOURCE.parent / "kueue"
# What one node of the default types has.
CPUS, MEMORY_GIB, GPUS = (
    {"m7i.4xlarge": 16, "p5.48xlarge": 192},
    {"m7i.4xlarge": 64, "p5.48xlarge": 2048},
    {"p5.48xlarge": 8},
)

FAULTS = {
    "public access": (
        "modules/store/main.tf",
        "block_public_policy     = true",
        "block_public_policy     = false",
        "public",
    ),
    "versions": ("modules/store/main.tf", 'status = "Enabled"\n  }\n}', 'status = "Suspended"\n  }\n}', "versioned"),
    "TLS": ("modules/store/main.tf", 'values   = ["false"]', 'values   = ["true"]', "without TLS"),
    "targets that expire": ("modules/store/main.tf", "/runs/", "/targets/", "removes more"),
    "any action": ("roles.tf", '"s3:PutObject" = ["targets/*"]', '"s3:*" = ["targets/*"]', "action s3:*"),
    "teacher writes": ("roles.tf", '"s3:PutObject" = ["targets/*"]', '"s3:PutObject" = ["*"]', "the teacher may"),
    "any resource": ("roles.tf", "resources = local.buckets", 'resources = ["*"]', "on any resource"),
    "writes outside": (
        "roles.tf",
        'actions   = ["s3:GetObject"]',
        'actions   = ["s3:PutObject"]',
        "on arn:aws:s3:::acme-data",
    ),
    "GPUs that stay": (
        "main.tf",
        "merge(var.teacher, { min = 0",
        "merge(var.teacher, { min = 1",
        "GPU nodes that stay",
    ),
    "head on spot": ("main.tf", '"ON_DEMAND"', '"SPOT"', "on spot"),
    "metadata": ("modules/cluster/nodes.tf", "hop_limit = 1", "hop_limit = 2", "reach the node's role"),
    "tags": ("modules/images/main.tf", '"IMMUTABLE"', '"MUTABLE"', "tags move"),
}


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mock_aws(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture(scope="module")
def stack(aws: str, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    stack = Stack(tmp_path_factory.mktemp("stack") / "terraform", aws)
    stack.run("init", "-input=false")
    return stack


@pytest.fixture(scope="module")
def plan(stack: Stack) -> dict[str, Any]:
    return stack.plan()


def test_it_is_formatted_and_valid(stack: Stack):
    stack.run("fmt", "-check", "-recursive", str(SOURCE))
    assert "is valid" in stack.run("validate")


def test_what_is_planned_is_what_a_reviewer_allows(plan: dict[str, Any]):
    assert faults(plan) == []


def test_every_planted_fault_is_seen(stack: Stack):
    """All are planted at once, in one plan: each is told by a sentence of its own."""
    originals = {file: (stack.folder / file).read_text() for file, *_ in FAULTS.values()}
    missed = {}
    try:
        for group in _compatible():
            for name in group:
                stack.edit(*FAULTS[name][:3])
            found = faults(stack.plan())
            missed |= {name: found for name in group if not any(FAULTS[name][3] in each for each in found)}
            for file, text in originals.items():
                (stack.folder / file).write_text(text)
    finally:
        for file, text in originals.items():
            (stack.folder / file).write_text(text)
    assert not missed


def _compatible() -> list[list[str]]:
    """The faults in as few plans as have no text edited twice."""
    groups: list[list[str]] = []
    for name, (file, old, *_) in FAULTS.items():
        for group in groups:
            if all((FAULTS[other][0], FAULTS[other][1]) != (file, old) for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


REFUSED = {
    "api_cidrs": (["0.0.0.0/0"], "none of them /0"),
    "sources": (["acme-data/*"], "without wildcards"),
    "bucket": ("Acme.Distill", "lower-case"),
    "teacher": ({"instance_types": ["p5.48xlarge"], "capacity": "RESERVED", "max": 1, "disk_gib": 500}, "SPOT or ON"),
    "lifecycle_days": ({"checkpoints": 1, "dead_letters": 1, "noncurrent": 1, "uploads": 1}, "30 or more"),
    "student_zone": (3, "student_zone is 0, 1 or 2"),
}


def test_bad_variables_are_refused_before_anything_is_made(stack: Stack):
    """All in one plan: each is told by its own sentence."""
    given = [f"-var={name}={json.dumps(value)}" for name, (value, _) in REFUSED.items()]
    printed = stack.run("plan", "-input=false", "-refresh=false", *given, fails=True)
    said = " ".join(printed.replace("│", " ").split())
    assert [name for name, (_, told) in REFUSED.items() if told not in said] == []


def test_each_workload_may_do_what_it_does_and_no_more(plan: dict[str, Any]):
    root = "arn:aws:s3:::acme-distill/prod/"
    may = {
        role: {
            (action, where.removeprefix(root))
            for each in statements(policy)
            for action in each["Action"]
            for where in each["Resource"]
            if where.startswith(root)
        }
        for role, policy in role_policies(plan).items()
    }
    assert may["distill-ray-teacher"] == {("s3:GetObject", "targets/*"), ("s3:PutObject", "targets/*")}
    student = {where for action, where in may["distill-ray-student"] if action == "s3:PutObject"}
    assert student == {"runs/*/checkpoints/*", "runs/*/student/*", "runs/*/lease.json", "runs/*/metrics.jsonl"}
    # gc lists and aborts what was never completed.
    assert ("s3:ListMultipartUploadParts", "*") in may["distill-ray-driver"]
    read = {where for each in statements(role_policies(plan)["distill-ray-teacher"]) for where in each["Resource"]}
    assert {"arn:aws:s3:::acme-data/tickets/*", "arn:aws:s3:::acme-models/*", "arn:aws:s3:::acme-data"} <= read


def test_capacity_is_spot_for_teachers_and_a_choice_for_students(stack: Stack, plan: dict[str, Any]):
    def capacity(plan: dict[str, Any]) -> dict[str, str]:
        return {each["node_group_name"]: each["capacity_type"] for each in resources(plan, "aws_eks_node_group")}

    assert capacity(plan) == {"head": "ON_DEMAND", "teacher": "SPOT", "student": "ON_DEMAND"}
    chosen = {"instance_types": ["p5.48xlarge"], "capacity": "SPOT", "max": 2, "disk_gib": 500}
    stack.run("plan", "-input=false", "-refresh=false", "-out=planned", f"-var=student={json.dumps(chosen)}")
    other = json.loads(stack.run("show", "-json", "planned"))
    assert capacity(other)["student"] == "SPOT"
    assert faults(other) == []


def test_kueue_s_flavors_and_quotas_are_those_of_the_node_groups(plan: dict[str, Any]):
    groups = {each["node_group_name"]: each for each in resources(plan, "aws_eks_node_group")}
    disks = {each["name"].rpartition("-")[2]: each for each in resources(plan, "aws_launch_template")}
    documents = [each for file in KUEUE.glob("*.yaml") for each in yaml.safe_load_all(file.read_text())]
    flavors = {each["metadata"]["name"]: each["spec"] for each in documents if each["kind"] == "ResourceFlavor"}
    (queue,) = (each["spec"] for each in documents if each["kind"] == "ClusterQueue")
    (covered,) = queue["resourceGroups"]
    assert [each["name"] for each in covered["flavors"]] == list(flavors)
    for flavor in covered["flavors"]:
        role = flavor["name"].removeprefix("distill-ray-")
        group, spec = groups[role], flavors[flavor["name"]]
        assert spec["nodeLabels"].items() <= group["labels"].items()
        taints = {(each["key"], each["value"]) for each in group["taint"]}
        assert {(each["key"], each["value"]) for each in spec.get("nodeTaints", [])} == taints
        quota = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
        assert list(quota) == covered["coveredResources"]
        nodes, (kind,) = group["scaling_config"][0]["max_size"], group["instance_types"]
        assert int(quota["nvidia.com/gpu"]) == nodes * GPUS.get(kind, 0) == nodes * 8 * (role in GPU_ROLES)
        disk = disks[role]["block_device_mappings"][0]["ebs"][0]["volume_size"]
        for name, most in (("cpu", CPUS[kind]), ("memory", MEMORY_GIB[kind]), ("ephemeral-storage", disk)):
            # Some of a node is the kubelet's, the least of it disk.
            assert 0.85 * nodes * most <= int(quota[name].removesuffix("Gi")) < nodes * most, (role, name)


def test_it_is_made_found_unchanged_and_removed(aws: str, tmp_path: Path):
    stack = Stack(tmp_path / "terraform", aws, applied=True)
    stack.run("init", "-input=false")
    stack.run("plan", "-input=false", "-out=planned")
    stack.run("apply", "-input=false", "planned")
    again = stack.attempt("plan", "-input=false", "-detailed-exitcode")
    assert again.returncode == 0, again.stdout + again.stderr
    made = json.loads(stack.run("show", "-json"))["values"]
    _assert_trust(made)
    outputs = {name: each["value"] for name, each in made["outputs"].items()}
    assert outputs["root"] == "s3://acme-distill/prod"
    assert outputs["roles"].keys() == {"driver", "teacher", "student", "autoscaler"}
    assert outputs["images"].keys() == {"driver", *GPU_ROLES}
    stack.run("destroy", "-input=false", "-auto-approve")
    assert json.loads(stack.run("show", "-json")).get("values") is None


def _assert_trust(made: dict[str, Any]) -> None:
    """Each pod's role can be taken by its own service account and by nobody else."""
    roles = {
        each["name"]: json.loads(each["assume_role_policy"])
        for each in resources({"planned_values": made}, "aws_iam_role")
    }
    accounts = {f"distill-ray-{role}": f"distill-ray:distill-ray-{role}" for role in ("driver", "teacher", "student")}
    for role, account in {**accounts, "distill-ray-autoscaler": "kube-system:cluster-autoscaler"}.items():
        (statement,) = roles[role]["Statement"]
        (conditions,) = statement["Condition"].values()
        assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
        assert {key.rpartition(":")[2]: value for key, value in conditions.items()} == {
            "sub": f"system:serviceaccount:{account}",
            "aud": "sts.amazonaws.com",
        }
    services = [role["Statement"][0]["Principal"].get("Service") for role in roles.values()]
    assert sorted(filter(None, services)) == ["ec2.amazonaws.com", "eks.amazonaws.com"]


def test_the_plan_is_of_the_project_s_own_files():
    """A file that Terraform does not read would be checked by nobody."""
    kinds = {path.suffix for path in SOURCE.rglob("*") if path.is_file() and not _is_left_behind(path)}
    assert kinds == {".tf"}


def _is_left_behind(path: Path) -> bool:
    return ".terraform" in path.parts or path.name.startswith(".terraform") or ".tfstate" in path.name
