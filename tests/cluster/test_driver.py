"""The stand-in for Kubeflow's controllers: retries as the recorded controller makes them, resources of a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from feyntune.artifacts.store import open_store
from feyntune.kubeflow.adapt import COMPILED
from feyntune.kubeflow.preflight import pod_resources
from tests.cluster import driver as module
from tests.cluster.driver import Driver, StepFailed, pod_of, resolved
from tests.cluster.retries import FITTING, STOCK, Attempt, deadline, next_start, strategy_of

RECORDED = Path(__file__).parents[1] / "recorded" / "kubeflow-2.17.0" / "workflow-retry-strategies.json"
HOUR = 3600.0
TRAINING = {"maxRetryCount": 5, "backoffDuration": "30s", "backoffFactor": 2.0, "backoffMaxDuration": "1209600s"}


def task(**changed):
    return {"retryPolicy": TRAINING | changed}


def test_the_stock_default_is_the_recorded_controllers():
    assert json.loads(RECORDED.read_text())["templateDefaults"]["retryStrategy"] == STOCK


@pytest.mark.parametrize(
    ("policy", "default", "phases", "starts"),
    [
        # Seen on 2.17.0: a training killed by SIGKILL ended its run although the step asks for five retries;
        (task(), STOCK, ["Failed"], "Node not set to be retried after status: Failed"),
        # with `Always`, SIGKILL and then a deleted pod were both followed by another attempt.
        (task(), FITTING, ["Failed", "Error"], 2 * HOUR + 60),
        (task(), STOCK, ["Error"], HOUR + 30),
        (task(), FITTING, ["Failed"] * 6, "No more retries left"),
        # A step or a driver without a policy of its own has the controller's: a driver that runs twice ends the run.
        ({}, STOCK, ["Error"], HOUR),
        ({}, STOCK, ["Error"] * 3, "No more retries left"),
        ({}, STOCK | {"retryPolicy": "Always"}, ["Failed"], HOUR),
        ({}, FITTING, ["Error"], "No more retries left"),
        # The SDK's default of an hour counts from the start of the first attempt.
        (task(backoffMaxDuration="3600s"), FITTING, ["Failed"], "Max duration limit exceeded"),
        (task(backoffMaxDuration="3629s"), FITTING, ["Failed"], "Max duration limit exceeded"),
        (task(backoffMaxDuration="3630s"), FITTING, ["Failed"], HOUR + 30),
    ],
)
def test_a_step_is_started_again_as_argo_does(policy, default, phases, starts):
    attempts = [Attempt(i * HOUR, (i + 1) * HOUR, phase) for i, phase in enumerate(phases)]
    start, why = next_start(strategy_of(policy, default), attempts)
    assert starts == (why or start)


def test_a_retrys_pod_is_ended_when_the_time_of_the_first_attempt_is_up():
    strategy = strategy_of(task(backoffMaxDuration="3600s"), FITTING)
    assert deadline(strategy, []) == float("inf")
    assert deadline(strategy, [Attempt(100.0, 200.0, "Failed")]) == 3700.0


class Cluster:
    """In the place of the API server: pods that end as told, on a clock of its own."""

    def __init__(self, store, ends):
        self.store, self.ends, self.now, self.bodies = store, list(ends), 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def create_namespaced_config_map(self, namespace, body):
        self.job = json.loads(body.data["task.json"])

    def create_namespaced_pod(self, namespace, body):
        self.bodies.append(body)
        return body

    def read_namespaced_pod(self, name, namespace):
        how, seconds = self.ends.pop(0)
        self.now += seconds
        if how == "gone":
            raise module.ApiException(status=404, reason="Not Found")
        if how == 0:
            self.store.put("runs/" + self.job["result"].partition("/runs/")[2], b"{}")
        state = SimpleNamespace(terminated=SimpleNamespace(exit_code=how))
        status = {"phase": "Failed" if how else "Succeeded", "container_statuses": [SimpleNamespace(state=state)]}
        metadata = SimpleNamespace(name=name, deletion_timestamp=None)
        return SimpleNamespace(metadata=metadata, status=SimpleNamespace(**status))

    def read_namespaced_pod_log(self, name, namespace):
        return "the step's log"


def start(monkeypatch, store, ends, retry=FITTING, **changed):
    """One run of one step with a policy; the pods that were made, and the hours it took."""
    cluster = Cluster(store, ends)
    monkeypatch.setattr(module.client, "CoreV1Api", lambda: cluster)
    monkeypatch.setattr(module, "time", cluster)
    user = {"runAsUser": "1", "runAsGroup": "1", "runAsNonRoot": True}
    container = {"image": "i", "command": ["c"], "args": []}
    component = {"executorLabel": "exec-a"}
    step = {"componentRef": {"name": "comp-a"}, **task(**changed)}
    spec = {
        "root": {"dag": {"tasks": {"a": step}}, "inputDefinitions": {"parameters": {}}},
        "components": {"comp-a": component},
        "deploymentSpec": {"executors": {"exec-a": {"container": container}}},
    }
    steps = {"exec-a": {"securityContext": user}}
    platform = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": steps}}}}
    run = Driver(yaml.safe_dump_all([spec, platform]), "n", store, [], retry=retry)
    run.run({})
    return cluster


def test_a_killed_pod_and_a_killed_process_are_both_started_again(monkeypatch, tmp_path):
    ends = [(137, HOUR), ("gone", HOUR), (0, HOUR)]
    cluster = start(monkeypatch, open_store(str(tmp_path)), ends)
    assert len(cluster.bodies) == 3
    assert cluster.now == 3 * HOUR + 30 + 60


def test_after_an_hour_there_is_no_retry_and_a_running_one_is_ended(monkeypatch, tmp_path):
    store, short = open_store(str(tmp_path)), {"backoffMaxDuration": "3600s"}
    with pytest.raises(StepFailed, match="Max duration limit exceeded"):
        start(monkeypatch, store, [(1, 1.5 * HOUR)], **short)
    cluster = start(monkeypatch, store, [(1, 3000.0), (0, 100.0)], **short)
    first, second = [body["spec"].get("activeDeadlineSeconds") for body in cluster.bodies]
    assert (first, second) == (None, 570)  # what is left of the hour after 3000 s and the wait of 30 s


def test_on_a_stock_cluster_a_step_that_failed_ends_the_run(monkeypatch, tmp_path):
    with pytest.raises(StepFailed, match="Node not set to be retried"):
        start(monkeypatch, open_store(str(tmp_path)), [(137, HOUR)], retry=STOCK)


@pytest.mark.parametrize("name", ["suite", "variant"])
def test_a_training_pod_gets_what_the_run_asks_for(name):
    spec, platform = yaml.safe_load_all((COMPILED / f"{name}.yaml").read_text())
    container = spec["deploymentSpec"]["executors"]["exec-train"]["container"]
    extra = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    given = dict(zip(("gpus", "cpus", "memory", "memory_limit"), pod_resources(2), strict=True))
    parameters = {f"pipelinechannel--{key}": value for key, value in given.items()}
    asked = {**container, "resources": resolved(container["resources"], parameters)}
    (made,) = pod_of("p", asked, extra)["spec"]["containers"]
    assert made["resources"] == {
        "requests": {"cpu": "12", "memory": "48Gi"},
        "limits": {"nvidia.com/gpu": "2", "memory": "128Gi"},
    }
    # Kubeflow's driver reads a number as "", which would be a pod without GPUs.
    parameters["pipelinechannel--gpus"] = 2
    asked = {**container, "resources": resolved(container["resources"], parameters)}
    assert "nvidia.com/gpu" not in pod_of("p", asked, extra)["spec"]["containers"][0]["resources"]["limits"]
