"""Enough of a Kubernetes API, and of a served endpoint, for `deploy`: over real HTTP, with faults to order.

Custom objects are created, read, replaced (resourceVersion checked) and deleted; a Secret and ServiceAccounts are
patched. In place of KServe's controller every service gets a Deployment, whose pods are ready after `ready_after`
reads, with a URL under which `/openai/v1` and `/v1` list `models` and complete for each of them. As KServe 0.20 does
(tests/recorded/kserve-0.20.0), an InferenceService's observedGeneration is its Deployment's and Ready stays True while
old pods answer; vLLM's models are listed under two names each.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CUSTOM = re.compile(r"/apis/serving\.kserve\.io/\w+/namespaces/(?P<ns>[^/]+)/(?P<plural>\w+)(/(?P<name>.+))?")
_CORE = re.compile(r"/api/v1/namespaces/(?P<ns>[^/]+)/(?P<plural>secrets|serviceaccounts)(/(?P<name>.+))?")
_OTHER = re.compile(r"/apis/(apps|gateway\.networking\.k8s\.io)/v1/namespaces/[^/]+/(?P<plural>\w+)/(?P<name>.+)")
_KINDS = {
    "serving.kserve.io/v1beta1": ["inferenceservices"],
    "serving.kserve.io/v1alpha2": ["llminferenceservices"],
    "gateway.networking.k8s.io/v1": ["gateways"],
    "inference.networking.k8s.io/v1": ["inferencepools"],
}


class KubeServer:
    """Use as a context manager; `objects` holds what was applied, by (plural, name).

    Attributes:
        faults: (method, pattern of the path) -> (status, how many times), a status of 0 closes the connection.
        kinds: plurals of the custom objects by group and version.
        ready_after: reads of a service until its new pods are ready; None: they never are.
        broken_images: images that cannot be pulled: the Deployment's new pods are never ready.
        events: warnings about the service: (kind, name, message).
        models: what the endpoint lists: model name -> root. `silent`: models whose completion is a 500.
        key: the bearer key the endpoint asks for, or None.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {
            ("gateways", "kserve-ingress-gateway"): {"metadata": {"name": "kserve-ingress-gateway"}}
        }
        self.kinds = {group: list(plurals) for group, plurals in _KINDS.items()}
        self.faults: dict[tuple[str, str], list[int]] = {}
        self.ready_after: int | None = 2
        self.broken_images: set[str] = set()
        self.events: list[tuple[str, str, str]] = []
        self.models: dict[str, str] = {}
        self.silent: set[str] = set()
        self.key: str | None = None
        self.asked: list[str] = []
        self.requests: list[tuple[str, str, bytes]] = []
        self.lock = threading.Lock()
        self.versions = 0

    def __enter__(self) -> "KubeServer":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self) -> None:
                server.handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1) -> None:
        """Answer the next requests of `method` whose path holds `path` with `status`."""
        self.faults[(method, path)] = [status, times]

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        with self.lock:
            self.requests.append((request.command, path, raw))
            status, answer = self._answer(request, path, json.loads(raw) if raw else None)
        if status == 0:
            request.connection.close()
            return
        body = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _answer(self, request: BaseHTTPRequestHandler, path: str, body: Any) -> tuple[int, Any]:
        for (method, part), fault in self.faults.items():
            if request.command == method and part in path and fault[1] > 0:
                fault[1] -= 1
                return fault[0], {"kind": "Status", "message": "ordered by the test", "code": fault[0]}
        if path.startswith("/endpoint/"):
            return self._endpoint(request, path, body)
        group = path.removeprefix("/apis/")
        if group in self.kinds:
            fields = {"kind": "X", "namespaced": True, "singularName": "", "verbs": []}
            return 200, {"groupVersion": group, "resources": [{"name": n, **fields} for n in self.kinds[group]]}
        if path.endswith("/events"):
            return 200, {"items": [_event(*event) for event in self.events]}
        if match := _CUSTOM.fullmatch(path) or _CORE.fullmatch(path) or _OTHER.fullmatch(path):
            return self._object(request.command, match["plural"], match["name"], body)
        return 404, {"message": "no such path"}

    def _object(self, method: str, plural: str, name: str | None, body: Any) -> tuple[int, Any]:
        key = (plural, name or body["metadata"]["name"])
        existing = self.objects.get(key)
        if method == "POST":
            if existing is not None:
                return 409, {"message": f"{plural} {key[1]} already exists"}
            return 201, self._store(key, body, 1)
        if existing is None:
            return 404, {"message": f"{plural} {key[1]} not found"}
        if method == "DELETE":
            del self.objects[key]
            self.objects.pop(_deployment_of(*key), None)
            return 200, {"status": "Success"}
        if method == "PATCH":
            annotations = body.get("metadata", {}).get("annotations", {})
            existing["metadata"].setdefault("annotations", {}).update(annotations)
            existing.update({k: v for k, v in body.items() if k != "metadata"})
        if method == "PUT":
            if body["metadata"].get("resourceVersion") != existing["metadata"]["resourceVersion"]:
                return 409, {"message": "the object has been modified"}
            same = body["spec"] == existing["spec"]
            return 200, self._store(key, body, existing["metadata"]["generation"] + (0 if same else 1))
        if method == "GET" and "reads" in existing:
            existing["reads"] += 1
            self._reconcile(key, existing)
        return 200, {k: v for k, v in existing.items() if k != "reads"}

    def _reconcile(self, key: tuple[str, str], service: dict[str, Any]) -> None:
        """KServe's controller and the Deployment's, one step for each read of the service."""
        spec = service["spec"]
        if "predictor" in spec:
            container, replicas = spec["predictor"]["containers"][0], spec["predictor"]["minReplicas"]
        else:
            container, replicas = {"image": "vllm", **spec["template"]["containers"][0]}, spec["replicas"]
        deployment = self.objects.setdefault(_deployment_of(*key), {"metadata": {"generation": 0}, "status": {}})
        template = {"spec": {"containers": [container]}}
        desired = {"replicas": replicas, "selector": {}, "template": template}
        if deployment.get("spec") != desired:
            deployment["spec"] = desired
            deployment["metadata"]["generation"] += 1
            deployment["status"] |= {"observedGeneration": deployment["metadata"]["generation"], "updatedReplicas": 0}
        new_pods_ready = self.ready_after is not None and service["reads"] > self.ready_after
        if new_pods_ready and container["image"] not in self.broken_images:
            deployment["status"] |= dict.fromkeys(("replicas", "updatedReplicas", "availableReplicas"), replicas)
        available = deployment["status"].get("availableReplicas", 0) > 0
        deployment["status"]["conditions"] = [
            {"type": "Available", "status": str(available), "message": "Deployment minimum availability."}
        ]
        counted = deployment if "predictor" in spec else service
        service["status"] = {
            "observedGeneration": counted["metadata"]["generation"],
            "conditions": [
                {"type": "Ready", "status": str(available)}
                | ({} if available else {"reason": "MinimumReplicasUnavailable"})
            ],
            "url": "http://abstracts-physics.example.com",  # outside: nobody resolves it
            "address": {"url": f"{self.url}/endpoint"},
        }

    def _store(self, key: tuple[str, str], body: Any, generation: int) -> Any:
        self.versions += 1
        status = self.objects.get(key, {}).get("status", {})  # of the generation before
        made = {"resourceVersion": str(self.versions), "generation": generation, "uid": "u"}
        self.objects[key] = {**body, "metadata": {**body["metadata"], **made}, "status": status, "reads": 0}
        return {k: v for k, v in self.objects[key].items() if k != "reads"}

    def _endpoint(self, request: BaseHTTPRequestHandler, path: str, body: Any) -> tuple[int, Any]:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key"}}
        vllm = not path.startswith("/endpoint/openai/")
        if path.endswith("/v1/models"):
            names = {**self.models, **{f"publishers/physics/models/{n}": r for n, r in self.models.items() if vllm}}
            return 200, {"object": "list", "data": [{"id": n, "root": r} for n, r in names.items()]}
        if path.endswith("/v1/completions"):
            self.asked.append(body["model"])
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"no model {body['model']}"}}
            if body["model"] in self.silent:
                return 500, {"error": {"message": "adapter broke"}}
            return 200, {"choices": [{"text": " a brane"}]}
        return 404, {}


def _deployment_of(plural: str, name: str) -> tuple[str, str]:
    return "deployments", f"{name}-{'predictor' if plural == 'inferenceservices' else 'kserve'}"


def _event(kind: str, name: str, message: str) -> dict[str, Any]:
    metadata = {"name": "e", "namespace": "physics"}
    return {"metadata": metadata, "involvedObject": {"kind": kind, "name": name}, "message": message, "type": "Warning"}
