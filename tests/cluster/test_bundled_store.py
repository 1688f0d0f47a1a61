"""The bundled SeaweedFS on a real cluster: data and keys outlive a killed pod, an upgrade, a rollback, an uninstall.

Needs KUBECONFIG, the image feyntune/worker:0.2.0 and the store's image of values.yaml on the nodes, and a default
StorageClass. The tests run in the order they stand in.
"""

import base64
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.store import Store, open_store, pull, push
from tests.cluster.charts import CHART
from tests.cluster.cluster_helpers import forwarded, helm, kubectl, namespace, state

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
NAMESPACE = "feyntune-store-test"
VALUES = {
    "images": {"prefix": "docker.io/feyntune"},  # loaded on the node under that name
    "podSecurity": {"labelNamespace": False},  # a pod below has to be root where volumes are folders of root's
    "objectStore": {
        "persistence": {"size": "1Gi"},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "2Gi"}},
    },
    "kubeflow": {"enabled": False},
    "serving": {"kind": "none"},
    "monitoring": {"enabled": "never"},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with namespace(NAMESPACE):
        yield


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values") / "values.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A artifact to be found again, byte by byte."""
    folder = tmp_path_factory.mktemp("sealed") / "out"
    with write_artifact(folder, kind="check") as made:
        (made.path / "bytes").write_bytes(secrets.token_bytes(7 << 20))
    return folder


def test_the_store_starts_on_an_empty_volume_and_makes_its_bucket(cluster, values):
    helm(NAMESPACE, "install", "feyntune", str(CHART), "-f", str(values))
    _open_the_volume()
    _ready()
    job = kubectl("-n", NAMESPACE, "get", "job", "-o", "name").strip()
    kubectl("-n", NAMESPACE, "wait", "--for=condition=complete", job, "--timeout=4m")


def test_helm_test_passes_on_it(cluster):
    assert "Phase:          Succeeded" in helm(NAMESPACE, "test", "feyntune", "--timeout", "4m")


def test_other_keys_than_the_drawn_ones_are_refused(cluster, monkeypatch):
    from feyntune.artifacts.store import StoreError

    with _store() as store:
        assert list(store.names()) == []
    with _store(secret="wrong" * 8) as store, pytest.raises(StoreError):
        list(store.names())


def test_what_was_written_outlives_a_killed_pod(cluster, sealed, tmp_path):
    with _store() as store:
        push(store, sealed, "kept")
    kubectl("-n", NAMESPACE, "delete", "pod", "feyntune-store-0", "--grace-period=0", "--force")
    _ready()
    _is_there(tmp_path)


def test_it_outlives_an_upgrade_and_a_rollback(cluster, values, tmp_path):
    before = _pod()
    change = "objectStore.resources.limits.memory=3Gi"
    helm(NAMESPACE, "upgrade", "feyntune", str(CHART), "-f", str(values), "--set", change, "--timeout", "5m")
    _ready()
    assert _pod() != before
    _is_there(tmp_path / "upgraded")
    helm(NAMESPACE, "rollback", "feyntune", "1", "--timeout", "5m")
    _ready()
    _is_there(tmp_path / "rolled-back")


def test_it_outlives_an_uninstall_and_the_next_release_takes_it_over_with_its_keys(cluster, values, tmp_path):
    keys = _secret()
    helm(NAMESPACE, "uninstall", "feyntune")
    left = kubectl("-n", NAMESPACE, "get", "deployments,statefulsets,services,pvc,secrets", "-o", "name").split()
    assert "persistentvolumeclaim/feyntune-store" in left
    assert "secret/feyntune-s3" in left
    assert not [name for name in left if name.startswith(("deployment", "statefulset", "service/"))]
    helm(NAMESPACE, "install", "feyntune", str(CHART), "-f", str(values))
    _ready()
    assert _secret() == keys
    _is_there(tmp_path)


def test_an_uninstall_that_was_told_so_gives_the_volume_up(cluster, values):
    no = "objectStore.persistence.keep=false"
    helm(NAMESPACE, "upgrade", "feyntune", str(CHART), "-f", str(values), "--set", no, "--timeout", "5m")
    helm(NAMESPACE, "uninstall", "feyntune")
    kubectl("-n", NAMESPACE, "wait", "--for=delete", "pvc/feyntune-store", "--timeout=2m")


def _ready() -> None:
    """The StatefulSet is as it was last asked for, its pod ready."""
    kubectl("-n", NAMESPACE, "rollout", "status", "statefulset/feyntune-store", "--timeout=5m")


def _pod() -> str:
    return client.CoreV1Api().read_namespaced_pod("feyntune-store-0", NAMESPACE).metadata.uid


def _secret() -> dict[str, str]:
    data = client.CoreV1Api().read_namespaced_secret("feyntune-s3", NAMESPACE).data
    return {name: base64.b64decode(value).decode() for name, value in data.items()}


@contextmanager
def _store(secret: str | None = None) -> Iterator[Store]:
    keys = _secret()
    with forwarded(NAMESPACE, "feyntune-store", 8333) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("S3_ENDPOINT", url)
        patch.setenv("AWS_ACCESS_KEY_ID", keys["AWS_ACCESS_KEY_ID"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret or keys["AWS_SECRET_ACCESS_KEY"])
        yield open_store("s3://feyntune")


def _is_there(folder: Path) -> None:
    """`pull` compares every digest."""
    with _store() as store:
        pull(store, "kept", folder / "kept", kind="check")


def _open_the_volume() -> None:
    """The in-tree hostPath provisioner makes folders of root's and knows no fsGroup; others' volumes need nothing."""
    default = "storageclass.kubernetes.io/is-default-class"
    classes = client.StorageV1Api().list_storage_class().items
    used = [c for c in classes if (c.metadata.annotations or {}).get(default) == "true"]
    if not used or used[0].provisioner != "kubernetes.io/host-path":
        return
    spec = {
        "restartPolicy": "Never",
        "containers": [{"name": "open", "image": "feyntune/worker:0.2.0", "imagePullPolicy": "IfNotPresent",
                        "securityContext": {"runAsUser": 0}, "command": ["chmod", "0777", "/data"],
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "feyntune-store"}}],
    }  # fmt: skip
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "open", "namespace": NAMESPACE}, "spec": spec}
    kubectl("apply", "-f", "-", stdin=json.dumps(pod))
    until = time.monotonic() + 120
    while client.CoreV1Api().read_namespaced_pod("open", NAMESPACE).status.phase != "Succeeded":
        assert time.monotonic() < until, state(NAMESPACE)
        time.sleep(0.5)
    kubectl("-n", NAMESPACE, "delete", "pod", "open")
