"""What an installation needs of its cluster, read with the reader's own kubeconfig; nothing is changed."""

import re
from collections.abc import Iterator
from typing import Any

import urllib3
import yaml

from feyntune.doctor import Check
from feyntune.errors import UserError

Object = dict[str, Any]
_S3_KEYS = {"S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"}
_README = "see manifests/prerequisites/README.md"


def check_cluster(release: str, namespace: str, runs: str, client: Any, kubeflow: str = "kubeflow") -> Iterator[Check]:
    """Check the cluster of `client` (a `kubernetes.client.ApiClient`) for a release.

    Args:
        namespace, runs, kubeflow: of the release, of its runs, and of Kubeflow Pipelines with its workflow controller.
            What the reader may not read is reported as such.

    Raises:
        UserError: the cluster does not answer.
    """

    def read(what: str, path: str) -> tuple[Object | None, Check | None]:
        from kubernetes.client.exceptions import ApiException

        try:
            answer = client.call_api(
                path, "GET", auth_settings=["BearerToken"], response_type="object", _request_timeout=10
            )[0]
            return answer, None
        except ApiException as e:
            if e.status == 404:
                return None, None
            return None, Check(what, "optional", f"{what}: not checked, the cluster answers {e.status} {e.reason}.")
        except (urllib3.exceptions.HTTPError, OSError) as e:
            host = client.configuration.host
            raise UserError(f"The cluster at {host} does not answer ({type(e).__name__}): check KUBECONFIG.") from e

    checks = [
        ("Kubernetes", "/version", check_version),
        ("Kubeflow Pipelines", f"/apis/apps/v1/namespaces/{kubeflow}/deployments/ml-pipeline", check_kubeflow),
        (
            "retry policy",
            f"/api/v1/namespaces/{kubeflow}/configmaps/workflow-controller-configmap",
            check_retry_policy,
        ),
        ("Pod Security", f"/api/v1/namespaces/{namespace}", check_pod_security),
        ("GPUs", "/api/v1/nodes", check_gpus),
        ("storage class", "/apis/storage.k8s.io/v1/storageclasses", check_storage_class),
        *(
            (f"S3 keys in {n}", f"/api/v1/namespaces/{n}/secrets/{release}-s3", check_s3_keys)
            for n in dict.fromkeys((namespace, runs))
        ),
        *(
            (f"quota of {n}", f"/api/v1/namespaces/{n}/resourcequotas", check_quota)
            for n in dict.fromkeys((namespace, runs))
        ),
        ("network policies", f"/apis/networking.k8s.io/v1/namespaces/{runs}/networkpolicies", check_network_policies),
        (
            "KServe",
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/inferenceservices.serving.kserve.io",
            check_kserve,
        ),
        (
            "KServe's version",
            "/apis/apps/v1/namespaces/kserve/deployments/kserve-controller-manager",
            check_kserve_version,
        ),
    ]
    for what, path, check in checks:
        answer, refused = read(what, path)
        yield refused or check(what, answer)


def check_version(what: str, answer: Object | None) -> Check:
    minor = int("".join(c for c in (answer or {}).get("minor", "0") if c.isdigit()) or 0)
    if 31 <= minor <= 36:
        return Check(what, "ok", f"Kubernetes 1.{minor}.")
    return Check(what, "optional", f"Kubernetes 1.{minor}: 1.31 to 1.36 are what the chart is checked against.")


def check_kubeflow(what: str, answer: Object | None) -> Check:
    if answer is None:
        return Check(
            what, "missing", f"Kubeflow Pipelines is not in that namespace: {_README}, or set kubeflow.enabled=false."
        )
    version = _version_of(answer)
    if version is None:
        return Check(what, "optional", "Kubeflow Pipelines: its image's tag names no version; 2.16 or later is needed.")
    if version < (2, 16):
        return Check(
            what, "missing", f"Kubeflow Pipelines {_text(version)} refuses the pipelines: upgrade it to 2.16 or later."
        )
    return Check(what, "ok", f"Kubeflow Pipelines {_text(version)}.")


def check_kserve_version(what: str, answer: Object | None) -> Check:
    version = _version_of(answer or {})
    if version in ((0, 20), (0, 21)):
        return Check(what, "ok", f"KServe {_text(version)}.")
    if version is None:
        return Check(
            what, "optional", "KServe: its controller is not in namespace kserve, or its image has no version."
        )
    return Check(what, "optional", f"KServe {_text(version)}: 0.20 and 0.21 are what the chart is made for.")


def _version_of(deployment: Object) -> tuple[int, int] | None:
    """(major, minor) by the tag of the first image that has one."""
    pod = ((deployment.get("spec") or {}).get("template") or {}).get("spec") or {}
    for container in pod.get("containers", []):
        if match := re.search(r":v?(\d+)\.(\d+)", container["image"].rpartition("/")[2]):
            return int(match[1]), int(match[2])
    return None


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def check_retry_policy(what: str, answer: Object | None) -> Check:
    if answer is None:
        return Check(what, "missing", f"No Argo workflow controller is configured there: {_README}.")
    defaults = yaml.safe_load((answer.get("data") or {}).get("workflowDefaults") or "") or {}
    retry = ((defaults.get("spec") or {}).get("templateDefaults") or {}).get("retryStrategy") or {}
    if str(retry.get("limit")) == "0" and retry.get("retryPolicy") == "Always":
        return Check(what, "ok", "Failed steps are retried, and Kubeflow's drivers are not.")
    return Check(
        what,
        "missing",
        f"Argo's default is limit {retry.get('limit')}, retryPolicy {retry.get('retryPolicy')}: a failed step is not "
        "retried, or a driver is: set limit '0' and retryPolicy Always with `kubectl -n kubeflow edit configmap "
        "workflow-controller-configmap`, then restart deployment/workflow-controller.",
    )


def check_pod_security(what: str, answer: Object | None) -> Check:
    if answer is None:
        return Check(what, "optional", "The release's namespace does not exist yet.")
    level = (answer["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    return Check(what, "ok", f"The namespace admits {level or 'any'} pods; ours fit restricted.")


def check_gpus(what: str, answer: Object | None) -> Check:
    nodes = [n for n in (answer or {}).get("items", []) if int(n["status"]["allocatable"].get("nvidia.com/gpu", 0))]
    if not nodes:
        return Check(
            what,
            "missing",
            "No node has nvidia.com/gpu: add a GPU pool with the device plugin, or set kubeflow.flavor=cpu.",
        )
    count = sum(int(n["status"]["allocatable"]["nvidia.com/gpu"]) for n in nodes)
    key = "cloud.google.com/gke-accelerator"
    labels = {n["metadata"].get("labels", {}).get(key, "") for n in nodes}
    if labels == {""}:
        return Check(what, "missing", f"{count} GPUs, but no label {key}: set accelerator.nodeSelector to your own.")
    return Check(what, "ok", f"{count} GPUs on {len(nodes)} nodes, {key}: {', '.join(sorted(labels - {''}))}.")


def check_storage_class(what: str, answer: Object | None) -> Check:
    default = "storageclass.kubernetes.io/is-default-class"
    names = [
        o["metadata"]["name"]
        for o in (answer or {}).get("items", [])
        if (o["metadata"].get("annotations") or {}).get(default) == "true"
    ]
    if names:
        return Check(what, "ok", f"The default storage class is {names[0]}.")
    return Check(
        what,
        "missing",
        "No default storage class: set objectStore.persistence.storageClass, or use your own S3 server.",
    )


def check_s3_keys(what: str, answer: Object | None) -> Check:
    absent = sorted(_S3_KEYS - ((answer or {}).get("data") or {}).keys())
    if answer is None:
        return Check(what, "optional", f"{what}: no Secret yet; the chart makes it, or you do (credentials.existing).")
    if absent:
        return Check(what, "missing", f"{what}: the Secret has no {', '.join(absent)}: add them.")
    return Check(what, "ok", f"{what}: all are there.")


def check_quota(what: str, answer: Object | None) -> Check:
    used_up = [
        f"{o['metadata']['name']} ({resource} {used} of {hard})"
        for o in (answer or {}).get("items", [])
        for resource, hard in (o.get("status") or {}).get("hard", {}).items()
        if (used := o["status"].get("used", {}).get(resource)) == hard
    ]
    if used_up:
        return Check(what, "missing", f"{what}: used up: {', '.join(used_up)}: raise it, or pods stay pending.")
    return Check(what, "ok", f"{what}: none that is used up.")


def check_network_policies(what: str, answer: Object | None) -> Check:
    blocking = [
        o["metadata"]["name"]
        for o in (answer or {}).get("items", [])
        if not o["spec"].get("podSelector") and "Egress" in o["spec"].get("policyTypes", [])
    ]
    if blocking:
        return Check(
            what,
            "optional",
            f"{', '.join(blocking)} limits what every pod of the runs' namespace may call: let steps reach the store.",
        )
    return Check(what, "ok", "No network policy limits what every pod of the runs' namespace may call.")


def check_kserve(what: str, answer: Object | None) -> Check:
    if answer is None:
        return Check(what, "missing", f"KServe is not on this cluster: {_README}, or set serving.kind=Deployment.")
    return Check(what, "ok", "KServe's InferenceService is there.")
