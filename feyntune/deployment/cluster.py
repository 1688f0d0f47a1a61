"""The few things asked of the Kubernetes API for one serving description."""

import json
from typing import Any

import urllib3

from feyntune.deployment.render import GROUP, Object, secret_annotations, service_account
from feyntune.deployment.rollout import conditions, unfinished
from feyntune.deployment.spec import ServingSpec
from feyntune.errors import UserError
from feyntune.telemetry import log

_PLURALS = {
    "InferenceService": ("v1beta1", "inferenceservices"),
    "LLMInferenceService": ("v1alpha2", "llminferenceservices"),
}
_DEPLOYMENTS = {"InferenceService": "{}-predictor", "LLMInferenceService": "{}-kserve"}  # names KServe gives
_PREREQUISITES = "install it as manifests/prerequisites/README.md says"
_WAIT = {"_request_timeout": 30}  # seconds; the Kubernetes client itself has no time limit


def connect() -> Any:
    """A client for the cluster of KUBECONFIG, or of the pod this runs in.

    Raises:
        UserError: neither is configured.
    """
    from kubernetes import client, config

    try:
        config.load_kube_config()
    except config.ConfigException as e:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            why = str(e).rstrip(".")
            raise UserError(f"No cluster is configured ({why}): set KUBECONFIG, or run this in a pod.") from e
    return client.ApiClient()


class Cluster:
    """Reads and writes the description's objects, and watches the Deployment that KServe makes of them."""

    def __init__(self, client: Any, spec: ServingSpec):
        from kubernetes.client import AppsV1Api, CoreV1Api, CustomObjectsApi

        self.spec, self.client = spec, client
        self.core, self.apps, self.custom = CoreV1Api(client), AppsV1Api(client), CustomObjectsApi(client)

    def check_prerequisites(self) -> None:
        """KServe's kind is on the cluster, and for vLLM also the Gateway API, its extension and the Gateway.

        Raises:
            UserError: one of them is missing.
            ApiException: the cluster refuses.
        """
        version, plural = _PLURALS[self.spec.kind]
        self._check_kind(GROUP, version, plural, f"KServe's {self.spec.kind}")
        if self.spec.kind == "InferenceService":
            return
        self._check_kind("gateway.networking.k8s.io", "v1", "gateways", "The Gateway API")
        self._check_kind("inference.networking.k8s.io", "v1", "inferencepools", "The Gateway API inference extension")
        namespace, _, name = self.spec.gateway.rpartition("/")
        gateway = self._or_none(
            self.custom.get_namespaced_custom_object, "gateway.networking.k8s.io", "v1", namespace, "gateways", name
        )
        if gateway is None:
            raise UserError(
                f"Gateway {self.spec.gateway} does not exist: make it as manifests/prerequisites/README.md says, or "
                "name yours in the description's `gateway`. Nothing was deployed."
            )

    def prepare(self) -> None:
        """Annotate the S3 Secret (its values are neither read nor written), make or complete the ServiceAccount."""
        from kubernetes.client.exceptions import ApiException

        spec = self.spec
        account = service_account(spec, hub=spec.base.startswith("hf://") and self._has_hub_token())
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

    def get(self, desired: Object) -> Object | None:
        return self._or_none(self.custom.get_namespaced_custom_object, *self._path(), _name(desired))

    def apply(self, desired: Object, existing: Object | None) -> None:
        """Create `wanted`, or replace `existing`; a change by somebody else in between is a conflict and an error."""
        if existing is None:
            self.custom.create_namespaced_custom_object(*self._path(), desired, **_WAIT)
            return
        old, new = existing["metadata"], desired["metadata"]
        metadata = {
            **new,
            "resourceVersion": old["resourceVersion"],
            "annotations": {**old.get("annotations", {}), **new.get("annotations", {})},
            **({"finalizers": old["finalizers"]} if "finalizers" in old else {}),
        }
        body = {**desired, "metadata": metadata}
        self.custom.replace_namespaced_custom_object(*self._path(), _name(desired), body, **_WAIT)

    def ready(self, desired: Object) -> str | None:
        """The service's URL once it reports Ready and its Deployment runs the pods asked for, all of them."""
        service = self.get(desired) or {}
        if self._unready(service) or self._unfinished(desired):
            return None
        # In the cluster first: `url` is an outside name, which only an ingress makes reachable.
        status = service["status"]
        return status.get("address", {}).get("url") or status.get("url")

    def explain(self) -> str:
        """Why it is not ready yet: the service's and the Deployment's conditions, and the newest warning."""
        desired = {"metadata": {"name": self.spec.name}}
        service = self.get(desired) or {}
        status = service.get("status") or {}
        deployment = (self._deployment() or {}).get("status") or {}
        why = conditions(status, "Stopped") + conditions(deployment) + self._warning()
        return why.removeprefix("; ") or "no condition and no event says why"

    def roll_back(self, desired: Object, before: Object | None) -> str:
        """Restore what was there before; says in a sentence whether that worked."""
        from kubernetes.client.exceptions import ApiException

        try:
            current = self.get(desired)
            if before is None and current is not None:
                self.custom.delete_namespaced_custom_object(*self._path(), _name(desired), **_WAIT)
            elif before is not None and (current is None or current["spec"] != before["spec"]):
                self.apply(_as_applied(before), current)
        except (ApiException, urllib3.exceptions.HTTPError) as e:
            return f"Could not be rolled back: {desired['kind']} {_name(desired)} ({reason(e)})."
        return "Rolled back: everything is as it was before."

    def _unready(self, service: Object) -> bool:
        status = service.get("status") or {}
        if self.spec.kind == "LLMInferenceService" and (
            status.get("observedGeneration", 0) < service["metadata"].get("generation", 0)
        ):
            return True
        return not any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))

    def _unfinished(self, desired: Object) -> str | None:
        if self.spec.kind == "InferenceService":
            container = desired["spec"]["predictor"]["containers"][0]
        else:  # KServe writes the arguments; the image comes from the description if it names one
            template = desired["spec"]["template"]
            container = {k: v for k, v in template["containers"][0].items() if k in ("name", "image")}
        return unfinished(self._deployment(), container, self.spec.replicas)

    def _deployment(self) -> Object | None:
        name = _DEPLOYMENTS[self.spec.kind].format(self.spec.name)
        deployment = self._or_none(self.apps.read_namespaced_deployment, name, self.spec.namespace)
        return None if deployment is None else dict(self.client.sanitize_for_serialization(deployment))

    def _warning(self) -> str:
        """The newest warning about an object of the service, as the end of a sentence; "" where none can be read."""
        from kubernetes.client.exceptions import ApiException

        try:
            events = self.core.list_namespaced_event(self.spec.namespace, field_selector="type=Warning", **_WAIT).items
        except ApiException:
            return ""
        own = [e for e in events if (e.involved_object.name or "").startswith(self.spec.name)]
        if not own:
            return ""
        newest = max(own, key=lambda e: str(e.last_timestamp or e.event_time or ""))
        message = " ".join((newest.message or "").split())[:300]
        return f"; {newest.involved_object.kind} {newest.involved_object.name}: {message.rstrip('.')}"

    def _has_hub_token(self) -> bool:
        from kubernetes.client.exceptions import ApiException

        try:
            secret = self.core.read_namespaced_secret(self.spec.hub_secret, self.spec.namespace, **_WAIT)
        except ApiException as e:
            if e.status not in (403, 404):
                raise
            log.info("no Secret %s can be read: a gated base cannot be downloaded", self.spec.hub_secret)
            return False
        return "HF_TOKEN" in (secret.data or {})

    def _check_kind(self, group: str, version: str, plural: str, what: str) -> None:
        resources = self._or_none(self.custom.get_api_resources, group, version)
        if resources is None or plural not in {r.name for r in resources.resources}:
            raise UserError(
                f"{what} is not on this cluster (no {plural}.{group}/{version}): {_PREREQUISITES}. "
                "Nothing was deployed."
            )

    def _or_none(self, read: Any, *path: str) -> Any:
        from kubernetes.client.exceptions import ApiException

        try:
            return read(*path, **_WAIT)
        except ApiException as e:
            if e.status == 404:
                return None
            raise

    def _path(self) -> tuple[str, str, str, str]:
        version, plural = _PLURALS[self.spec.kind]
        return GROUP, version, self.spec.namespace, plural


def reason(e: BaseException) -> str:
    """One line about an error; never headers, which may hold a token."""
    status = getattr(e, "status", None)
    if status is not None:
        try:
            message = json.loads(getattr(e, "body", None) or "{}").get("message", "")
        except ValueError:
            message = ""
        return f"{status} {getattr(e, 'reason', '')}{f', {message}' if message else ''}"
    return str(e).rstrip(".") if isinstance(e, UserError) else f"{type(e).__name__}: {e}"


def _name(desired: Object) -> str:
    return str(desired["metadata"]["name"])


def _as_applied(existing: Object) -> Object:
    """An object as read from the cluster, without what the cluster added."""
    metadata = {k: v for k, v in existing["metadata"].items() if k in ("name", "namespace", "labels", "annotations")}
    fields = {k: existing[k] for k in ("apiVersion", "kind", "spec")}
    return {**fields, "metadata": metadata}
