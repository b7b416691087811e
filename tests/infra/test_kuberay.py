"""The Kubernetes manifests: names, types and enumerations against a schema, and what they must say together.

No Kubernetes runs here. The schema is of the fields in use; `kubectl` or `kustomize` builds the overlays where it is installed.
"""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from rcnn.config import PipelineConfig
from rcnn.recipes import RECIPES, debug_tiny
from rcnn.settings import build_config
from rcnn.signals import SECONDS_TO_END

FOLDER = Path(__file__).parents[2] / "infra" / "kuberay"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay" / "schema.yaml").read_text())
OVERLAYS = ["cpu", "gpu", "cpu-job", "gpu-job"]
CHARTS = ["prefect-worker", "mlflow"]
BUILD = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
needs_kustomize = pytest.mark.skipif(
    shutil.which(BUILD[0]) is None, reason="neither kubectl nor kustomize is installed"
)
Tree = dict[str, Any]


def faults_of(tree: Tree, schema: str) -> list[str]:
    """What is wrong with a tree, each fault with its place."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{schema}", "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(tree)]


def build(overlay: str) -> list[Tree]:
    """What `kubectl apply -k` sends."""
    done = subprocess.run([*BUILD, str(FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> dict[str, Tree]:
    """An overlay's objects by kind and name."""
    return {f"{tree['kind']}/{tree['metadata']['name']}": tree for tree in build(request.param)}


def cluster_of(overlay: dict[str, Tree]) -> Tree:
    job = overlay.get("RayJob/train")
    return job["spec"]["rayClusterSpec"] if job else overlay["RayCluster/ray"]["spec"]


def pods_of(overlay: dict[str, Tree]) -> Iterator[Tree]:
    cluster = cluster_of(overlay)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def settings_of(overlay: dict[str, Tree]) -> dict[str, str]:
    return overlay["ConfigMap/rcnn"]["data"]


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@needs_kustomize
def test_each_object_of_an_overlay_has_known_fields_of_the_right_types(overlay: dict[str, Tree]) -> None:
    for name, tree in overlay.items():
        assert faults_of(tree, f"kinds/{tree['kind']}") == [], name


@pytest.mark.parametrize("chart", CHARTS)
def test_the_values_have_known_fields_of_the_right_types(chart: str) -> None:
    assert faults_of(values(chart), f"values/{chart}") == []


def values(chart: str) -> Tree:
    return yaml.safe_load((FOLDER / "values" / f"{chart}.yaml").read_text())


def head(tree: Tree) -> Tree:
    return tree["spec"]["headGroupSpec"]


def worker(tree: Tree) -> Tree:
    return tree["spec"]["workerGroupSpecs"][0]


def pod(group: Tree) -> Tree:
    return group["template"]["spec"]


WRONG: dict[str, tuple[Callable[[Tree], Any], str]] = {
    "a wrong name": (lambda tree: tree["spec"].update(enableAutoscaling=True), "'enableAutoscaling' was unexpected"),
    "a wrong apiVersion": (lambda tree: tree.update(apiVersion="ray.io/v1alpha1"), "'ray.io/v1' was expected"),
    "a number for a text": (lambda tree: head(tree)["rayStartParams"].update({"num-cpus": 0}), "0 is not of type 'string'"),
    "a text for a number": (lambda tree: worker(tree).update(maxReplicas="4"), "'4' is not of type 'integer'"),
    "a text for a boolean": (lambda tree: tree["spec"].update(enableInTreeAutoscaling="yes"), "'yes' is not of type 'boolean'"),
    "a wrong version": (lambda tree: tree["spec"]["autoscalerOptions"].update(version="v3"), "'v3' is not one of ['v1', 'v2']"),
    "a wrong service": (lambda tree: head(tree).update(serviceType="clusterIP"), "'clusterIP' is not one of"),
    "a wrong effect": (
        lambda tree: pod(worker(tree))["tolerations"][0].update(effect="noSchedule"),
        "'noSchedule' is not one of",
    ),
    "a missing field": (lambda tree: worker(tree).pop("groupName"), "'groupName' is a required property"),
    "no preStop": (lambda tree: pod(worker(tree))["containers"][0].pop("lifecycle"), "'lifecycle' is a required property"),
    "a wrong quantity": (
        lambda tree: pod(head(tree))["containers"][0]["resources"]["limits"].update(memory="8 GB"), "'8 GB' does not match",
    ),
    "an image without a tag": (
        lambda tree: pod(head(tree))["containers"][0].update(image="registry.example.org/rcnn"), "does not match",
    ),
    "an image that moves": (
        lambda tree: pod(head(tree))["containers"][0].update(image="registry.example.org/rcnn:latest"), "does not match",
    ),
    "a secret in the open": (
        lambda tree: pod(head(tree))["containers"][0]["env"].append({"name": "RAY_AUTH_TOKEN", "value": "abc"}),
        "'valueFrom' is a required property",
    ),
    "root": (lambda tree: pod(head(tree))["securityContext"].update(runAsUser=0), "0 is less than the minimum of 1"),
}  # fmt: skip


@needs_kustomize
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_manifest_fails(name: str) -> None:
    tree = next(copy.deepcopy(tree) for tree in build("gpu") if tree["kind"] == "RayCluster")
    spoil, message = WRONG[name]
    spoil(tree)
    faults = faults_of(tree, "kinds/RayCluster")
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("chart", "path", "value", "message"),
    [
        ("mlflow", "service.type", "Public", "'Public' is not one of"),
        ("mlflow", "backendStore.postgres.password", "abc", "'password' was unexpected"),
        ("mlflow", "image.tag", "latest", "does not match"),
        ("mlflow", "serverAllowedHosts", "*", "is not of type 'array'"),
        ("prefect-worker", "worker.apiConfig", "server", "'server' is not one of"),
        ("prefect-worker", "worker.image.tag", "1.0", "'tag' was unexpected"),
        (
            "prefect-worker",
            "worker.selfHostedServerApiConfig.basicAuth.authString",
            "a:b",
            "'authString' was unexpected",
        ),
    ],
)
def test_wrong_values_fail(chart: str, path: str, value: Any, message: str) -> None:
    tree = values(chart)
    place, *parents = reversed(path.split("."))
    inner = tree
    for parent in reversed(parents):
        inner = inner[parent]
    inner[place] = value
    assert any(message in fault for fault in faults_of(tree, f"values/{chart}"))


@needs_kustomize
def test_workers_come_from_nothing_and_the_head_works_on_nothing(overlay: dict[str, Tree]) -> None:
    cluster = cluster_of(overlay)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"], "a head on a spot node"
    [group] = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= {
        toleration["key"] for toleration in group["template"]["spec"]["tolerations"]
    }


@needs_kustomize
def test_the_workers_of_a_training_fill_the_pods_that_may_come(overlay: dict[str, Tree]) -> None:
    [group] = cluster_of(overlay)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    how = config_of(overlay).execution
    assert str(how.cpus_per_worker) == limits["cpu"]
    assert how.num_workers == group["maxReplicas"]
    assert how.min_workers == 0, "the autoscaler adds nodes for what waits, and a range waits for nothing"
    assert how.use_gpu == ("nvidia.com/gpu" in limits)
    assert limits.get("nvidia.com/gpu", "1") == "1"


@needs_kustomize
def test_the_settings_of_the_pods_are_accepted(overlay: dict[str, Tree]) -> None:
    config = config_of(overlay)
    assert config.ray.address == "auto"
    assert config.storage.startswith("s3://")
    assert config.tracking.uri == "http://mlflow"


def config_of(overlay: dict[str, Tree]) -> PipelineConfig:
    return build_config(debug_tiny(), environ=settings_of(overlay))


@needs_kustomize
def test_a_pod_has_time_to_leave(overlay: dict[str, Tree]) -> None:
    [seconds] = re.findall(r"^SECONDS = ([\d.]+)$", overlay["ConfigMap/rcnn-leave"]["data"]["leave.py"], re.MULTILINE)
    for pod in pods_of(overlay):
        [container] = pod["containers"]
        role = container["name"].removeprefix("ray-")
        assert container["lifecycle"]["preStop"]["exec"]["command"] == ["python", "/etc/rcnn/leave.py", role]
        assert float(seconds) + 10 < pod["terminationGracePeriodSeconds"]
        [volume] = pod["volumes"]
        [mount] = container["volumeMounts"]
        assert volume == {"name": mount["name"], "configMap": {"name": "rcnn-leave"}}
        assert mount["mountPath"] == "/etc/rcnn"
    [head, _] = pods_of(overlay)
    env = {variable["name"]: variable.get("value") for variable in head["containers"][0]["env"]}
    assert env["RAY_JOB_STOP_WAIT_TIME_S"] == str(SECONDS_TO_END)


@needs_kustomize
def test_versions_and_images_are_those_of_this_project(overlay: dict[str, Tree]) -> None:
    assert cluster_of(overlay)["rayVersion"] == version("ray")
    for pod in pods_of(overlay):
        kind = "cuda" if config_of(overlay).execution.use_gpu else "cpu"
        assert pod["containers"][0]["image"] == f"registry.example.org/rcnn:{version('rcnn')}-{kind}"
    worker = values("prefect-worker")["worker"]
    assert worker["image"] == {"repository": "registry.example.org/rcnn", "prefectTag": f"{version('rcnn')}-cpu"}


@needs_kustomize
@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_a_job_brings_the_same_cluster_ends_and_is_not_repeated(hardware: str) -> None:
    cluster = {tree["kind"]: tree for tree in build(hardware)}["RayCluster"]
    objects = {tree["kind"]: tree for tree in build(f"{hardware}-job")}
    assert "RayCluster" not in objects
    job = objects["RayJob"]["spec"]
    assert job["rayClusterSpec"] == cluster["spec"]
    assert job["submissionMode"] == "SidecarMode"
    assert job["backoffLimit"] == 0
    assert job["activeDeadlineSeconds"] > 0
    assert job["shutdownAfterJobFinishes"] is True
    assert job["entrypoint"].startswith("rcnn register --recipe ")
    assert job["entrypoint"].split()[-1] in RECIPES


@needs_kustomize
def test_every_secret_is_a_key_of_the_example_file() -> None:
    """And of the one Secret that is made from it, so that no manifest contains a secret."""
    lines = (FOLDER / "secrets.env.example").read_text().splitlines()
    keys = {line.removesuffix("=") for line in lines if not line.startswith("#")}
    assert all(line.startswith("#") or line.endswith("=") for line in lines), "a secret is filled in"
    wanted = {"auth_token", "auth-string"}  # the names that KubeRay and the chart prefect-worker give their keys
    for tree in (*(tree for overlay in OVERLAYS for tree in build(overlay)), *(values(chart) for chart in CHARTS)):
        for name, key in secrets_in(tree):
            assert name == "rcnn"
            wanted |= {key} - {""}
    assert wanted == keys


def secrets_in(tree: Any) -> Iterator[tuple[str, str]]:
    """The names and keys of the secrets that a tree names."""
    for key, inner in tree.items() if isinstance(tree, dict) else ():
        if key == "secretKeyRef":
            yield inner["name"], inner["key"]
        elif key in ("secretName", "existingSecret") and isinstance(inner, str):
            yield inner, ""
        elif key.startswith("existing"):
            yield from ((inner["name"], text) for name, text in inner.items() if "key" in name.lower())
        else:
            yield from secrets_in(inner)
    for inner in tree if isinstance(tree, list) else ():
        yield from secrets_in(inner)
