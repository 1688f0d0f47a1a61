"""Deploy the registry's adapters to KServe: render, apply, check that the new pods answer; roll back otherwise.

InferenceService      our predictor (CPU or one GPU), which follows the registry by itself
LLMInferenceService   vLLM, every adapter listed: deploy again after a promotion
"""

import json
import time
from collections.abc import Callable
from typing import Any

import urllib3
from pydantic import SecretStr

from feyntune.constants import VERSION_HEADER
from feyntune.deployment.cluster import Cluster, connect, reason
from feyntune.deployment.render import expected_models, render
from feyntune.deployment.spec import ServingSpec, parse_spec, serving_of_run
from feyntune.errors import UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.names import BASE
from feyntune.registry.models import Deployment
from feyntune.registry.registry import Registry
from feyntune.telemetry import log

__all__ = ["DeployError", "ServingSpec", "deploy", "parse_spec", "serving_of_run"]


class DeployError(UserError):
    """The deployment failed and was rolled back."""


def deploy(
    spec: ServingSpec,
    url: str | None = None,
    key: SecretStr | None = None,
    timeout: float = 1800,
    poll: float = 5,
    client: Any = None,
) -> Deployment:
    """Apply `spec`, wait until its new pods are ready, and send one completion through every adapter of the registry.

    When any of this fails the objects are restored (or deleted, where there were none). A deployment that answers is
    recorded in the registry, the end of the lineage.

    Args:
        url: where this machine reaches the endpoint; None takes the address the service reports.
        key: a bearer key, where the endpoint asks for one.
        timeout: seconds until it must be ready and list the registry's adapters (the base is loaded in them).
        client: a `kubernetes.client.ApiClient`; None takes the pod's service account, else KUBECONFIG.

    Raises:
        DeployError: it did not come to answer; says why, and whether it could be rolled back.
        UserError: the cluster cannot be reached or lacks what the description needs, an adapter does not fit the
            base, or the endpoint will ask for a key and none is given; nothing was changed.
    """
    if spec.keys_secret is not None and key is None:
        raise UserError("keys_secret: the endpoint will ask for a key: give one of its keys with --key-file.")
    from kubernetes.client.exceptions import ApiException

    registry = Registry.open(spec.registry)
    state = registry.snapshot()
    desired = render(spec, state, base_digest(spec) if state.served else None)
    cluster = Cluster(client or connect(), spec)
    deadline = time.monotonic() + timeout
    try:
        cluster.check_prerequisites()
        before = cluster.get(desired)
        cluster.prepare()
    except (ApiException, urllib3.exceptions.HTTPError) as e:
        raise UserError(f"The cluster refused: {reason(e)}. Nothing was deployed.") from e
    try:
        cluster.apply(desired, before)
        answered = _until(
            lambda: cluster.ready(desired), deadline, poll, f"{spec.kind} {spec.name} to be ready", cluster.explain
        )
        endpoint = _Endpoint((url or answered).rstrip("/"), spec, key)
        models = expected_models(spec, state)
        _until(lambda: endpoint.lists(models), deadline, poll, "the endpoint to list the registry's adapters")
        for model in [endpoint.base, *sorted(models)]:
            version = endpoint.complete(model)
            log.info("%s answers%s", model, f" (feyntune {version})" if version else "")
    except BaseException as e:  # an interrupted deployment is rolled back too
        undone = cluster.roll_back(desired, before)
        if not isinstance(e, Exception):
            raise
        raise DeployError(f"Deployment of {spec.namespace}/{spec.name} failed: {reason(e)}. {undone}") from e
    versions = sorted(set(models.values()))
    done = Deployment(service=f"{spec.namespace}/{spec.name}", url=endpoint.url, versions=versions)
    registry.record_deployment(done)
    return done


def base_digest(spec: ServingSpec) -> str | None:
    """What identifies the description's base: a stored base's content, a hub model's commit.

    None, with a warning, where the hub cannot be asked for a base that is not pinned.

    Raises:
        UserError: a stored base does not exist, or is not the one pinned.
    """
    base = spec.base.removeprefix("hf://")
    location, pinned = split_pin(base)
    if pinned and not location.startswith("s3://"):
        return pinned
    try:
        return split_pin(pin_base(base))[1]
    except UserError:
        if location.startswith("s3://"):
            raise
        log.warning("the hub does not say which %s is the newest: adapters are not compared with it", location)
        return None


class _Endpoint:
    """The served models, asked as a client would."""

    def __init__(self, url: str, spec: ServingSpec, key: SecretStr | None):
        self.url, self.spec, self.base = url, spec, BASE
        self.api = f"{url}/openai/v1" if spec.kind == "InferenceService" else f"{url}/v1"
        self.headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self.http = urllib3.PoolManager(timeout=60, retries=urllib3.Retry(3, backoff_factor=0.5))

    def lists(self, expected: dict[str, str]) -> bool:
        """Whether the endpoint lists the base and exactly these adapters, each in the version meant.

        KServe gives every model of vLLM a second name, `publishers/NAMESPACE/models/NAME`, which counts for nothing.
        """
        answer = self.http.request("GET", f"{self.api}/models", headers=self.headers)
        if answer.status == 401:
            raise DeployError("the endpoint refuses the key, or none was given (401)")
        if answer.status != 200:
            return False
        listed = {m["id"]: m.get("root") for m in answer.json()["data"]}
        if self.spec.kind == "LLMInferenceService":  # vLLM's root is a path in its pod
            return {name for name in listed if not name.startswith("publishers/")} == {self.base, *expected}
        return listed.pop(self.base, None) is not None and listed == expected

    def complete(self, model: str) -> str:
        """Send one short completion; returns the feyntune version that answered, "" where it does not say.

        Raises:
            DeployError: the answer is an error, or no completion.
        """
        request = {"model": model, "prompt": "We study", "max_tokens": 4, "temperature": 0}
        headers = {**self.headers, "Content-Type": "application/json"}
        answer = self.http.request("POST", f"{self.api}/completions", body=json.dumps(request), headers=headers)
        if answer.status != 200:
            raise DeployError(f"{model} answered {answer.status}: {answer.data[:200].decode(errors='replace')}")
        if not isinstance(answer.json()["choices"][0]["text"], str):
            raise DeployError(f"{model} answered without a text")
        return str(answer.headers.get(VERSION_HEADER, ""))


def _until(
    ask: Callable[[], Any], deadline: float, poll: float, what: str, explain: Callable[[], str] | None = None
) -> Any:
    """Ask until the answer is true; server errors and refused connections in between are waited out.

    Args:
        explain: why it is not true yet; logged whenever it changes, and part of the error.
    """
    from kubernetes.client.exceptions import ApiException

    last = explained = ""
    while True:
        try:
            if answer := ask():
                return answer
            last = ""
            if explain is not None and (why := explain()) != explained:
                explained = why
                log.info("waiting for %s: %s", what, why)
        except (ApiException, urllib3.exceptions.HTTPError) as e:
            if isinstance(e, ApiException) and 0 < e.status < 500:
                raise
            last = f" (last error: {reason(e)})"
        if time.monotonic() + poll > deadline:
            raise DeployError(f"timed out waiting for {what}{last}{f': {explained}' if explained else ''}")
        time.sleep(poll)
