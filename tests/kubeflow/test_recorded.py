"""The stand-in for Kubeflow Pipelines answers as the real server did."""

import json
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from feyntune.kubeflow.adapt import COMPILED
from feyntune.kubeflow.submit import upload
from tests.servers.kubeflow import Kubeflow, kubeflow

RECORDED = Path(__file__).parents[1] / "recorded" / "kubeflow-2.17.0"
NOWHERE = "00000000-0000-0000-0000-000000000000"


def recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDED / f"{name}.json").read_text())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with kubeflow() as running:
        upload(running.url, "0.1.0")
        yield running


def _start(server: Kubeflow, parameters: dict[str, Any]) -> requests.Response:
    pipeline = next(p["pipeline_id"] for p in server.pipelines.values() if p["display_name"] == "feyntune-variant")
    reference = {"pipeline_id": pipeline, "pipeline_version_id": server.versions[pipeline][0]["pipeline_version_id"]}
    body = {"display_name": "t", "pipeline_version_reference": reference, "runtime_config": {"parameters": parameters}}
    return requests.post(f"{server.url}/apis/v2beta1/runs", json=body)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("run-bad-parameter", {"nosuch": 1}),
        ("run-bad-type", {"devices": "three"}),
        ("run-bad-literal", {"variant": "nope/x"}),
    ],
)
def test_a_run_with_bad_parameters_is_refused_in_the_real_words(server, name, parameters) -> None:
    answer, real = _start(server, parameters), recorded(name)
    assert answer.status_code == real["status"]
    assert answer.json()["message"] == real["body"]["message"]
    assert answer.json()["details"][0] == real["body"]["details"][0]


@pytest.mark.parametrize(("name", "path"), [("pipeline-unknown", "pipelines"), ("run-unknown", "runs")])
def test_what_is_not_there_is_404_in_the_real_words(server, name, path) -> None:
    answer, real = requests.get(f"{server.url}/apis/v2beta1/{path}/{NOWHERE}"), recorded(name)
    assert (answer.status_code, answer.json()) == (real["status"], real["body"])


@pytest.mark.parametrize("name", ["upload-version-same-name", "upload-version-unknown-pipeline"])
def test_a_refused_upload_has_the_real_status_and_body(server, name) -> None:
    known = next(iter(server.pipelines))
    pipeline = known if name == "upload-version-same-name" else NOWHERE
    with (COMPILED / "suite.yaml").open("rb") as package:
        answer = requests.post(
            f"{server.url}/apis/v2beta1/pipelines/upload_version",
            params={"name": "0.1.0", "pipelineid": pipeline},
            files={"uploadfile": package},
        )
    real = recorded(name)
    assert (answer.status_code, answer.headers["content-type"]) == (real["status"], real["content_type"])
    assert answer.json().keys() == real["body"].keys()
    assert answer.json()["error_message"] == real["body"]["error_message"]


def test_health_and_lists_have_the_real_fields(server) -> None:
    health = requests.get(f"{server.url}/apis/v2beta1/healthz").json()
    assert health == recorded("healthz")["body"]
    listed = requests.get(f"{server.url}/apis/v2beta1/pipelines").json()
    assert listed.keys() == recorded("pipelines-filter")["body"].keys()


def test_the_compiled_retries_outlast_what_a_stock_server_allows() -> None:
    """A stock controller retries errors only (`OnError`); limit and backoff are what a compiled pipeline can state."""
    stock = recorded("workflow-retry-strategies")
    assert stock["templateDefaults"]["retryStrategy"]["retryPolicy"] == "OnError"
    strategy = next(iter(stock["retryStrategies"].values()))
    assert strategy.keys() == {"backoff", "limit"}
    spec = next(yaml.load_all((COMPILED / "suite.yaml").read_text(), Loader=yaml.CSafeLoader))
    policies = [
        task["retryPolicy"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "retryPolicy" in task
    ]
    assert {p["backoffMaxDuration"] for p in policies} == {"1209600s"}
