"""The chart and the images on a real cluster: install, test, run, kill, serve, upgrade, roll back, uninstall.

Needs KUBECONFIG; an S3 server in S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which pods reach at
S3_ENDPOINT_PODS (the same when left out); the images feyntune/{worker,trainer,predictor}:0.2.0 (the trainer built with
TORCH=cpu where nodes have no real GPUs); a node with nvidia.com/gpu: 3, labeled and tainted as manifests/gke says.
Where FEYNTUNE_POD_HOST names an address of this machine that pods reach, a Kubeflow server of the tests listens there.
The tests run in the order they stand in; each builds on those before it.
"""

import json
import os
import secrets
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from werkzeug.serving import make_server

from feyntune.artifacts.store import Store, open_store, push
from feyntune.kubeflow.adapt import COMPILED, Settings, adapt
from feyntune.registry.registry import Registry
from tests.cluster import cluster_helpers
from tests.cluster.charts import CHART, render
from tests.cluster.cluster_helpers import forwarded, kubectl
from tests.cluster.driver import Driver
from tests.servers.kubeflow import Kubeflow

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

NAMESPACE = "feyntune-test"
VARIANT = "hep-th/lora-qkv"
NAME = "hep-th.lora-qkv"
RECIPE = {
    "train": {"precision": "fp32", "learning_rate": 3e-3, "epochs": 6, "save_every_steps": 4, "threads": 1},
    "evaluate": {"precision": "fp32"},
}
DROPPED: list[str] = []


def helm(*arguments: str) -> str:
    return cluster_helpers.helm(NAMESPACE, *arguments)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with cluster_helpers.namespace(NAMESPACE):
        yield


@pytest.fixture(scope="module")
def bucket() -> str:
    return f"feyntune-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def kubeflow() -> Iterator[Kubeflow | None]:
    """The tests' own Kubeflow server at an address pods reach, or None."""
    host = os.environ.get("FEYNTUNE_POD_HOST")
    if host is None:
        yield None
        return
    state = Kubeflow()
    server = make_server(host, 0, state, threaded=True)
    state.url = f"http://{host}:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield state
    server.shutdown()


@pytest.fixture(scope="module")
def values(bucket: str, kubeflow: Kubeflow | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small installation beside the S3 server of the environment, its keys in a Secret of the test's own."""
    kube: dict[str, Any] = {"enabled": False}
    if kubeflow is not None:
        kube = {"enabled": True, "mode": "profile", "host": kubeflow.url, "flavor": "gpu", "devices": 1}
    made = {
        "images": {"prefix": "docker.io/feyntune"},
        "assumeAPIs": ["kubeflow.org/v1beta1"],
        "objectStore": {
            "kind": "external",
            "endpoint": os.environ.get("S3_ENDPOINT_PODS", os.environ["S3_ENDPOINT"]),
            "bucket": bucket,
            "credentials": {"existing": True},
        },
        "kubeflow": kube,
        "serving": {
            "kind": "Deployment",
            "gpus": 0,
            "precision": "fp32",
            "base": f"s3://{bucket}/base",
            "cacheSize": "2Gi",
            "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
        },
    }
    path = tmp_path_factory.mktemp("values") / "values.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.fixture(scope="module")
def store(cluster: None, bucket: str, tiny_base: str) -> Store:
    """The bucket, with a tiny base model in it; its keys in the namespace."""
    endpoint = os.environ.get("S3_ENDPOINT_PODS", os.environ["S3_ENDPOINT"])
    secret = client.V1Secret(
        metadata=client.V1ObjectMeta(name="feyntune-s3"),
        string_data={
            "S3_ENDPOINT": endpoint,
            "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
            "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    )
    client.CoreV1Api().create_namespaced_secret(NAMESPACE, secret)
    from feyntune.kubeflow.chart_jobs import bucket as make_bucket

    make_bucket(bucket)
    opened = open_store(f"s3://{bucket}")
    push(opened, tiny_base, "base")
    return opened


def test_the_cluster_takes_every_object_of_an_installation_with_everything(cluster):
    """The API server's own check, CRDs included. Bare pods are left out: without their account they are refused."""
    options = {"kueue": {"enabled": True}, "pushgateway": {"enabled": True}, "serving": {"replicas": 2}}
    made = render({"kubeflow": {"mode": "profile"}, **options}, namespace=NAMESPACE)
    known = kubectl("api-versions").split()
    objects = [o for o in made if o["apiVersion"] in known and o["kind"] != "Pod"]
    kinds = {"InferenceService", "StatefulSet", "NetworkPolicy", "PrometheusRule", "ClusterQueue"}
    assert kinds <= {o["kind"] for o in objects}
    text = yaml.safe_dump_all(objects)
    kubectl("apply", "-n", NAMESPACE, "--dry-run=server", "-f", "-", stdin=text)


def test_helm_installs_and_everything_gets_ready(store, values):
    helm("install", "feyntune", str(CHART), "-f", str(values), "--wait", "--timeout", "8m")
    labels = client.CoreV1Api().read_namespace(NAMESPACE).metadata.labels
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_pipelines_stand_in_kubeflow(kubeflow, store, bucket):
    if kubeflow is None:
        pytest.skip("FEYNTUNE_POD_HOST is not set: no Kubeflow server that pods could reach")
    uploaded = {v["display_name"]: v for versions in kubeflow.versions.values() for v in versions}
    version = next(v for name, v in uploaded.items() if name.startswith("0.2.0-"))
    spec = version["pipeline_spec"]["pipeline_spec"]
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["registry"]["defaultValue"] == f"s3://{bucket}/registry"
    text = json.dumps(version)
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text


def test_helm_test_passes(store):
    output = helm("test", "feyntune", "--timeout", "5m")
    assert "Phase:          Succeeded" in output
    assert "Failed" not in output


def test_a_run_goes_through_pods_of_our_images_though_its_training_is_killed(store, bucket):
    """The training's pod is deleted once it has saved; its retry resumes, and the same run again trains nothing."""
    text = adapt(
        (COMPILED / "suite.yaml").read_text(),
        Settings(env={"FEYNTUNE_METRICS_PORT": "9464"}, gpus=3, cpusPerGpu=0.3, memoryPerGpu=2),
    )
    arguments = {
        "variants": [VARIANT],
        "source": "synthetic:900",
        "until": "",
        "base": f"s3://{bucket}/base",
        "recipe": RECIPE,
        "devices": 1,  # the run's own number, in place of the three of the settings
        "store": f"s3://{bucket}",
        "registry": f"s3://{bucket}/registry",
    }
    killed: list[str] = []

    def kill_when_it_has_saved(task: str, pod: str) -> None:
        if not task.endswith("/train") or killed:
            return

        def watch() -> None:
            while not [n for n in store.names("training/") if "/step-" in n and n.endswith("manifest.json")]:
                time.sleep(0.2)
            killed.append(pod)
            client.CoreV1Api().delete_namespaced_pod(pod, NAMESPACE, grace_period_seconds=30)

        threading.Thread(target=watch, daemon=True).start()

    with _gpu_nodes_tainted() as tolerate:
        run = Driver(text, NAMESPACE, store, tolerate, kill_when_it_has_saved)
        run.run(arguments)
        assert killed
        again = Driver(text, NAMESPACE, store, tolerate)
        again.run(arguments)

    train = next(task for task in run.pods if task.endswith("/train"))
    first, pod = run.pods[train]
    assert first.metadata.name == killed[0]
    assert pod.spec.containers[0].resources.limits["nvidia.com/gpu"] == "1"
    assert pod.spec.node_selector == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    assert "resum" in run.logs[train], run.logs[train][-2000:]
    assert not [task for task in again.pods if task.endswith(("/train", "/evaluate", "/evaluate-base"))]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert not [task for made in (run, again) for task, log in made.logs.items() if secret in log]
    registered = Registry.open(f"s3://{bucket}/registry").versions()
    assert [v.variant for v in registered] == [VARIANT]


def test_the_champion_answers_through_the_service(store, bucket):
    registry = Registry.open(f"s3://{bucket}/registry")
    if "champion" not in registry.aliases():
        registry.promote(VARIANT)
    deadline = time.monotonic() + 60
    while "champion" not in (names := _models()) and time.monotonic() < deadline:
        time.sleep(1)
    assert {"base", "champion", NAME} <= set(names)
    made = _complete("champion")
    assert made["usage"]["completion_tokens"] > 0


def test_no_log_of_any_pod_has_a_key_in_it(store):
    """Steps, Jobs, tests and the endpoint; and what Helm tells of the release."""
    pods = kubectl("-n", NAMESPACE, "get", "pods", "-o", "name").split()
    logs = {pod: kubectl("-n", NAMESPACE, "logs", pod, "--all-containers") for pod in pods}
    assert len([log for log in logs.values() if log.strip()]) > 5
    outputs = {what: helm("get", what, "feyntune") for what in ("manifest", "values", "notes", "hooks")}
    for secret in (os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]):
        assert not [name for name, text in {**logs, **outputs}.items() if secret in text]


def test_a_killed_endpoint_comes_back_with_the_champion(store):
    before = _complete("champion")["choices"][0]["text"]
    kubectl("-n", NAMESPACE, "delete", "pod", "-l", "app.kubernetes.io/component=serving", "--wait=true")
    kubectl("-n", NAMESPACE, "rollout", "status", "deployment/feyntune-predictor", "--timeout=4m")
    assert _complete("champion")["choices"][0]["text"] == before


def test_upgrade_and_rollback_keep_everything_and_drop_no_request(store, values, bucket):
    before = sorted(store.names())
    with _traffic():
        helm(
            "upgrade",
            "feyntune",
            str(CHART),
            "-f",
            str(values),
            "--set",
            "serving.maxRank=32",
            "--wait",
            "--timeout",
            "6m",
        )
        assert "--max-rank=32" in kubectl("-n", NAMESPACE, "get", "deployment", "feyntune-predictor", "-o", "yaml")
        helm("rollback", "feyntune", "1", "--wait", "--timeout", "6m")
        assert "--max-rank=8" in kubectl("-n", NAMESPACE, "get", "deployment", "feyntune-predictor", "-o", "yaml")
    assert DROPPED == []
    assert sorted(store.names()) == before
    assert _complete("champion")["usage"]["completion_tokens"] > 0


def test_uninstall_leaves_the_data(store, bucket):
    before = sorted(store.names())
    helm("uninstall", "feyntune")
    left = kubectl("-n", NAMESPACE, "get", "deployments,statefulsets,services", "-o", "name")
    assert left.strip() == ""
    assert sorted(store.names()) == before
    assert Registry.open(f"s3://{bucket}/registry").aliases()["champion"].startswith(VARIANT)


@contextmanager
def _gpu_nodes_tainted() -> Iterator[list[dict[str, str]]]:
    """Taint the nodes with GPUs; what CPU steps must tolerate where there are no other nodes."""
    key, effect = "nvidia.com/gpu", "NoSchedule"
    nodes = client.CoreV1Api().list_node().items
    with_gpus = [n.metadata.name for n in nodes if int(n.status.allocatable.get(key, "0")) >= 3]
    assert with_gpus, "no node has nvidia.com/gpu: 3"
    alone = len(with_gpus) == len(nodes)
    kubectl("taint", "node", "--overwrite", *with_gpus, f"{key}=present:{effect}")
    try:
        yield [{"key": key, "operator": "Exists", "effect": effect}] if alone else []
    finally:
        if alone:  # what the other tests start must find a place too
            kubectl("taint", "node", *with_gpus, f"{key}-")


def _ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def _models() -> list[str]:
    with forwarded(NAMESPACE, "feyntune-predictor", 80) as url:
        return [m["id"] for m in _ask(f"{url}/openai/v1/models")["data"]]


def _complete(model: str) -> Any:
    prompt = {"model": model, "prompt": "We study the", "max_tokens": 12, "temperature": 0}
    with forwarded(NAMESPACE, "feyntune-predictor", 80) as url:
        return _ask(f"{url}/openai/v1/completions", prompt)


TRAFFIC = """
import sys, time, requests
url, failed, done = sys.argv[1], 0, 0
while True:
    try:
        answer = requests.post(url, json={"model": "champion", "prompt": "We", "max_tokens": 4}, timeout=60)
        ok = answer.status_code == 200
        reason = "" if ok else f"{answer.status_code} {answer.text[:200]}"
    except requests.RequestException as e:
        ok, reason = False, repr(e)
    done += 1
    print("ok" if ok else f"failed {reason}", flush=True)
    time.sleep(0.2)
"""


@contextmanager
def _traffic() -> Iterator[None]:
    """Requests from inside the cluster, through the Service, all the while; failed ones end up in DROPPED."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "traffic", "namespace": NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "traffic",
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "image": "feyntune/worker:0.2.0",
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-c", TRAFFIC],
                    "args": [f"http://feyntune-predictor.{NAMESPACE}.svc/openai/v1/completions"],
                }
            ],
        },
    }
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump(pod))
    kubectl("-n", NAMESPACE, "wait", "--for=condition=Ready", "pod/traffic", "--timeout=60s")
    try:
        yield
        lines = kubectl("-n", NAMESPACE, "logs", "traffic").splitlines()
        assert len([line for line in lines if line == "ok"]) > 20
        DROPPED.extend(line for line in lines if line != "ok")
    finally:
        kubectl("-n", NAMESPACE, "delete", "pod", "traffic", "--grace-period=0", "--force")
