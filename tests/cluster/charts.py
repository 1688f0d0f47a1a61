"""What the chart's tests share: cases of values, rendering, and the pods in what was rendered."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "charts" / "feyntune"
APIS = ["kubeflow.org/v1beta1", "serving.kserve.io/v1beta1", "monitoring.coreos.com/v1", "kueue.x-k8s.io/v1beta1"]
SECRETS = {"access": "Acc3ssKeyOfTheTest", "secret": "S3cretKeyOfTheTest", "token": "hf_TokenOfTheTest"}
GIVEN = {"accessKey": SECRETS["access"], "secretKey": SECRETS["secret"]}
EXTERNAL = {"kind": "external", "endpoint": "https://s3.example:9000", "credentials": GIVEN}

# Values of one installation each; together they reach every template in every form.
CASES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "in a Kubeflow profile": {
        "kubeflow": {"mode": "profile", "pipelineRoot": "s3://feyntune/kubeflow"},
        "podSecurity": {"labelNamespace": False},
    },
    "on an external S3 server": {"objectStore": EXTERNAL, "hub": {"token": SECRETS["token"]}},
    "with existing Secrets": {
        "objectStore": {**EXTERNAL, "credentials": {"existing": True}},
        "hub": {"existing": True},
    },
    "on MinIO": {"objectStore": {"kind": "minio", "minio": {"image": "example.org/minio:1"}, "credentials": GIVEN}},
    "without GPUs or KServe": {
        "kubeflow": {"flavor": "cpu"},
        "serving": {"kind": "Deployment", "gpus": 0, "precision": "fp32", "replicas": 2, "base": "s3://feyntune/base"},
    },
    "on GPUs without KServe": {"serving": {"kind": "Deployment"}},
    "with everything": {
        "images": {"prefix": "registry.example/team", "tag": "1.2.3", "pullSecrets": ["login"]},
        "kueue": {"enabled": True},
        "pushgateway": {"enabled": True},
        "monitoring": {"labels": {"release": "prometheus"}},
        "baseCache": {"enabled": True, "storageClass": "shared"},
        "serving": {"keysSecret": "keys", "replicas": 3, "canaryShare": 0.1},
        "networkPolicy": {"servingFrom": [{"namespaceSelector": {"matchLabels": {"team": "physics"}}}]},
    },
    "with an existing queue and volume": {
        "kueue": {"enabled": True, "clusterQueue": "shared"},
        "objectStore": {"persistence": {"existingClaim": "mine"}, "credentials": GIVEN},
    },
    "with the least": {
        "kubeflow": {"enabled": False},
        "serving": {"kind": "none"},
        "networkPolicy": {"enabled": False},
        "monitoring": {"enabled": "never"},
        "podSecurity": {"labelNamespace": False},
        "objectStore": {"persistence": {"keep": False, "storageClass": "fast"}},
    },
}  # fmt: skip


def render(
    values: dict[str, Any], apis: list[str] | None = None, namespace: str = "feyntune", name: str = "feyntune"
) -> list[dict[str, Any]]:
    """The objects of an installation, by the Helm 4 engine.

    Raises:
        helm_python.HelmError: the chart or its schema refuses.
    """
    values = {**values, "assumeAPIs": APIS if apis is None else apis}
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        made = chart.render(values, name=name, namespace=namespace, is_install=True)
    manifests = [text for path, text in made.items() if path.endswith(".yaml")]
    return [o for text in manifests for o in yaml.safe_load_all(text) if o]


def render_with_cli(helm: str, values: dict[str, Any], tmp: Path) -> list[dict[str, Any]]:
    """The same by the `helm` command, whichever version it is."""
    path = tmp / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    has = [part for api in APIS for part in ("-a", api)]
    made = subprocess.run(
        [helm, "template", "feyntune", str(CHART), "-n", "feyntune", "-f", str(path), *has],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [o for o in yaml.safe_load_all(made.stdout) if o]


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of the object to the spec of the pods it makes."""
    specs = {}
    for o in objects:
        name = f"{o['kind']} {o['metadata']['name']}"
        if o["kind"] == "Pod":
            specs[name] = o["spec"]
        elif o["kind"] in ("Deployment", "StatefulSet", "Job"):
            specs[name] = o["spec"]["template"]["spec"]
        elif o["kind"] == "InferenceService":
            specs[name] = o["spec"]["predictor"]
    return specs


def tool(name: str) -> str | None:
    """Where a command is, or None."""
    return shutil.which(name)
