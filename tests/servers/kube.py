"""Enough of a Kubernetes API, and of a served endpoint, for `deploy`: over real HTTP, with faults to order.

Custom objects are created, read, replaced (resourceVersion checked) and deleted; a Secret and ServiceAccounts are
patched. In place of KServe's controller every service becomes ready after `ready_after` reads, with a URL under
which `/openai/v1` and `/v1` list `models` and complete for each of them.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_CUSTOM = re.compile(r"/apis/serving\.kserve\.io/\w+/namespaces/(?P<ns>[^/]+)/(?P<plural>\w+)(/(?P<name>.+))?")
_CORE = re.compile(r"/api/v1/namespaces/(?P<ns>[^/]+)/(?P<plural>secrets|serviceaccounts)(/(?P<name>.+))?")


class KubeServer:
    """Use as a context manager; `objects` holds what was applied, by (plural, name).

    Attributes:
        faults: (method, pattern of the path) -> (status, how many times), a status of 0 closes the connection.
        models: what the endpoint lists: model name -> root. `silent`: models whose completion is a 500.
        key: the bearer key the endpoint asks for, or None.
    """

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.faults: dict[tuple[str, str], list[int]] = {}
        self.ready_after: int | None = 2
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
        if match := _CUSTOM.fullmatch(path) or _CORE.fullmatch(path):
            return self._object(request.command, match["plural"], match["name"], body)
        return 404, {"message": "no such path"}

    def _object(self, method: str, plural: str, name: str | None, body: Any) -> tuple[int, Any]:
        key = (plural, name or body["metadata"]["name"])
        there = self.objects.get(key)
        if method == "POST":
            if there is not None:
                return 409, {"message": f"{plural} {key[1]} already exists"}
            return 201, self._store(key, body, 1)
        if there is None:
            return 404, {"message": f"{plural} {key[1]} not found"}
        if method == "DELETE":
            del self.objects[key]
            return 200, {"status": "Success"}
        if method == "PATCH":
            annotations = body.get("metadata", {}).get("annotations", {})
            there["metadata"].setdefault("annotations", {}).update(annotations)
            there.update({k: v for k, v in body.items() if k != "metadata"})
        if method == "PUT":
            if body["metadata"].get("resourceVersion") != there["metadata"]["resourceVersion"]:
                return 409, {"message": "the object has been modified"}
            same = body["spec"] == there["spec"]
            return 200, self._store(key, body, there["metadata"]["generation"] + (0 if same else 1))
        if method == "GET" and "reads" in there:
            there["reads"] += 1
            if self.ready_after is not None and there["reads"] > self.ready_after:
                there["status"] = {
                    "observedGeneration": there["metadata"]["generation"],
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "url": "http://abstracts-physics.example.com",  # outside: nobody resolves it
                    "address": {"url": f"{self.url}/endpoint"},
                }
        return 200, {k: v for k, v in there.items() if k != "reads"}

    def _store(self, key: tuple[str, str], body: Any, generation: int) -> Any:
        self.versions += 1
        status = self.objects.get(key, {}).get("status", {})  # of the generation before
        made = {"resourceVersion": str(self.versions), "generation": generation, "uid": "u"}
        self.objects[key] = {**body, "metadata": {**body["metadata"], **made}, "status": status, "reads": 0}
        return {k: v for k, v in self.objects[key].items() if k != "reads"}

    def _endpoint(self, request: BaseHTTPRequestHandler, path: str, body: Any) -> tuple[int, Any]:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key"}}
        if path.endswith("/v1/models"):
            return 200, {"object": "list", "data": [{"id": n, "root": r} for n, r in self.models.items()]}
        if path.endswith("/v1/completions"):
            self.asked.append(body["model"])
            if body["model"] not in self.models:
                return 404, {"error": {"message": f"no model {body['model']}"}}
            if body["model"] in self.silent:
                return 500, {"error": {"message": "adapter broke"}}
            return 200, {"choices": [{"text": " a brane"}]}
        return 404, {}
