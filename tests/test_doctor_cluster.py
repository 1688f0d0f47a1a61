from pathlib import Path

import pytest
import yaml

from feyntune import doctor_cluster as checks
from tests.servers.kube import KubeServer

STOCK = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "2", "retryPolicy": "OnError"}}}}
FIT = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "0", "retryPolicy": "Always"}}}}
GPU = {"metadata": {"labels": {"cloud.google.com/gke-accelerator": "a100"}},
       "status": {"allocatable": {"nvidia.com/gpu": "3"}}}  # fmt: skip
FULL = {"metadata": {"name": "q"}, "status": {"hard": {"pods": "9"}, "used": {"pods": "9"}}}
CLASS = {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}


def controller(defaults):
    return {"data": {"workflowDefaults": yaml.safe_dump(defaults)}}


@pytest.mark.parametrize(
    ("check", "answer", "state", "sentence"),
    [
        (checks.check_retry_policy, controller(STOCK), "missing", "limit 2, retryPolicy OnError"),
        (checks.check_retry_policy, controller(FIT), "ok", "drivers are not"),
        (checks.check_retry_policy, {"data": {}}, "missing", "retryPolicy None"),
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
)
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
    assert len(by_name) == len(findings) == 11
    assert by_name["GPUs"].state == "optional"
    assert "403" in by_name["GPUs"].sentence
    assert by_name["KServe"].state == "missing"
