"""The prerequisites' patches, applied by kustomize to objects of upstream's layout (names as in 2.17.0 and 0.20.0)."""

import re
import subprocess

import pytest
import yaml

from tests.cluster.charts import ROOT, tool

KUBECTL = tool("kubectl")
FOLDER = ROOT / "manifests" / "prerequisites"
UPSTREAM = {
    "pipelines": [
        {"kind": "ConfigMap", "metadata": {"name": "workflow-controller-configmap"}, "data": {"workflowDefaults": "x"}}
    ],
    "kserve": [
        {"kind": "ConfigMap", "metadata": {"name": "inferenceservice-config"}, "data": {"deploy": "{}"}},
        {"kind": "Pod", "metadata": {"name": "c"},
         "spec": {"containers": [{"name": "manager", "image": "kserve/kserve-controller:latest"}]}},
    ],
}  # fmt: skip


@pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl on PATH")
@pytest.mark.parametrize("name", UPSTREAM)
def test_a_prerequisites_patches_fit_upstreams_objects(tmp_path, name):
    kustomization = yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text())
    kustomization["resources"] = ["upstream.yaml"]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    upstream = [{"apiVersion": "v1", **o} for o in UPSTREAM[name]]
    (tmp_path / "upstream.yaml").write_text(yaml.safe_dump_all(upstream))
    made = subprocess.run([str(KUBECTL), "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    objects = {o["metadata"]["name"]: o for o in yaml.safe_load_all(made.stdout)}
    if name == "pipelines":
        defaults = yaml.safe_load(objects["workflow-controller-configmap"]["data"]["workflowDefaults"])
        assert defaults["spec"]["templateDefaults"]["retryStrategy"] == {"limit": "0", "retryPolicy": "Always"}
    else:
        assert "Standard" in objects["inferenceservice-config"]["data"]["deploy"]
        assert objects["c"]["spec"]["containers"][0]["image"] == "kserve/kserve-controller:v0.20.0"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("kustomization.yaml")), ids=lambda p: p.parent.name)
def test_every_upstream_is_pinned(path):
    for resource in yaml.safe_load(path.read_text())["resources"]:
        assert "?ref=v" in resource or "?ref=2." in resource


def test_the_versions_that_the_manifests_page_tells_are_the_ones_that_are_pinned():
    pinned = re.findall(r"\?ref=v?([\d.]+)", "".join(p.read_text() for p in FOLDER.rglob("kustomization.yaml")))
    row = next(line for line in (FOLDER.parent / "README.md").read_text().splitlines() if "`prerequisites/`" in line)
    assert set(re.findall(r"\d+\.\d+\.\d+", row)) == set(pinned)
