from pathlib import Path

import pytest
import yaml

from feyntune import doctor_cluster as checks
from feyntune.errors import UserError
from tests.servers.kube import KubeServer

STOCK = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "2", "retryPolicy": "OnError"}}}}
FIT = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "0", "retryPolicy": "Always"}}}}
GPU = {"metadata": {"labels": {"cloud.google.com/gke-accelerator": "a100"}},
       "status": {"allocatable": {"nvidia.com/gpu": "3"}}}  # fmt: skip
FULL = {"metadata": {"name": "q"}, "status": {"hard": {"pods": "9"}, "used": {"pods": "9"}}}
CLASS = {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}


def deployed(image):
    return {"spec": {"template": {"spec": {"containers": [{"image": "proxy@sha256:0"}, {"image": image}]}}}}


def policy(**spec):
    return {"items": [{"metadata": {"name": "deny"}, "spec": {"policyTypes": ["Egress"], **spec}}]}


def controller(defaults):
    return {"data": {"workflowDefaults": yaml.safe_dump(defaults)}}


@pytest.mark.parametrize(
    ("check", "answer", "state", "sentence"),
    [
        (checks.check_retry_policy, controller(STOCK), "missing", "limit 2, retryPolicy OnError"),
        (checks.check_retry_policy, controller(FIT), "ok", "drivers are not"),
        (checks.check_retry_policy, {"data": {}}, "missing", "retryPolicy None"),
        (checks.check_retry_policy, controller({**FIT, "spec": {"templateDefaults": {"retryStrategy": {
            "limit": "2", "retryPolicy": "Always"}}}}), "missing", "a driver is"),
        (checks.check_retry_policy, None, "missing", "manifests/prerequisites"),
        (checks.check_kubeflow, None, "missing", "kubeflow.enabled=false"),
        (checks.check_kubeflow, deployed("ghcr.io:443/kubeflow/kfp-api-server:2.15.0"), "missing", "2.16 or later"),
        (checks.check_kubeflow, deployed("ghcr.io/kubeflow/kfp-api-server:2.17.0"), "ok", "2.17"),
        (checks.check_kubeflow, deployed("mirror:5000/api-server:latest"), "optional", "2.16 or later"),
        (checks.check_kserve_version, deployed("kserve/kserve-controller:v0.21.0"), "ok", "0.21"),
        (checks.check_kserve_version, deployed("kserve/kserve-controller:v0.15.2"), "optional", "KServe 0.15"),
        (checks.check_kserve_version, None, "optional", "not in namespace kserve"),
        (checks.check_pod_security, {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
         "ok", "admits restricted pods"),
        (checks.check_pod_security, None, "optional", "does not exist"),
        (checks.check_network_policies, policy(podSelector={}), "optional", "let steps reach the store"),
        (checks.check_network_policies, policy(podSelector={"matchLabels": {"a": "b"}}), "ok", "No network policy"),
        (checks.check_quota, {"items": []}, "ok", "none"),
        (checks.check_s3_keys, None, "optional", "credentials.existing"),
        (checks.check_version, {"minor": "34+"}, "ok", "1.34"),
        (checks.check_version, {"minor": "20"}, "optional", "1.31 to 1.36"),
        (checks.check_gpus, {"items": []}, "missing", "kubeflow.flavor=cpu"),
        (checks.check_gpus, {"items": [GPU]}, "ok", "3 GPUs"),
        (checks.check_gpus, {"items": [{**GPU, "metadata": {}}]}, "missing", "accelerator.nodeSelector"),
        (checks.check_storage_class, {"items": []}, "missing", "persistence.storageClass"),
        (checks.check_storage_class, {"items": [CLASS]}, "ok", "fast"),
        (checks.check_s3_keys, {"data": {"S3_ENDPOINT": "x"}}, "missing", "AWS_ACCESS_KEY_ID"),
        (checks.check_quota, {"items": [FULL]}, "missing", "pods 9 of 9"),
        (checks.check_kserve, None, "missing", "serving.kind=Deployment"),
    ],
)  # fmt: skip
def test_each_check_says_what_to_do(check, answer, state, sentence):
    finding = check("it", answer)
    assert finding.state == state
    assert sentence in finding.sentence


def test_the_recommended_policy_is_the_one_the_prerequisites_set():
    folder = Path(__file__).parents[1] / "manifests" / "prerequisites" / "pipelines"
    patch = yaml.safe_load(yaml.safe_load((folder / "kustomization.yaml").read_text())["patches"][0]["patch"])
    assert checks.check_retry_policy("it", {"data": {"workflowDefaults": patch[0]["value"]}}).state == "ok"


def test_it_only_reads_and_says_what_it_may_not_read():
    from kubernetes.client import ApiClient, Configuration

    with KubeServer() as kube:
        kube.fail("GET", "/nodes", 403)
        configuration = Configuration()
        configuration.host = kube.url
        configuration.retries = False
        findings = list(checks.check_cluster("feyntune", "physics", "kubeflow", ApiClient(configuration)))
        methods = {method for method, _, _ in kube.requests}
    assert methods == {"GET"}
    by_name = {f.what: f for f in findings}
    assert len(by_name) == len(findings) == 13
    assert by_name["GPUs"].state == "optional"
    assert "403" in by_name["GPUs"].sentence
    assert by_name["KServe"].state == "missing"


def test_what_is_kubeflows_is_read_where_kubeflow_is():
    """In a profile the runs have a namespace of their own, and the workflow controller has not."""
    from kubernetes.client import ApiClient, Configuration

    with KubeServer() as kube:
        configuration = Configuration()
        configuration.host, configuration.retries = kube.url, False
        list(checks.check_cluster("feyntune", "physics", "alice", ApiClient(configuration), kubeflow="pipelines"))
        paths = [path for _, path, _ in kube.requests]
    assert "/api/v1/namespaces/pipelines/configmaps/workflow-controller-configmap" in paths
    assert "/apis/apps/v1/namespaces/pipelines/deployments/ml-pipeline" in paths
    assert "/api/v1/namespaces/alice/secrets/feyntune-s3" in paths


def test_a_cluster_that_is_not_there_is_said_in_one_sentence():
    from kubernetes.client import ApiClient, Configuration

    configuration = Configuration()
    configuration.host, configuration.retries = "http://127.0.0.1:9", False
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 does not answer .*KUBECONFIG"):
        list(checks.check_cluster("feyntune", "physics", "kubeflow", ApiClient(configuration)))
