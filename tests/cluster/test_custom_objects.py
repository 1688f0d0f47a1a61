"""Objects of KServe, the Prometheus operator and Kueue against typed models: no unknown field, no wrong kind."""

import json
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from feyntune.kubeflow.adapt import COMPILED
from tests.cluster.charts import CASES, ROOT, render
from tests.cluster.driver import pod_of

QUEUES = ROOT / "manifests" / "kueue" / "queues.yaml"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Selector(Strict):
    matchLabels: dict[str, str] = {}


class NamespaceSelector(Strict):
    matchNames: list[str]


class Relabeling(Strict):
    action: Literal["keep", "replace"]
    sourceLabels: list[str]
    regex: str
    replacement: str = ""
    targetLabel: str = ""


class Endpoint(Strict):
    port: str = ""
    path: str = "/metrics"
    interval: str
    honorLabels: bool = False
    relabelings: list[Relabeling] = []


class PodMonitor(Strict):
    """monitoring.coreos.com/v1 (field names from the operator's API reference; what the chart uses of it)."""

    namespaceSelector: NamespaceSelector | None = None
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class ServiceMonitor(Strict):
    namespaceSelector: NamespaceSelector | None = None
    selector: Selector
    endpoints: list[Endpoint]


class Rule(Strict):
    alert: str = ""
    record: str = ""
    expr: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    # The field is called `for`, which Python keeps to itself.
    model_config = ConfigDict(extra="forbid", alias_generator=lambda name: {"wait": "for"}.get(name, name))
    wait: str = ""


class Group(Strict):
    name: str
    interval: str = ""
    rules: list[Rule]


class PrometheusRule(Strict):
    groups: list[Group]


class Quota(Strict):
    name: str
    nominalQuota: int | str


class Flavor(Strict):
    name: str
    resources: list[Quota]


class ResourceGroup(Strict):
    coveredResources: list[str]
    flavors: list[Flavor]


class ClusterQueue(Strict):
    namespaceSelector: Selector
    queueingStrategy: Literal["BestEffortFIFO", "StrictFIFO"]
    resourceGroups: list[ResourceGroup]


class LocalQueue(Strict):
    clusterQueue: str


class ResourceFlavor(Strict):
    nodeLabels: dict[str, str]


MODELS = (PodMonitor, ServiceMonitor, PrometheusRule, ClusterQueue, LocalQueue, ResourceFlavor)
OURS = {model.__name__: model for model in MODELS}


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return [o for values in CASES.values() for o in render(values)]


@pytest.mark.parametrize("kind", OURS)
def test_monitoring_and_queue_objects_fit_their_models(objects, kind):
    specs = [o["spec"] for o in objects if o["kind"] == kind]
    assert specs
    for spec in specs:
        OURS[kind].model_validate(spec)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("InferenceService", "V1beta1InferenceServiceSpec"),
    ],
)
def test_kserve_objects_fit_the_models_of_its_own_package(objects, kind, model):
    specs = [o["spec"] for o in objects if o["kind"] == kind]
    assert specs
    for spec in specs:
        misfits = list(unfitting(spec, model))
        assert not misfits


def test_a_field_that_kserve_does_not_have_is_found():
    spec = {"predictor": {"containers": [{"imge": "feyntune"}], "minReplicas": "one"}}
    assert list(unfitting(spec, "V1beta1InferenceServiceSpec")) == [
        "predictor.containers[0].imge is not a field of V1Container",
        "predictor.minReplicas is a str, not int",
    ]


def unfitting(value: Any, kind: str, path: str = "") -> Any:
    """Where `value` does not fit `kind`, a type in the spelling of the generated Kubernetes and KServe clients."""
    from kserve import models
    from kubernetes import client

    if kind.startswith("list["):
        for i, item in enumerate(value):
            yield from unfitting(item, kind[5:-1], f"{path}[{i}]")
    elif kind.startswith("dict("):
        for key, item in value.items():
            yield from unfitting(item, kind[5:-1].split(", ", 1)[1], f"{path}.{key}")
    elif kind in ("int", "str", "bool", "float"):
        types = {"int": int, "str": str, "bool": bool, "float": (int, float)}[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind == "int"):
            yield f"{path} is a {type(value).__name__}, not {kind}"
    elif kind not in ("object", "ResourceQuantity", "KnativeURL", "datetime", "IntOrString"):
        kind = kind.replace("K8sIoApiApps", "")  # a Kubernetes type under KServe's own name
        model = getattr(models, kind, None) or getattr(client, kind)
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        for key, inner in value.items():
            where = f"{path}.{key}".strip(".")
            if key not in names:
                yield f"{where} is not a field of {kind}"
            else:
                yield from unfitting(inner, model.openapi_types[names[key]], where)


def test_the_queue_covers_every_resource_that_a_training_pod_requests(objects):
    """Kueue never admits a pod that requests what its queue leaves out (kubernetes-sigs/kueue, issue 4848)."""
    spec, platform = yaml.safe_load_all((COMPILED / "suite.yaml").read_text())
    extras = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    requested: set[str] = set()
    for name, executor in spec["deploymentSpec"]["executors"].items():
        if "accelerator" in executor["container"]["resources"]:
            resources = pod_of("step", executor["container"], extras[name])["spec"]["containers"][0]["resources"]
            requested |= resources["requests"].keys() | resources["limits"].keys()
    assert {"nvidia.com/gpu", "cpu", "memory"} <= requested
    queues = [o["spec"] for o in objects if o["kind"] == "ClusterQueue"]
    shared = next(o["spec"] for o in yaml.safe_load_all(QUEUES.read_text()) if o["kind"] == "ClusterQueue")
    for queue in [*queues, shared]:
        groups = queue["resourceGroups"]
        assert {r for group in groups for r in group["coveredResources"]} >= requested
        for group in groups:
            for flavor in group["flavors"]:
                assert [r["name"] for r in flavor["resources"]] == group["coveredResources"]


def test_the_dashboard_is_found_by_grafana(objects):
    boards = [o for o in objects if o["kind"] == "ConfigMap" and "feyntune.json" in o["data"]]
    assert boards
    for o in boards:
        assert o["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(o["data"]["feyntune.json"])["uid"] == "feyntune"
