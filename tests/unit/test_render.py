"""What rendered manifests say: where pods run, how many, with which image, and no secret."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_ray import render
from distill_ray.arguments import parser
from distill_ray.config.cluster import ROLE_LABEL
from distill_ray.errors import UserError
from distill_ray.submit.naming import base_id
from tests.unit.kube_schema import cluster_of
from tests.unit.render_fakes import images, of_kind, recipe_of, rendered

REPO = Path(__file__).parents[2]
OBJECT_OF = {"rayjob": "RayJob", "raycronjob": "RayCronJob", "raycluster": "RayCluster"}


def cluster(kind: str = "raycluster", **sections: dict[str, Any]) -> dict[str, Any]:
    version = None if kind == "raycronjob" else "2026-W48"
    return cluster_of(of_kind(rendered(kind, recipe_of(version, **sections)), OBJECT_OF[kind]))


def groups(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in cluster(**sections)["workerGroupSpecs"]}


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def gpus(group: dict[str, Any]) -> str | None:
    return pod(group)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")


def cluster_section(**changes: Any) -> dict[str, Any]:
    return {"cluster": {"pin_by_label": True} | images() | changes}


def avoids_spot(group: dict[str, Any]) -> bool:
    affinity = pod(group).get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return any(
        {"key": "karpenter.sh/capacity-type", "operator": "NotIn", "values": ["spot"]} in term["matchExpressions"]
        for term in terms
    )


def tolerated(group: dict[str, Any]) -> set[str]:
    return {toleration["key"] for toleration in pod(group).get("tolerations", [])}


def test_a_teacher_of_one_node_is_one_pod_with_its_gpus():
    teacher = groups()["teacher"]
    assert (gpus(teacher), teacher["numOfHosts"], teacher["minReplicas"], teacher["maxReplicas"]) == ("2", 1, 0, 6)
    assert teacher["rayStartParams"]["num-gpus"] == "2"


def test_a_teacher_over_several_nodes_sets_the_number_of_hosts():
    over = {"teacher": {"model": "s3://b/t", "tensor_parallel": 8, "pipeline_parallel": 3, "replicas": {"max": 5}}}
    teacher = groups(**over)["teacher"]
    assert (gpus(teacher), teacher["numOfHosts"], teacher["maxReplicas"]) == ("8", 3, 5)


def test_a_teacher_that_leaves_gpus_of_its_nodes_unused_is_refused():
    over = {"teacher": {"model": "s3://b/t", "tensor_parallel": 4, "pipeline_parallel": 3}}
    with pytest.raises(UserError, match=r"4 × pipeline_parallel=3 = 12 GPUs does not fill nodes of .*=8"):
        groups(**over)


@pytest.mark.parametrize(("workers", "per_node", "each", "pods"), [(16, 8, "8", 2), (3, 8, "3", 1), (10, 4, "4", 3)])
def test_training_workers_fill_pods(workers: int, per_node: int, each: str, pods: int):
    nodes = cluster_section(student={"image": "s:1", "gpus_per_node": per_node})
    student = groups(train={"workers": {"min": workers, "max": workers}}, **nodes)["student"]
    assert (gpus(student), student["numOfHosts"], student["minReplicas"], student["maxReplicas"]) == (each, 1, 0, pods)


def test_training_workers_need_a_cpu_each():
    with pytest.raises(UserError, match=r"cluster.student.cpus=4: 8 training workers"):
        groups(**cluster_section(student={"image": "s:1", "cpus": 4}))


def test_without_gpus_none_are_asked_for():
    found = groups(
        teacher={"model": "s3://b/t", "use_gpu": False}, train={"use_gpu": False, "workers": {"min": 2, "max": 2}}
    )
    assert {name: gpus(group) for name, group in found.items()} == {"teacher": None, "student": None}
    assert "nvidia.com/gpu" not in tolerated(found["student"])


@pytest.mark.parametrize("kind", OBJECT_OF)
def test_roles_are_labelled_where_ray_s_autoscaler_reads_it(kind: str):
    spec = cluster(kind)
    labels = {group["groupName"]: group["labels"] for group in spec["workerGroupSpecs"]}
    assert labels == {"teacher": {ROLE_LABEL: "teacher"}, "student": {ROLE_LABEL: "student"}}
    assert spec["headGroupSpec"]["labels"] == {ROLE_LABEL: "driver"}


def test_ray_s_own_autoscaler_reads_the_groups():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    over = {"teacher": {"model": "s3://b/t", "tensor_parallel": 16, "replicas": {"max": 5}}}
    section = cluster_section(teacher={"image": "t:1", "idle_timeout_s": 45})
    made = of_kind(rendered("raycluster", recipe_of(**over, **section)), "RayCluster")
    types = _derive_autoscaling_config_from_ray_cr(made)["available_node_types"]
    assert types["teacher"]["labels"] == {ROLE_LABEL: "teacher"}
    assert {k: types["teacher"]["resources"][k] for k in ("CPU", "GPU")} == {"CPU": 16, "GPU": 8}
    assert (types["teacher"]["min_workers"], types["teacher"]["max_workers"]) == (0, 10)
    assert types["teacher"]["idle_timeout_s"] == 45.0
    assert types["headgroup"]["resources"]["GPU"] == 0


def test_each_role_has_its_own_image():
    spec = cluster()
    found = [pod(g)["containers"][0]["image"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert found == ["head:1", "teacher:1", "student:1"]


@pytest.mark.parametrize("spot", [True, False])
def test_the_head_is_never_on_spot(spot: bool):
    section = cluster_section(
        teacher={"image": "t:1", "spot": spot}, student={"image": "s:1", "spot": spot}, spot_taint="acme/spot"
    )
    head = cluster(**section)["headGroupSpec"]
    assert avoids_spot(head)
    assert tolerated(head) == set()
    assert gpus(head) is None
    assert head["template"]["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


def test_spot_off_takes_the_toleration_away():
    on = groups(**cluster_section(teacher={"image": "t:1", "spot": True}))["teacher"]
    off = groups(**cluster_section(teacher={"image": "t:1", "spot": False}))["teacher"]
    assert tolerated(on) == {"nvidia.com/gpu", ROLE_LABEL, "distill-ray/spot"}
    assert not avoids_spot(on)
    assert tolerated(off) == {"nvidia.com/gpu", ROLE_LABEL}
    assert avoids_spot(off)
    assert "annotations" not in on["template"]["metadata"]


@pytest.mark.parametrize("drain", [20, 110])
def test_pods_outlive_their_drain(drain: int):
    spec = cluster(**cluster_section(drain_s=drain))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        env = {e["name"]: e["value"] for e in pod(group)["containers"][0]["env"]}
        assert float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == drain
        assert pod(group)["terminationGracePeriodSeconds"] > drain
        assert pod(group)["restartPolicy"] == "Never"
        assert env["RAY_TMPDIR"] == "/tmp"  # TMPDIR alone would move Ray's session from where KubeRay shares it


def test_placement_of_pods_follows_the_recipe():
    section = cluster_section(
        teacher={"image": "t:1", "gpu_product": "NVIDIA-H100-80GB-HBM3", "node_selector": {"zone": "a"}},
        priority_class="weekly",
    )
    spec = cluster(**section)
    teacher = pod(spec["workerGroupSpecs"][0])
    assert teacher["nodeSelector"] == {"zone": "a", "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {pod(g)["priorityClassName"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])} == {"weekly"}


def test_stating_one_thing_of_a_role_keeps_the_role_s_defaults():
    found = groups()
    assert "distill-ray/spot" in tolerated(found["teacher"])
    assert "distill-ray/spot" not in tolerated(found["student"])
    assert found["student"]["rayStartParams"]["num-cpus"] == "64"


def test_a_job_of_its_own_cluster():
    job = of_kind(rendered("rayjob", recipe_of(**cluster_section(retries=5, deadline_hours=1.5))), "RayJob")["spec"]
    assert (job["submissionMode"], job["jobId"]) == ("HTTPMode", base_id(recipe_of()))
    assert (job["backoffLimit"], job["activeDeadlineSeconds"], job["suspend"]) == (5, 5400, False)
    assert (job["shutdownAfterJobFinishes"], job["ttlSecondsAfterFinished"]) == (True, 600)
    spec = job["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"


def test_the_recipe_travels_and_the_head_finds_it():
    documents = rendered("rayjob", recipe_of())
    config, job = of_kind(documents, "ConfigMap"), of_kind(documents, "RayJob")
    assert list(config["data"].values()) == ['name = "demo"\n# the text itself is not read again here\n']
    head = pod(job["spec"]["rayClusterSpec"]["headGroupSpec"])
    volume = next(v for v in head["volumes"] if v["name"] == "recipe")
    mount = next(m for m in head["containers"][0]["volumeMounts"] if m["name"] == "recipe")
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (file,) = config["data"]
    words = shlex.split(job["spec"]["entrypoint"])
    arguments = parser().parse_args(words[1:])
    assert (words[0], arguments.command, arguments.recipe) == ("distill-ray", "run", f"{mount['mountPath']}/{file}")
    assert (arguments.version, arguments.address, arguments.root) == ("2026-W48", "auto", None)


def test_what_changed_the_recipe_for_render_changes_it_for_the_run():
    changes = ('corpus.text_column="it\'s $HOME"', "train.epochs=3")
    options = ("--root", "s3://other/it's", "--set", changes[0], "--set", changes[1])
    job = of_kind(rendered("rayjob", recipe_of(), *options), "RayJob")
    found = parser().parse_args(shlex.split(job["spec"]["entrypoint"])[1:])
    assert (found.root, tuple(found.changes), found.version) == ("s3://other/it's", changes, "2026-W48")


def test_the_recipe_s_text_survives_yaml(tmp_path: Path):
    recipe = REPO / "jobs" / "recipes" / "llama3.3-70b-to-8b.h100x16.toml"
    text = recipe.read_text()
    made = render.to_yaml(render.manifests(recipe_of(), text, "rayjob"), "caption")
    assert of_kind(list(yaml.safe_load_all(made)), "ConfigMap")["data"]["recipe.toml"] == text
    assert made.startswith("# caption\n---\n")
    assert "&id" not in made


def test_a_queue_suspends_the_job_and_lets_kueue_scale_it():
    job = of_kind(rendered("rayjob", recipe_of(**cluster_section(queue="weekly"))), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "weekly"
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert job["spec"]["suspend"]
    ray = of_kind(rendered("raycluster", recipe_of(**cluster_section(queue="weekly"))), "RayCluster")
    assert ray["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "weekly"
    assert ray["spec"]["suspend"]
    with pytest.raises(UserError, match=r"gives its jobs no labels.*--kind cronjob"):
        rendered("raycronjob", recipe_of(None, **cluster_section(queue="weekly")))


def test_accounts_are_apart_and_stand_for_iam_roles():
    role = "arn:aws:iam::123456789012:role/t"
    section = cluster_section(teacher={"image": "t:1", "aws_role": role})
    documents = rendered("rayjob", recipe_of(**section))
    accounts = {d["metadata"]["name"]: d["metadata"] for d in documents if d["kind"] == "ServiceAccount"}
    assert set(accounts) == {"distill-ray-driver", "distill-ray-teacher", "distill-ray-student"}
    assert accounts["distill-ray-teacher"]["annotations"] == {"eks.amazonaws.com/role-arn": role}
    spec = cluster(**section)
    pods = [pod(g) for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert [p["serviceAccountName"] for p in pods] == [
        "distill-ray-driver",
        "distill-ray-teacher",
        "distill-ray-student",
    ]
    assert [p["automountServiceAccountToken"] for p in pods] == [True, False, False]


def test_an_account_for_two_roles_is_refused():
    one, two = ("arn:aws:iam::123456789012:role/" + n for n in ("one", "two"))
    section = cluster_section(
        teacher={"image": "t:1", "aws_role": one, "service_account": "shared"},
        student={"image": "s:1", "aws_role": two, "service_account": "shared"},
    )
    with pytest.raises(UserError, match="service account shared is given two IAM roles"):
        rendered("rayjob", recipe_of(**section))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"pin_by_label": True, **images("teacher", "student")},
            r"cluster.head.image is not stated.*distill-ray-driver:",
        ),
        ({"pin_by_label": True, **images("head", "student")}, "cluster.teacher.image is not stated"),
        ({"pin_by_label": True, **images("head", "teacher")}, "cluster.student.image is not stated"),
        (images(), r"set \[cluster\] pin_by_label = true"),
    ],
)
def test_what_is_missing_is_named(section: dict[str, Any], message: str):
    recipe = recipe_of()
    recipe = recipe.model_copy(update={"cluster": type(recipe.cluster).model_validate(section)})
    for kind in OBJECT_OF:
        with pytest.raises(UserError, match=message):
            rendered(kind, recipe.model_copy() if kind != "raycronjob" else _weekly(recipe))


def _weekly(recipe: Any) -> Any:
    return recipe_of(None).model_copy(update={"cluster": recipe.cluster})


def test_a_root_on_one_machine_is_refused():
    recipe = recipe_of(storage={"root": "/data/artefacts"})
    with pytest.raises(UserError, match=r"storage.root=/data/artefacts is a folder of one machine.*s3://"):
        rendered("rayjob", recipe)


@pytest.mark.parametrize("kind", ["rayjob", "cronjob", "raycronjob", "raycluster"])
def test_no_secret_of_the_environment_reaches_a_manifest(kind: str):
    marker = "m4rk3rS3cr3t"
    names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "ENDPOINT_URL", "PROFILE", "REGION")
    planted = {f"AWS_{name}": f"http://{marker}" for name in names} | {"RAY_AUTH_TOKEN": marker, "HF_TOKEN": marker}
    recipe = REPO / "jobs" / "recipes" / "smollm2-135m.kind.toml"
    out = subprocess.run(
        [sys.executable, "-m", "distill_ray", "render", str(recipe), "--kind", kind],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **planted},
    )
    assert marker not in out.stdout + out.stderr
    assert "s3.distill-ray.svc" in out.stdout  # of the recipe, as it should be


def test_secrets_are_named():
    spec = cluster(**cluster_section(secrets=["one", "two"]))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert pod(group)["containers"][0]["envFrom"] == [
            {"secretRef": {"name": "one"}},
            {"secretRef": {"name": "two"}},
        ]


def test_credentials_in_an_endpoint_are_refused_and_not_repeated():
    section = cluster_section(endpoint_url="http://user:hunter2@s3.example.com")
    with pytest.raises(UserError, match="holds a user name or password") as error:
        rendered("rayjob", recipe_of(**section))
    assert "hunter2" not in str(error.value)


def test_render_imports_nothing_heavy():
    recipe = REPO / "jobs" / "recipes" / "smollm2-135m.kind.toml"
    code = (
        "import sys\nfrom distill_ray.cli import main\n"
        f"main(['render', {str(recipe)!r}, '--kind', 'rayjob'])\n"
        "print('HEAVY', [m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'boto3', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert out.rstrip().endswith("HEAVY []")


def test_output_goes_to_a_file(tmp_path: Path):
    from distill_ray.cli import main

    recipe = str(REPO / "jobs" / "recipes" / "smollm2-135m.kind.toml")
    assert main(["render", recipe, "--kind", "raycluster", "--output", str(tmp_path / "c.yaml")]) == 0
    assert of_kind(list(yaml.safe_load_all((tmp_path / "c.yaml").read_text())), "RayCluster")
    assert main(["render", recipe, "--kind", "raycluster", "--output", str(tmp_path / "no" / "c.yaml")]) == 2


def test_kinds_are_those_of_the_command():
    for kind in render.KINDS:
        parser().parse_args(["render", "r.toml", "--kind", kind])
