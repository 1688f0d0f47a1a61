"""The stand-in for KServe says what the real controller did, and nothing that it does not say."""

import json
from pathlib import Path
from typing import Any

import requests

from feyntune.deployment.rollout import unfinished
from tests.servers.kube import KubeServer

RECORDED = Path(__file__).parents[1] / "recorded" / "kserve-0.20.0"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/feyntune/inferenceservices"
CONTAINER = {"name": "kserve-container", "image": "predictor:1", "args": ["--a"]}


def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())


def _within(made: dict[str, Any], real: dict[str, Any]) -> None:
    """Every field is one of the real object's, of the same type; conditions are of its types."""
    assert made.keys() <= real.keys()
    assert {key: type(value) for key, value in made.items()} == {key: type(real[key]) for key in made}
    types = {condition["type"]: condition for condition in real["conditions"]}
    for condition in made["conditions"]:
        assert condition.keys() <= types[condition["type"]].keys()
        assert condition["status"] == types[condition["type"]]["status"]


def test_a_ready_service_and_its_deployment_have_the_recorded_fields() -> None:
    spec = {"predictor": {"containers": [CONTAINER], "minReplicas": 1}}
    with KubeServer() as kube:
        requests.post(f"{kube.url}{SERVICES}", json={"metadata": {"name": "feyntune"}, "spec": spec})
        for _ in range(4):
            service = requests.get(f"{kube.url}{SERVICES}/feyntune").json()
        url = f"{kube.url}/apis/apps/v1/namespaces/feyntune/deployments/feyntune-predictor"
        deployment = requests.get(url).json()
    real = recorded("deployment-of-an-inferenceservice")
    assert real["metadata"]["name"] == "feyntune-predictor"
    _within(service["status"], recorded("inferenceservice-status-ready"))
    _within(deployment["status"], real["status"])
    assert service["status"]["observedGeneration"] == deployment["metadata"]["generation"]


def test_the_real_deployment_is_finished_for_what_it_runs_and_for_nothing_else() -> None:
    real = recorded("deployment-of-an-inferenceservice")
    container = real["spec"]["template"]["spec"]["containers"][0]
    assert unfinished(real, container, 1) is None
    assert unfinished(real, {**container, "image": "another:1"}, 1)
    # An upgrade to an image that cannot be pulled: two pods, one of them new, the old one available.
    old = {**real, "status": {**real["status"], "replicas": 2, "updatedReplicas": 1, "availableReplicas": 1}}
    assert "1 old" in str(unfinished(old, container, 1))
