"""What is wrong with a plan of infra/terraform, as `terraform show -json` tells it: one sentence a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

GPU_ROLES = {"teacher", "student"}
# AWS knows no resource for these, so "*" is all that a policy can say.
_NO_RESOURCE = ("autoscaling:Describe", "ec2:Describe", "ec2:GetInstanceTypesFromInstanceRequirements")
_BLOCKED = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
_WRITES = ("Put", "Delete", "Abort", "Create", "Restore", "Bypass")


def resources(plan: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The planned values of all managed resources of one type, whatever module they are in."""
    found = []
    modules = [plan["planned_values"]["root_module"]]
    while modules:
        module = modules.pop()
        modules += module.get("child_modules", [])
        found += [r["values"] | {"address": r["address"]} for r in module.get("resources", []) if r["type"] == kind]
    return found


def faults(plan: dict[str, Any]) -> list[str]:
    """All that a reviewer would refuse."""
    return [*_bucket(plan), *_policies(plan), *_groups(plan), *_images(plan), *_api(plan)]


def _bucket(plan: dict[str, Any]) -> Iterator[str]:
    def only(kind: str) -> dict[str, Any]:
        found = resources(plan, kind)
        return found[0] if len(found) == 1 else {}

    if not all(only("aws_s3_bucket_public_access_block").get(name) for name in _BLOCKED):
        yield "the bucket may be made public"
    if only("aws_s3_bucket_versioning").get("versioning_configuration", [{}])[0].get("status") != "Enabled":
        yield "the bucket is not versioned"
    rules = only("aws_s3_bucket_server_side_encryption_configuration").get("rule", [{}])
    if rules[0].get("apply_server_side_encryption_by_default", [{}])[0].get("sse_algorithm") != "AES256":
        yield "the bucket is not encrypted"
    policy = json.loads(only("aws_s3_bucket_policy").get("policy") or '{"Statement": []}')
    if not any(_is_tls_only(each) for each in statements(policy)):
        yield "the bucket answers without TLS"
    yield from _lifecycle(only("aws_s3_bucket_lifecycle_configuration").get("rule", []))


def _is_tls_only(statement: dict[str, Any]) -> bool:
    denied = statement["Effect"] == "Deny" and statement["Action"] == ["s3:*"] and len(statement["Resource"]) == 2
    return denied and statement.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}


def _lifecycle(rules: list[dict[str, Any]]) -> Iterator[str]:
    enabled = {rule["id"]: rule for rule in rules if rule["status"] == "Enabled"}
    if missing := {"checkpoints", "dead-letters", "noncurrent", "uploads"} - set(enabled):
        yield f"no lifecycle rule for {sorted(missing)}"
    for rule in enabled.values():
        if not rule.get("expiration"):
            continue
        (found,) = rule["filter"]
        (both,) = found.get("and") or [{"prefix": found.get("prefix") or "", "object_size_greater_than": 0}]
        # Target objects and models never expire, nor what a run says of itself.
        large_of_runs = both["prefix"].endswith("/runs/") and both["object_size_greater_than"] >= 1 << 28
        if not large_of_runs and not both["prefix"].endswith("/dead-letters/"):
            yield f"lifecycle rule {rule['id']} removes more than shards and dead letters: {both}"


def statements(policy: dict[str, Any]) -> list[dict[str, Any]]:
    """A policy's statements, with lists where a single value stands."""
    found = []
    for each in policy["Statement"]:
        lists = {
            key: [each[key]] if isinstance(each.get(key), str) else each.get(key, []) for key in ("Action", "Resource")
        }
        found.append(each | lists)
    return found


def role_policies(plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a role → what it may do."""
    return {each["name"]: json.loads(each["policy"]) for each in resources(plan, "aws_iam_role_policy")}


def _policies(plan: dict[str, Any]) -> Iterator[str]:
    for name, policy in role_policies(plan).items():
        for each in statements(policy):
            if each["Effect"] != "Allow" or "NotAction" in each or "NotResource" in each:
                yield f"{name}: not a plain permission: {each}"
            for action in each["Action"]:
                if "*" in action:
                    yield f"{name}: action {action}"
                if "*" in each["Resource"] and not action.startswith(_NO_RESOURCE):
                    yield f"{name}: {action} on any resource"
                if action.startswith("iam:"):
                    yield f"{name}: {action}"
                yield from _outside(name, action, each["Resource"])
    yield from _teacher_writes(role_policies(plan))


def _outside(name: str, action: str, where: list[str]) -> Iterator[str]:
    """Nobody may change what is not under the root, nor remove a version."""
    if not action.startswith("s3:"):
        return
    if "Version" in action:
        yield f"{name}: {action}"
    if action.removeprefix("s3:").startswith(_WRITES):
        for each in where:
            if not each.startswith("arn:aws:s3:::acme-distill/prod/"):
                yield f"{name}: {action} on {each}"


def _teacher_writes(policies: dict[str, dict[str, Any]]) -> Iterator[str]:
    for each in statements(policies.get("distill-ray-teacher", {"Statement": []})):
        writes = [action for action in each["Action"] if action.removeprefix("s3:").startswith(_WRITES)]
        if writes and (writes != ["s3:PutObject"] or each["Resource"] != ["arn:aws:s3:::acme-distill/prod/targets/*"]):
            yield f"the teacher may {writes} {each['Resource']}"


def _groups(plan: dict[str, Any]) -> Iterator[str]:
    groups = {each["node_group_name"]: each for each in resources(plan, "aws_eks_node_group")}
    if set(groups) != GPU_ROLES | {"head"}:
        yield f"node groups {sorted(groups)}"
    for role, group in groups.items():
        taints = {(taint["key"], taint["value"]) for taint in group["taint"] if taint["effect"] == "NO_SCHEDULE"}
        if group["labels"].get("distill-ray/role") != role:
            yield f"{role}: labels {group['labels']}"
        if role in GPU_ROLES and group["scaling_config"][0]["min_size"] != 0:
            yield f"{role}: GPU nodes that stay"
        if role in GPU_ROLES and not {("nvidia.com/gpu", "present"), ("distill-ray/role", role)} <= taints:
            yield f"{role}: taints {taints}"
        if ("distill-ray/spot" in dict(taints)) != (group["capacity_type"] == "SPOT"):
            yield f"{role}: {group['capacity_type']} with taints {taints}"
    if "head" in groups and (groups["head"]["capacity_type"] != "ON_DEMAND" or groups["head"]["taint"]):
        yield "the head's group is on spot, or tainted"
    for template in resources(plan, "aws_launch_template"):
        metadata, disk = template["metadata_options"][0], template["block_device_mappings"][0]["ebs"][0]
        if metadata["http_tokens"] != "required" or metadata["http_put_response_hop_limit"] != 1:
            yield f"{template['name']}: pods reach the node's role"
        if disk["encrypted"] != "true":
            yield f"{template['name']}: disk not encrypted"


def _images(plan: dict[str, Any]) -> Iterator[str]:
    repositories = resources(plan, "aws_ecr_repository")
    if {each["name"] for each in repositories} != {f"distill-ray/{role}" for role in ("driver", *GPU_ROLES)}:
        yield "repositories other than the three images'"
    for each in repositories:
        if each["image_tag_mutability"] != "IMMUTABLE" or not each["image_scanning_configuration"][0]["scan_on_push"]:
            yield f"{each['name']}: tags move, or images are not scanned"


def _api(plan: dict[str, Any]) -> Iterator[str]:
    for each in resources(plan, "aws_eks_cluster"):
        if any(cidr.endswith("/0") for cidr in each["vpc_config"][0]["public_access_cidrs"]):
            yield "the Kubernetes API is open to the Internet"
