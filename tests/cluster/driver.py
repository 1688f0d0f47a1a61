"""A compiled pipeline on a cluster without Kubeflow: walks the YAML, starts each step as the pod the YAML asks for.

What Kubeflow's controllers add is left out (cache, metadata, parallel tasks); what the YAML says is kept: image,
command, environment, Secrets, node selector, tolerations, volumes, user, conditions, loops, resources (parameters of
the run included), and retries by Argo's rules (retries.py).
"""

import json
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from feyntune.artifacts.store import Store
from tests.cluster.retries import FITTING, Attempt, deadline, next_start, strategy_of

LAUNCHER = Path(__file__).parent / "launcher.py"


class StepFailed(Exception):
    """A step's pod ended badly, after its retries. The message ends with its log."""


class Driver:
    """One run.

    Args:
        text: the compiled YAML, both documents.
        store: the bucket, as seen from here; artifacts go under `runs/ID/`.
        tolerate: taints that the steps without GPUs tolerate, for a cluster whose only node has GPUs.
        started: called with the task's name and its pod's when a pod runs.
        retry: the default retry strategy of the cluster's workflow controller.
    """

    def __init__(
        self,
        text: str,
        namespace: str,
        store: Store,
        tolerate: list[dict[str, str]],
        started: Callable[[str, str], None] | None = None,
        retry: dict[str, Any] = FITTING,
    ):
        self.spec, self.platform = yaml.safe_load_all(text)
        self.namespace, self.store, self.tolerate, self.started = namespace, store, tolerate, started
        self.retry = retry
        self.id = f"run-{secrets.token_hex(3)}"
        self.core = client.CoreV1Api()
        self.pods: dict[str, list[client.V1Pod]] = {}  # task -> its pods as they were created, retries included
        self.logs: dict[str, str] = {}

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Outputs of every step, by task name. Raises StepFailed."""
        parameters = self.spec["root"]["inputDefinitions"]["parameters"]
        unknown = arguments.keys() - parameters.keys()
        assert not unknown, f"the pipeline has no parameter {unknown}"
        given = {n: arguments.get(n, p.get("defaultValue")) for n, p in parameters.items()}
        return self._dag(self.spec["root"]["dag"], {"parameters": given, "artifacts": {}}, "")

    def _dag(self, dag: dict[str, Any], inputs: dict[str, Any], path: str) -> dict[str, Any]:
        done: dict[str, Any] = {}
        waiting = dict(dag["tasks"])
        while waiting:
            name = next(n for n, t in waiting.items() if not set(t.get("dependentTasks", [])) & waiting.keys())
            task = waiting.pop(name)
            resolved = self._inputs(task, inputs, done)
            condition = task.get("triggerPolicy", {}).get("condition")
            if condition and not _holds(condition, resolved["parameters"]):
                done[name] = {}
                continue
            component = self.spec["components"][task["componentRef"]["name"]]
            where = f"{path}/{name}".strip("/")
            if "parameterIterator" in task:
                loop = task["parameterIterator"]
                for i, item in enumerate(resolved["parameters"][loop["items"]["inputParameter"]]):
                    one = {**resolved, "parameters": {**resolved["parameters"], loop["itemInput"]: item}}
                    self._dag(component["dag"], one, f"{where}/{i}")
                done[name] = {}
            elif "dag" in component:
                done[name] = self._dag(component["dag"], resolved, where)
            else:
                done[name] = self._step(where, task, component, resolved)
        return done

    def _inputs(self, task: dict[str, Any], inputs: dict[str, Any], done: dict[str, Any]) -> dict[str, Any]:
        parameters, artifacts = {}, {}
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in source:
                parameters[name] = inputs["parameters"][source["componentInputParameter"]]
            elif "taskOutputParameter" in source:
                made = source["taskOutputParameter"]
                parameters[name] = done[made["producerTask"]]["parameters"][made["outputParameterKey"]]
            else:
                constant = source["runtimeValue"]["constant"]
                parameters[name] = self.id if constant == "{{$.pipeline_job_uuid}}" else constant
        for name, source in task.get("inputs", {}).get("artifacts", {}).items():
            if "componentInputArtifact" in source:
                artifacts[name] = inputs["artifacts"][source["componentInputArtifact"]]
            else:
                made = source["taskOutputArtifact"]
                artifacts[name] = done[made["producerTask"]]["artifacts"][made["outputArtifactKey"]]
        return {"parameters": parameters, "artifacts": artifacts}

    def _step(
        self, where: str, task: dict[str, Any], component: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        bucket = self.store.uri.removeprefix("s3://")
        place = f"runs/{self.id}/{where}"
        outputs = component.get("outputDefinitions", {})
        made = {
            name: {"name": name, "uri": f"s3://{bucket}/{place}/{name}", "type": a["artifactType"], "metadata": {}}
            for name, a in outputs.get("artifacts", {}).items()
        }
        executor_input = {
            "inputs": {
                "parameterValues": inputs["parameters"],
                "artifacts": {n: {"artifacts": [a]} for n, a in inputs["artifacts"].items()},
            },
            "outputs": {
                "parameters": {n: {"outputFile": f"/tmp/outputs/{n}"} for n in outputs.get("parameters", {})},
                "artifacts": {n: {"artifacts": [a]} for n, a in made.items()},
                "outputFile": "/tmp/outputs/result.json",
            },
        }
        executor = component["executorLabel"]
        container = self.spec["deploymentSpec"]["executors"][executor]["container"]
        container = {**container, "resources": resolved(container.get("resources", {}), inputs["parameters"])}
        given = json.dumps(executor_input)
        command = [part.replace("{{$}}", given) for part in [*container["command"], *container["args"]]]
        job = {"executor_input": executor_input, "command": command, "result": f"{bucket}/{place}/result.json"}
        extra = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].get(executor, {})
        if "accelerator" not in container.get("resources", {}):
            extra = {**extra, "tolerations": self.tolerate}
        strategy, attempts = strategy_of(task, self.retry), list[Attempt]()
        while True:
            name = f"{self.id}-{executor.removeprefix('exec-')}-{secrets.token_hex(2)}"
            begun, until = time.monotonic(), deadline(strategy, attempts)
            phase, how = self._pod(where, name, container, extra, job, until - begun)
            if phase == "Succeeded":
                break
            attempts.append(Attempt(begun, time.monotonic(), phase))
            message = f"{where}: attempt {len(attempts)} {how}\n{self.logs[where][-3000:]}"
            start, why = next_start(strategy, attempts)
            if why:
                raise StepFailed(f"{message}\n{why}")
            print(message, flush=True)
            time.sleep(max(0.0, start - time.monotonic()))
        result = json.loads(self.store.get(f"{place}/result.json"))
        return {"parameters": result.get("parameterValues", {}), "artifacts": made}

    def _pod(
        self,
        where: str,
        name: str,
        container: dict[str, Any],
        extra: dict[str, Any],
        job: dict[str, Any],
        seconds: float,
    ) -> tuple[str, str]:
        """Run one pod, for `seconds` at most; Argo's phase of it and how it ended."""
        data = {"task.json": json.dumps(job), "launcher.py": LAUNCHER.read_text()}
        meta = client.V1ObjectMeta(name=name)
        self.core.create_namespaced_config_map(self.namespace, client.V1ConfigMap(metadata=meta, data=data))
        body = pod_of(name, container, extra)
        if seconds < float("inf"):
            body["spec"]["activeDeadlineSeconds"] = max(1, int(seconds))
        pod = self.core.create_namespaced_pod(self.namespace, body)
        self.pods.setdefault(where, []).append(pod)
        reported = False
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            try:
                pod = self.core.read_namespaced_pod(name, self.namespace)
            except ApiException as e:
                if e.status != 404:
                    raise
                self.logs[where] = "(the log went with its pod)"
                return "Error", "ended: its pod was deleted"
            if pod.status.phase == "Running" and not reported and self.started:
                reported = True
                self.started(where, name)
            if pod.status.phase in ("Succeeded", "Failed"):
                self.logs[where] = self._log(pod)
                if pod.metadata.deletion_timestamp:
                    return "Error", "ended: its pod was deleted"
                if pod.status.phase == "Succeeded":
                    return "Succeeded", ""
                ended = (pod.status.container_statuses or [None])[0]  # an evicted pod has none
                code = ended.state.terminated.exit_code if ended and ended.state.terminated else pod.status.reason
                return "Failed", f"ended with {code}"
            time.sleep(0.5)
        events = self.core.list_namespaced_event(self.namespace, field_selector=f"involvedObject.name={name}").items
        raise StepFailed(f"{where}: pod {name} did not end: {[e.message for e in events]}")

    def _log(self, pod: Any) -> str:
        """What the ended pod said. A log may be gone before its pod is, where somebody deletes it."""
        try:
            return str(self.core.read_namespaced_pod_log(pod.metadata.name, self.namespace))
        except ApiException as e:
            if pod.metadata.deletion_timestamp:
                return f"(the log went with its pod: {e.reason})"
            raise


def pod_of(name: str, container: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The pod of a step, as Kubeflow Pipelines 2.17 makes it in a restricted namespace."""
    env: list[dict[str, Any]] = list(container.get("env", []))
    for secret in extra.get("secretAsEnv", []):
        for pair in secret["keyToEnv"]:
            source = {"name": secret["secretName"], "key": pair["secretKey"], "optional": secret.get("optional", False)}
            env.append({"name": pair["envVar"], "valueFrom": {"secretKeyRef": source}})
    asked = container.get("resources", {})
    resources: dict[str, dict[str, str]] = {"requests": {}, "limits": {}}
    for kind in ("cpu", "memory"):
        for bound in ("request", "limit"):
            value = asked.get(f"resource{kind.title()}{bound.title()}")
            if value:
                resources[f"{bound}s"][kind] = value
    if asked.get("accelerator", {}).get("resourceCount"):
        resources["limits"][asked["accelerator"]["resourceType"]] = asked["accelerator"]["resourceCount"]
    volumes: list[dict[str, Any]] = [
        {"name": "driver", "configMap": {"name": name}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "s3", "emptyDir": {}},
    ]
    mounts = [{"name": n, "mountPath": p} for n, p in (("driver", "/driver"), ("tmp", "/tmp"), ("s3", "/s3"))]
    for mount in extra.get("emptyDirMounts", []):
        source = {"medium": mount["medium"], "sizeLimit": mount["sizeLimit"]}
        volumes.append({"name": mount["volumeName"], "emptyDir": source})
        mounts.append({"name": mount["volumeName"], "mountPath": mount["mountPath"]})
    user, own = extra["securityContext"], extra.get("podMetadata", {})
    return {
        "metadata": {"name": name, "labels": {"pipelines.kubeflow.org/v2_component": "true", **own.get("labels", {})}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "nodeSelector": extra.get("nodeSelector", {}).get("labels", {}),
            "tolerations": extra.get("tolerations", []),
            "securityContext": {"fsGroup": int(user["runAsGroup"]), "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": 60,
            "containers": [
                {
                    "name": "main",
                    "image": container["image"],
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "/driver/launcher.py"],
                    "env": env,
                    "resources": resources,
                    "securityContext": {
                        "runAsUser": int(user["runAsUser"]),
                        "runAsGroup": int(user["runAsGroup"]),
                        "runAsNonRoot": user["runAsNonRoot"],
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        },
    }


def resolved(asked: Any, parameters: dict[str, Any]) -> Any:
    """A pod's resources with the run's parameters in them, as Kubeflow's driver resolves them.

    It takes texts only: a number becomes "" there, with which a pod gets no GPUs and memory cannot be read.
    """
    if isinstance(asked, dict):
        return {name: resolved(value, parameters) for name, value in asked.items()}
    placeholder = re.fullmatch(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}", asked) if isinstance(asked, str) else None
    if placeholder is None:
        return asked
    value = parameters[placeholder[1]]
    return value if isinstance(value, str) else ""


def _holds(condition: str, parameters: dict[str, Any]) -> bool:
    """A condition in the form the compiler writes: `inputs.parameter_values['x'] == 'y'`."""

    class Inputs:
        parameter_values = parameters

    return bool(
        eval(condition.replace("&&", " and ").replace("||", " or ").replace("true", "True"), {"inputs": Inputs})
    )
