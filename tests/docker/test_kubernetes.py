"""docker/k8s against the schemas of Kubernetes and Kubeflow, the restricted pod standard and our command line."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from pydantic import Field

from data_pipelines.config import StrictModel
from server.routes.health import router
from tests.docker.deployment import DOCKER, documents, run_line, torchrun, vlp

KUBERNETES = DOCKER / "k8s"
VERSION = "1.33"
"""The oldest release that the schemas are tried with; fields are the same since 1.30."""
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def base() -> list[Manifest]:
    """What `kubectl apply -k docker/k8s/base` would send."""
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", KUBERNETES / "base"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def variant(name: str) -> list[Manifest]:
    return documents((KUBERNETES / "variants" / f"{name}.yaml").read_text())


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (item for item in manifests if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, pod template) of every Job, Deployment and group of a RayJob."""
    for item in manifests:
        if item["kind"] in ("Job", "Deployment"):
            yield item["metadata"]["name"], item["spec"]["template"]
        if item["kind"] == "RayJob":
            cluster = item["spec"]["rayClusterSpec"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                yield group.get("groupName", "head"), group["template"]


def check(manifest: Manifest) -> None:
    """Against the schema of its kind; strict: fields that it does not name are refused."""
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def test_the_schemas_refuse_what_is_wrong(base: list[Manifest]) -> None:
    job = yaml.safe_load(yaml.safe_dump(one(base, "Job", "train")))
    job["spec"]["paralellism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="paralellism"):
        check(job)


def test_every_manifest_fits_its_schema(base: list[Manifest]) -> None:
    kinds = {item["kind"] for item in base}
    assert kinds == {"Namespace", "PersistentVolumeClaim", "Job", "Service", "Deployment", "HorizontalPodAutoscaler",
                     "PodDisruptionBudget", "NetworkPolicy"}  # fmt: skip
    for item in base:
        check(item)
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "vlp"


def restricted(spec: Manifest) -> list[str]:
    """What of the pod security standard `restricted`, and of our own demands, a pod spec does not keep."""
    whole = spec.get("securityContext", {})
    faults = [
        name for name, kept in {
            "runAsNonRoot": whole.get("runAsNonRoot") is True,
            "runAsUser": whole.get("runAsUser") == 65532,
            "seccompProfile": whole.get("seccompProfile", {}).get("type") == "RuntimeDefault",
            "hostNetwork": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
            "token": spec.get("automountServiceAccountToken") is False,
        }.items() if not kept
    ]  # fmt: skip
    for volume in spec.get("volumes", []):
        kinds = volume.keys() - {"name"}
        faults += [f"volume {kind}" for kind in kinds - {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}]
    for container in spec["containers"]:
        own = container.get("securityContext", {})
        faults += [
            name for name, kept in {
                "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
                "capabilities": own.get("capabilities") == {"drop": ["ALL"]},
                "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
                "memory": "memory" in container["resources"]["limits"],
                "/tmp": "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]],
            }.items() if not kept
        ]  # fmt: skip
    return faults


def test_pods_are_restricted(base: list[Manifest]) -> None:
    found = dict(pods([*base, *variant("rayjob")]))
    assert found.keys() == {"shard", "train", "serve", "head", "shards"}
    assert {name: restricted(template["spec"]) for name, template in found.items()} == {name: [] for name in found}
    labels = one(base, "Namespace", "vlp")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_every_mount_has_its_volume_and_every_claim_is_there(base: list[Manifest]) -> None:
    claims = {item["metadata"]["name"] for item in base if item["kind"] == "PersistentVolumeClaim"}
    for name, template in pods([*base, *variant("rayjob")]):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounted = {mount["name"] for item in template["spec"]["containers"] for mount in item["volumeMounts"]}
        assert mounted == volumes.keys(), name
        named = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in volumes.values()]
        assert {claim for claim in named if claim} <= claims


def line(manifests: list[Manifest], kind: str, name: str, **given: str) -> dict[str, Any]:
    """Values of the command line of the only container, `$(NAME)` filled in."""
    (container,) = one(manifests, kind, name)["spec"]["template"]["spec"]["containers"]
    arguments = list(container["args"])
    for key, value in given.items():
        assert key in [entry["name"] for entry in container["env"]]
        arguments = [argument.replace(f"$({key})", value) for argument in arguments]
    assert not any("$(" in argument for argument in arguments)
    return run_line(container.get("command", ()), arguments)


def test_command_lines_are_ours_and_hand_on(base: list[Manifest]) -> None:
    """Every index of the shard job writes a folder, training reads exactly these, and what it makes is served."""
    completions = one(base, "Job", "shard")["spec"]["completions"]
    written = [line(base, "Job", "shard", PART=str(part))["out"] for part in range(completions)]
    train = line(base, "Job", "train")
    assert f"data.train=/data/shards/part-{{0..{completions - 1}}}" in train["overrides"]
    assert written == [f"/data/shards/part-{part}" for part in range(completions)]
    assert train["resume"]
    serve = line(base, "Deployment", "serve")
    assert serve["bundles"] == (str(train["run_dir"]),)
    assert serve["qdrant"] == "http://qdrant:6333"


def test_the_part_is_the_index_of_the_pod(base: list[Manifest]) -> None:
    job = one(base, "Job", "shard")["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (part,) = container["env"]
    path = part["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["completionMode"] == "Indexed"


def test_ranks_meet_where_the_service_leads(base: list[Manifest]) -> None:
    """The endpoint is pod 0 by name; the service makes that name, also while no pod is ready."""
    job, service = one(base, "Job", "train"), one(base, "Service", "train")
    template = job["spec"]["template"]
    (container,) = template["spec"]["containers"]
    options, _ = torchrun(container["args"])
    host, _, port = options.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{template['spec']['subdomain']}"
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert int(port) in [entry["port"] for entry in service["spec"]["ports"]]
    fewest, _, most = options.nnodes.partition(":")
    assert (int(fewest), int(most)) == (1, job["spec"]["completions"])
    assert job["spec"]["podFailurePolicy"]["rules"][0]["action"] == "Ignore"


def test_probes_scaling_and_disruptions(base: list[Manifest]) -> None:
    spec = one(base, "Deployment", "serve")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert set(probes.values()) <= {getattr(route, "path", "") for route in router.routes}
    waits = float(container["args"][container["args"].index("--drain-wait") + 1])
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > waits + 18 + 2
    scaler = one(base, "HorizontalPodAutoscaler", "serve")["spec"]
    (metric,) = scaler["metrics"]
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter-values.yaml").read_text())
    assert metric["pods"]["metric"]["name"] == adapter["rules"]["custom"][0]["name"]["as"] == "vlp_items_waiting"
    budget = one(base, "PodDisruptionBudget", "serve")["spec"]
    assert 0 < budget["minAvailable"] < spec["replicas"] <= scaler["minReplicas"] <= scaler["maxReplicas"]
    assert budget["selector"] == spec["selector"]


def test_pods_may_speak_as_they_must(base: list[Manifest]) -> None:
    """All is denied first; each policy picks pods that exist, Qdrant's (its chart's labels) included."""
    policies = {item["metadata"]["name"]: item["spec"] for item in base if item["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [template["metadata"]["labels"] for _, template in pods(base)]
    names = {entry["app.kubernetes.io/name"] for entry in labels} | {"qdrant"}
    picked = {policies[name]["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for name in policies
              if policies[name]["podSelector"]}  # fmt: skip
    assert picked == {"train", "serve", "qdrant"} <= names
    (asked,) = policies["serve"]["egress"]
    assert asked["to"][0]["podSelector"]["matchLabels"] == policies["qdrant"]["podSelector"]["matchLabels"]


# -- variants ----------------------------------------------------------------------------------------------------------


def test_the_train_job_fits_kubeflows_models() -> None:
    """Read and written again, nothing is lost: a field that Kubeflow does not know would be."""
    (job,) = variant("trainjob")
    model = TrainerV1alpha1TrainJob.from_dict(job)
    assert model is not None
    assert model.to_dict() == job
    trainer = job["spec"]["trainer"]
    assert run_line(trainer["command"], trainer["args"])["resume"]
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    spec = patch["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    whole = {**container, "image": trainer["image"], "resources": trainer["resourcesPerNode"]}
    pod = {**spec, "containers": [whole], "automountServiceAccountToken": False}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, "spec": pod})
    assert restricted(pod) == []


class Group(StrictModel):
    """Of a RayCluster: what is used of it here."""

    groupName: str = "head"
    replicas: int = Field(default=1, ge=0)
    minReplicas: int = Field(default=0, ge=0)
    maxReplicas: int = Field(default=1, ge=1)
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class Cluster(StrictModel):
    """rayClusterSpec."""

    rayVersion: str
    headGroupSpec: Group
    workerGroupSpecs: tuple[Group, ...]


class RayJob(StrictModel):
    """spec of a ray.io/v1 RayJob; KubeRay publishes no package with its schema."""

    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    rayClusterSpec: Cluster


def test_the_ray_job_names_what_its_image_holds() -> None:
    job, policy = variant("rayjob")
    spec = RayJob.model_validate(job["spec"])
    check(policy)
    for name, template in pods([job]):
        check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]})
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    locked = (DOCKER / "requirements-ray-cuda.txt").read_text()
    assert f"\nray=={spec.rayClusterSpec.rayVersion} " in locked
    shard, train = (shlex.split(part) for part in spec.entrypoint.split("&&"))
    assert shard[0] == train[0] == "vlp"
    written, read = vlp(shard[1:]), vlp(train[1:])
    assert written["on"] == "ray:auto"
    assert f"data.train={written['out']}" in read["overrides"]


def test_qdrants_values_are_restricted_and_named_as_the_server_asks() -> None:
    values = yaml.safe_load((KUBERNETES / "qdrant-values.yaml").read_text())
    assert values["fullnameOverride"] == "qdrant"
    assert values["updateVolumeFsOwnership"] is False
    (key,) = values["env"]
    serve = (KUBERNETES / "base/serve.yaml").read_text()
    assert "secretKeyRef: {name: qdrant-key, key: api-key}" in serve
    assert key["valueFrom"]["secretKeyRef"] == {"name": "qdrant-key", "key": "api-key"}
    own = values["containerSecurityContext"]
    assert (own["runAsNonRoot"], own["readOnlyRootFilesystem"], own["allowPrivilegeEscalation"]) == (True, True, False)
    assert own["capabilities"] == {"drop": ["ALL"]}
    spec = {"securityContext": values["podSecurityContext"], "resources": values["resources"],
            "topologySpreadConstraints": values["topologySpreadConstraints"],
            "containers": [{"name": "qdrant", "env": values["env"], "securityContext": own}]}  # fmt: skip
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "qdrant"}, "spec": spec})
