"""The registry's adapters on a cluster: one serving description, rendered for KServe, applied, and proved to answer.

    InferenceService + ServingRuntime   our predictor (CPU or one GPU), which follows the registry by itself
    LLMInferenceService                 vLLM, every adapter listed: deploy again after a promotion

What is applied answers for every adapter or is taken back.
"""

import json
import time
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

import urllib3
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from feyntune.errors import UserError
from feyntune.names import BASE, slug
from feyntune.registry.models import Deployment, State
from feyntune.registry.registry import Registry
from feyntune.telemetry import log

GROUP = "serving.kserve.io"
USER = 65532  # the images' numeric user
_PLURALS = {
    "ServingRuntime": ("v1alpha1", "servingruntimes"),
    "InferenceService": ("v1beta1", "inferenceservices"),
    "LLMInferenceService": ("v1alpha2", "llminferenceservices"),
}
_LABEL = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": USER,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
_RESTRICTED_POD = {k: _RESTRICTED[k] for k in ("runAsNonRoot", "runAsUser", "seccompProfile")} | {"fsGroup": USER}
_WAIT = {"_request_timeout": 30}  # seconds; the Kubernetes client waits for ever by itself

Object = dict[str, Any]


class DeployError(UserError):
    """The deployment did not come to answer, and was taken back."""


class ServingSpec(BaseModel):
    """What is to be served and with what. Secrets are named, never contained.

    Attributes:
        kind: see the module's text.
        base: `s3://` folder, or a hub id (`hf://` for vLLM), with or without `@digest`.
        image: of the predictor (InferenceService) or of vLLM (None: KServe's own).
        gpus: of one replica; the predictor uses at most one.
        max_rank, max_adapters: largest LoRA rank, and adapters in memory at once; always stated, since the
            defaults of KServe and vLLM differ.
        max_cpu_adapters: vLLM only: adapters kept in host memory.
        s3_secret: Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
        keys_secret: Secret whose entry `keys` holds the endpoint's bearer keys; None: no key is asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("abstracts", pattern=_LABEL)
    namespace: str = Field(pattern=_LABEL)
    kind: Literal["InferenceService", "LLMInferenceService"] = "InferenceService"
    base: str
    registry: str
    image: str | None = None
    gpus: int = Field(0, ge=0, le=8)
    replicas: int = Field(1, ge=1, le=64)
    cpu: str = "2"
    memory: str = "16Gi"
    scratch: str = "40Gi"
    precision: Literal["bf16", "fp32", "nf4"] = "bf16"
    max_rank: Literal[8, 16, 32, 64, 128] = 16
    max_adapters: int = Field(40, ge=1, le=128)
    max_cpu_adapters: int = Field(48, ge=1)
    s3_endpoint: str
    s3_region: str = "us-east-1"
    s3_secret: str = Field("feyntune-s3", pattern=_LABEL)
    service_account: str = Field("feyntune-serving", pattern=_LABEL)
    keys_secret: str | None = Field(None, pattern=_LABEL)
    node_selector: dict[str, str] = {}
    tolerations: list[dict[str, str]] = []

    @field_validator("registry")
    @classmethod
    def _in_s3(cls, value: str) -> str:
        if not value.startswith("s3://"):
            raise ValueError("pods reach the registry only in S3: give an s3:// address")
        return value.rstrip("/")

    @field_validator("s3_endpoint")
    @classmethod
    def _url_without_keys(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError("must be an http(s) URL without a user or password")
        return value

    @model_validator(mode="after")
    def _fits_kind(self) -> "ServingSpec":
        if self.kind == "LLMInferenceService":
            if not self.base.startswith(("s3://", "hf://")):
                raise ValueError("base: vLLM takes it from s3:// or hf://")
            if self.gpus < 1:
                raise ValueError("gpus: vLLM needs at least one")
            if self.max_cpu_adapters < self.max_adapters:
                raise ValueError("max_cpu_adapters: must be at least max_adapters")
            if self.keys_secret is not None:
                raise ValueError("keys_secret: vLLM's keys are the gateway's business, leave it out")
        elif self.gpus > 1 or self.image is None:
            raise ValueError("gpus, image: the predictor uses at most one GPU, and its image must be given")
        return self


def parse_spec(value: dict[str, Any]) -> ServingSpec:
    """A serving description from a file or the command line.

    Raises:
        UserError: a field is unknown, missing or impossible (named).
    """
    try:
        return ServingSpec.model_validate(value)
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(p) for p in error["loc"]) or "the description"
        raise UserError(f"Serving description: {where}: {error['msg']}.") from e


def serving_of_run(serving: dict[str, Any], base: str, registry: str) -> ServingSpec:
    """The description a pipeline run was given, with the run's own base and registry.

    Raises:
        UserError: a field is unknown, missing or impossible, names another registry than the run's, or asks for keys,
            which no step of a run holds.
    """
    if serving.get("registry", registry) != registry:
        raise UserError(f"Serving description: registry: leave it out, or give the run's own, {registry}.")
    spec = parse_spec({"base": base, **serving, "registry": registry})
    if spec.keys_secret is not None:
        raise UserError(
            "Serving description: keys_secret: a run holds no key to try the endpoint with: leave it out, and deploy "
            "with `feyntune deploy --key-file`."
        )
    return spec


def render(spec: ServingSpec, state: State) -> list[Object]:
    """The custom objects to apply, in order. The same description and registry give the same objects.

    Raises:
        UserError: an adapter exceeds the description's limits, or there is none for vLLM to serve.
    """
    large = [v.name for v in state.served if v.rank > spec.max_rank]
    if large:
        raise UserError(f"{large[0]} has a rank above max_rank {spec.max_rank}: raise it, or archive the version.")
    if spec.kind == "LLMInferenceService":
        return [_llm_inference_service(spec, state)]
    return [_serving_runtime(spec), _inference_service(spec)]


def secret_annotations(spec: ServingSpec) -> dict[str, str]:
    """What KServe's storage initialiser reads beside the keys, to be put on the Secret `s3_secret`."""
    url = urlsplit(spec.s3_endpoint)
    return {
        f"{GROUP}/s3-endpoint": url.netloc,
        f"{GROUP}/s3-usehttps": "1" if url.scheme == "https" else "0",
        f"{GROUP}/s3-region": spec.s3_region,
        f"{GROUP}/s3-verifyssl": "1" if url.scheme == "https" else "0",
    }


def service_account(spec: ServingSpec) -> Object:
    """The ServiceAccount the pods run under, with the Secret attached as KServe wants it."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": spec.service_account, "namespace": spec.namespace, "labels": _labels(spec)},
        "secrets": [{"name": spec.s3_secret}],
        "automountServiceAccountToken": False,
    }


def expected_models(spec: ServingSpec, state: State) -> dict[str, str]:
    """Model name to version name, as the endpoint must list them (the base apart)."""
    names = {slug(v.variant): state.resolve(v.variant).name for v in state.served}
    if spec.kind == "InferenceService":
        names |= {slug(alias): name for alias, name in state.aliases.items()}
    return names


def deploy(
    spec: ServingSpec,
    url: str | None = None,
    key: SecretStr | None = None,
    timeout: float = 1800,
    poll: float = 5,
    client: Any = None,
) -> Deployment:
    """Apply `spec`, wait until it is ready, and send one completion through every adapter of the registry.

    When anything of this fails the objects are put back as they were (or deleted, where there were none). A
    deployment that answers is recorded in the registry, the end of the lineage.

    Args:
        url: where this machine reaches the endpoint; None takes the address the service reports.
        key: a bearer key, where the endpoint asks for one.
        timeout: seconds until it must be ready and list the registry's adapters (the base is loaded in them).
        client: a `kubernetes.client.ApiClient`; None takes the pod's service account, else KUBECONFIG.

    Raises:
        DeployError: it did not come to answer; says why, and whether it could be put back.
        UserError: the cluster cannot be reached, the Secret is not there, or the endpoint will ask for a key and none
            is given; nothing was changed.
    """
    if spec.keys_secret is not None and key is None:
        raise UserError("keys_secret: the endpoint will ask for a key: give one of its keys with --key-file.")
    from kubernetes.client.exceptions import ApiException

    registry = Registry.open(spec.registry)
    state = registry.snapshot()
    objects = render(spec, state)
    cluster = _Cluster(client or _client(), spec)
    deadline = time.monotonic() + timeout
    try:
        before = [cluster.get(o) for o in objects]
        cluster.prepare()
    except (ApiException, urllib3.exceptions.HTTPError) as e:
        raise UserError(f"The cluster refused: {_reason(e)}. Nothing was deployed.") from e
    try:
        for there, wanted in zip(before, objects, strict=True):
            cluster.apply(wanted, there)
        answered = _until(lambda: cluster.ready(objects[-1]), deadline, poll, f"{spec.kind} {spec.name} to be ready")
        endpoint = _Endpoint((url or answered).rstrip("/"), spec, key)
        wanted_models = expected_models(spec, state)
        _until(lambda: endpoint.lists(wanted_models), deadline, poll, "the endpoint to list the registry's adapters")
        for model in [endpoint.base, *sorted(wanted_models)]:
            endpoint.complete(model)
            log.info("%s answers", model)
    except BaseException as e:  # an interrupted deployment is put back too
        undone = cluster.put_back(objects, before)
        if not isinstance(e, Exception):
            raise
        raise DeployError(f"Deployment of {spec.namespace}/{spec.name} failed: {_reason(e)}. {undone}") from e
    versions = sorted(set(wanted_models.values()))
    done = Deployment(service=f"{spec.namespace}/{spec.name}", url=endpoint.url, versions=versions)
    registry.record_deployment(done)
    return done


def _serving_runtime(spec: ServingSpec) -> Object:
    args = [
        "serve",
        f"--base={spec.base}",
        f"--registry={spec.registry}",
        "--host=0.0.0.0",
        "--port=8080",
        "--grpc-port=8081",
        f"--precision={spec.precision}",
        f"--max-adapters={spec.max_adapters}",
        f"--max-rank={spec.max_rank}",
        "--drain-seconds=60",
        "--linger-seconds=10",
    ]
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}]
    volumes: list[Object] = [{"name": "tmp", "emptyDir": {"sizeLimit": spec.scratch}}]
    if spec.keys_secret:
        args.append("--keys-file=/etc/feyntune/keys/keys")
        mounts.append({"name": "keys", "mountPath": "/etc/feyntune/keys", "readOnly": True})
        volumes.append({"name": "keys", "secret": {"secretName": spec.keys_secret}})
    probe = lambda path: {"httpGet": {"path": f"/v2/health/{path}", "port": 8080}}
    container = {
        "name": "kserve-container",
        "image": spec.image,
        "args": args,
        "env": [
            {"name": "S3_ENDPOINT", "value": spec.s3_endpoint},
            {"name": "AWS_DEFAULT_REGION", "value": spec.s3_region},
            _from_secret("AWS_ACCESS_KEY_ID", spec.s3_secret),
            _from_secret("AWS_SECRET_ACCESS_KEY", spec.s3_secret),
            _from_secret("HF_TOKEN", "feyntune-hub", optional=True),
        ],
        "ports": [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}],
        "startupProbe": probe("ready") | {"periodSeconds": 5, "failureThreshold": 360},
        "readinessProbe": probe("ready") | {"periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": probe("live") | {"periodSeconds": 20, "timeoutSeconds": 5, "failureThreshold": 6},
        "resources": _resources(spec),
        "securityContext": _RESTRICTED,
        "volumeMounts": mounts,
    }
    return {
        "apiVersion": f"{GROUP}/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": _metadata(spec),
        "spec": {
            "supportedModelFormats": [{"name": "feyntune", "version": "1", "autoSelect": True}],
            "protocolVersions": ["v1", "v2"],
            "containers": [container],
            "volumes": volumes,
        },
    }


def _inference_service(spec: ServingSpec) -> Object:
    metadata = _metadata(spec)
    metadata["annotations"] = {f"{GROUP}/deploymentMode": "Standard"}
    predictor = {
        "minReplicas": spec.replicas,
        "maxReplicas": spec.replicas,
        "serviceAccountName": spec.service_account,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 90,
        "securityContext": _RESTRICTED_POD,
        **_placement(spec),
        "model": {
            "modelFormat": {"name": "feyntune", "version": "1"},
            "runtime": spec.name,
            "protocolVersion": "v2",
        },
    }
    return {
        "apiVersion": f"{GROUP}/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": predictor},
    }


def _llm_inference_service(spec: ServingSpec, state: State) -> Object:
    versions = {slug(v.variant): state.resolve(v.variant) for v in state.served}
    if not versions:
        raise UserError(f"{spec.registry} has no adapter to serve yet: register one first.")
    adapters = [{"name": n, "uri": f"{spec.registry}/{versions[n].adapter}"} for n in sorted(versions)]
    container = {
        "name": "main",
        **({"image": spec.image} if spec.image else {}),
        "resources": _resources(spec),
        "securityContext": _RESTRICTED,
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "HF_HUB_OFFLINE", "value": "1"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "apiVersion": f"{GROUP}/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": _metadata(spec),
        "spec": {
            "model": {
                "uri": spec.base.partition("@")[0],
                "name": BASE,
                "lora": {
                    "maxRank": spec.max_rank,
                    "maxAdapters": min(spec.max_adapters, len(adapters)),
                    "maxCpuAdapters": max(spec.max_cpu_adapters, len(adapters)),
                    "adapters": adapters,
                },
            },
            "replicas": spec.replicas,
            "router": {"gateway": {}, "route": {}, "scheduler": {}},
            "template": {
                "serviceAccountName": spec.service_account,
                "automountServiceAccountToken": False,
                "securityContext": _RESTRICTED_POD,
                **_placement(spec),
                "containers": [container],
                "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": spec.scratch}}],
            },
        },
    }


def _metadata(spec: ServingSpec) -> Object:
    return {"name": spec.name, "namespace": spec.namespace, "labels": _labels(spec)}


def _labels(spec: ServingSpec) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "feyntune",
        "app.kubernetes.io/component": "serving",
        "app.kubernetes.io/instance": spec.name,
        "app.kubernetes.io/managed-by": "feyntune",
    }


def _placement(spec: ServingSpec) -> Object:
    placed: Object = {}
    if spec.node_selector:
        placed["nodeSelector"] = dict(sorted(spec.node_selector.items()))
    if spec.tolerations:
        placed["tolerations"] = spec.tolerations
    return placed


def _resources(spec: ServingSpec) -> Object:
    gpus = {"nvidia.com/gpu": str(spec.gpus)} if spec.gpus else {}
    return {"requests": {"cpu": spec.cpu, "memory": spec.memory, **gpus}, "limits": {"memory": spec.memory, **gpus}}


def _from_secret(name: str, secret: str, **more: bool) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name, **more}}}


def _client() -> Any:
    from kubernetes import client, config

    try:
        config.load_config()
    except config.ConfigException as e:
        raise UserError(f"No cluster is configured ({e}): set KUBECONFIG, or run this in a pod.") from e
    return client.ApiClient()


class _Cluster:
    """The few things asked of the Kubernetes API, for the objects of one description."""

    def __init__(self, client: Any, spec: ServingSpec):
        from kubernetes.client import CoreV1Api, CustomObjectsApi

        self.spec, self.core, self.custom = spec, CoreV1Api(client), CustomObjectsApi(client)

    def prepare(self) -> None:
        """Annotate the Secret (its values are neither read nor written), make or complete the ServiceAccount."""
        from kubernetes.client.exceptions import ApiException

        spec, account = self.spec, service_account(self.spec)
        self.core.patch_namespaced_secret(
            spec.s3_secret, spec.namespace, {"metadata": {"annotations": secret_annotations(spec)}}, **_WAIT
        )
        try:
            self.core.create_namespaced_service_account(spec.namespace, account, **_WAIT)
        except ApiException as e:
            if e.status != 409:
                raise
            self.core.patch_namespaced_service_account(
                spec.service_account, spec.namespace, {"secrets": account["secrets"]}, **_WAIT
            )

    def get(self, wanted: Object) -> Object | None:
        from kubernetes.client.exceptions import ApiException

        try:
            return dict(self.custom.get_namespaced_custom_object(*self._path(wanted), _name(wanted), **_WAIT))
        except ApiException as e:
            if e.status == 404:
                return None
            raise

    def apply(self, wanted: Object, there: Object | None) -> None:
        """Create `wanted`, or replace `there`; a change by somebody else in between is a conflict and an error."""
        if there is None:
            self.custom.create_namespaced_custom_object(*self._path(wanted), wanted, **_WAIT)
            return
        metadata = {**wanted["metadata"], "resourceVersion": there["metadata"]["resourceVersion"]}
        kept = {"annotations": {**there["metadata"].get("annotations", {}), **metadata.get("annotations", {})}}
        body = {**wanted, "metadata": {**metadata, **kept}}
        self.custom.replace_namespaced_custom_object(*self._path(wanted), _name(wanted), body, **_WAIT)

    def ready(self, wanted: Object) -> str | None:
        """The service's URL once the controller has seen the newest spec and reports Ready."""
        found = self.get(wanted) or {}
        status = found.get("status", {})
        if status.get("observedGeneration", 0) < found.get("metadata", {}).get("generation", 0):
            return None
        conditions = {c["type"]: c for c in status.get("conditions", [])}
        if conditions.get("Ready", {}).get("status") != "True":
            return None
        # In the cluster first: `url` is an outside name, which only an ingress makes reachable.
        return status.get("address", {}).get("url") or status.get("url")

    def put_back(self, objects: list[Object], before: list[Object | None]) -> str:
        """Restore what was there; says in a sentence how far that went."""
        from kubernetes.client.exceptions import ApiException

        left = []
        for wanted, there in reversed(list(zip(objects, before, strict=True))):
            try:
                now = self.get(wanted)
                if there is None and now is not None:
                    self.custom.delete_namespaced_custom_object(*self._path(wanted), _name(wanted), **_WAIT)
                elif there is not None and (now is None or now["spec"] != there["spec"]):
                    self.apply(_as_applied(there), now)
            except (ApiException, urllib3.exceptions.HTTPError) as e:
                left.append(f"{wanted['kind']} {wanted['metadata']['name']} ({_reason(e)})")
        return f"Could not be put back: {', '.join(left)}." if left else "Everything is as it was before."

    def _path(self, wanted: Object) -> tuple[str, str, str, str]:
        version, plural = _PLURALS[wanted["kind"]]
        return GROUP, version, self.spec.namespace, plural


class _Endpoint:
    """The served models, asked as a client would."""

    def __init__(self, url: str, spec: ServingSpec, key: SecretStr | None):
        self.url, self.spec, self.base = url, spec, BASE
        self.api = f"{url}/openai/v1" if spec.kind == "InferenceService" else f"{url}/v1"
        self.headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self.http = urllib3.PoolManager(timeout=60, retries=urllib3.Retry(3, backoff_factor=0.5))

    def lists(self, wanted: dict[str, str]) -> bool:
        """Whether the endpoint lists the base and exactly these adapters, each in the version meant."""
        answer = self.http.request("GET", f"{self.api}/models", headers=self.headers)
        if answer.status == 401:
            raise DeployError("the endpoint refuses the key, or that none was given (401)")
        if answer.status != 200:
            return False
        listed = {m["id"]: m.get("root") for m in answer.json()["data"]}
        if self.spec.kind == "LLMInferenceService":  # vLLM's root is a path in its pod
            return listed.keys() == {self.base, *wanted}
        return listed.pop(self.base, None) is not None and listed == wanted

    def complete(self, model: str) -> None:
        """Send one short completion.

        Raises:
            DeployError: the answer is an error, or no completion.
        """
        asked = {"model": model, "prompt": "We study", "max_tokens": 4, "temperature": 0}
        headers = {**self.headers, "Content-Type": "application/json"}
        answer = self.http.request("POST", f"{self.api}/completions", body=json.dumps(asked), headers=headers)
        if answer.status != 200:
            raise DeployError(f"{model} answered {answer.status}: {answer.data[:200].decode(errors='replace')}")
        if not isinstance(answer.json()["choices"][0]["text"], str):
            raise DeployError(f"{model} answered without a text")


def _until(found: Callable[[], Any], deadline: float, poll: float, what: str) -> Any:
    """Ask until the answer is true; server errors and refused connections in between are waited out."""
    from kubernetes.client.exceptions import ApiException

    last = ""
    while True:
        try:
            if answer := found():
                return answer
            last = ""
        except (ApiException, urllib3.exceptions.HTTPError) as e:
            if isinstance(e, ApiException) and 0 < e.status < 500:
                raise
            last = f" (last error: {_reason(e)})"
        if time.monotonic() + poll > deadline:
            raise DeployError(f"waited in vain for {what}{last}")
        time.sleep(poll)


def _name(there: Object) -> str:
    return str(there["metadata"]["name"])


def _as_applied(there: Object) -> Object:
    """An object as read from the cluster, without what the cluster added."""
    metadata = {k: v for k, v in there["metadata"].items() if k in ("name", "namespace", "labels", "annotations")}
    return {"apiVersion": there["apiVersion"], "kind": there["kind"], "metadata": metadata, "spec": there["spec"]}


def _reason(e: BaseException) -> str:
    """One line about an error; never headers, which may hold a token."""
    status = getattr(e, "status", None)
    if status is not None:
        try:
            said = json.loads(getattr(e, "body", None) or "{}").get("message", "")
        except ValueError:
            said = ""
        return f"{status} {getattr(e, 'reason', '')}{f', {said}' if said else ''}"
    return str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
