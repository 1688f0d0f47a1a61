"""A server that speaks as much of the Kubeflow Pipelines v2beta1 API as its published client uses to upload and start.

`TOKEN`, when set, is required of every request, as a multi-user installation does; `refuse` lists answers (status,
message) to give instead of the next ones.
"""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, Rule
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

_RULES = Map(
    [
        Rule("/apis/v2beta1/healthz", endpoint="health", methods=["GET"]),
        Rule("/apis/v2beta1/pipelines", endpoint="list_pipelines", methods=["GET"]),
        Rule("/apis/v2beta1/pipelines/upload", endpoint="upload", methods=["POST"]),
        Rule("/apis/v2beta1/pipelines/upload_version", endpoint="upload_version", methods=["POST"]),
        Rule("/apis/v2beta1/pipelines/<pipeline>/versions", endpoint="list_versions", methods=["GET"]),
        Rule("/apis/v2beta1/experiments", endpoint="experiments", methods=["GET", "POST"]),
        Rule("/apis/v2beta1/runs", endpoint="runs", methods=["POST"]),
    ]
)


class Kubeflow:
    """What the server holds, and how it answers."""

    def __init__(self, token: str | None = None):
        self.token = token
        self.url = ""
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, list[dict[str, Any]]] = {}
        self.created_experiments: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.refuse: list[tuple[int, str]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        try:
            if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
                response = _json({"error": "User identity is empty in the request header", "code": 16}, 401)
            elif self.refuse:
                status, message = self.refuse.pop(0)
                response = _json({"error": message, "code": 13, "message": message}, status)
            else:
                endpoint, values = _RULES.bind_to_environ(environ).match()
                response = getattr(self, f"_{endpoint}")(request, **values)
        except HTTPException as e:
            response = _json({"error": str(e)}, e.code or 500)
        return response(environ, start_response)

    def _health(self, request: Request) -> Response:
        return _json({"multi_user": self.token is not None})

    def _list_pipelines(self, request: Request) -> Response:
        namespace = request.args.get("namespace") or None  # without one: shared pipelines only
        found = [p for p in self.pipelines.values() if p["namespace"] == namespace]
        if "filter" in request.args:
            predicate = json.loads(request.args["filter"])["predicates"][0]
            assert predicate["key"] in ("display_name", "name"), predicate
            found = [p for p in found if p["display_name"] == predicate["stringValue"]]
        return _json({"pipelines": found, "total_size": len(found)})

    def _upload(self, request: Request) -> Response:
        name = request.args["name"]
        namespace = request.args.get("namespace") or None
        if any((p["display_name"], p["namespace"]) == (name, namespace) for p in self.pipelines.values()):
            return _json({"error": f"Already exist error: pipeline {name}"}, 409)
        pipeline = {"pipeline_id": str(uuid.uuid4()), "display_name": name, "namespace": namespace}
        self.pipelines[pipeline["pipeline_id"]] = pipeline
        self.versions[pipeline["pipeline_id"]] = []
        self._keep_version(pipeline["pipeline_id"], name, request)
        return _json(pipeline)

    def _upload_version(self, request: Request) -> Response:
        pipeline, name = request.args["pipelineid"], request.args["name"]
        if any(v["display_name"] == name for v in self.versions[pipeline]):
            return _json({"error": f"Already exist error: version {name}"}, 409)
        return _json(self._keep_version(pipeline, name, request))

    def _keep_version(self, pipeline: str, name: str, request: Request) -> dict[str, Any]:
        spec, platform = yaml.safe_load_all(request.files["uploadfile"].read())
        version = {
            "pipeline_id": pipeline,
            "pipeline_version_id": str(uuid.uuid4()),
            "display_name": name,
            "pipeline_spec": {"pipeline_spec": spec, "platform_spec": platform},
        }
        self.versions[pipeline].append(version)
        return version

    def _list_versions(self, request: Request, pipeline: str) -> Response:
        return _json({"pipeline_versions": self.versions[pipeline], "total_size": len(self.versions[pipeline])})

    def _experiments(self, request: Request) -> Response:
        if request.method == "GET":
            return _json({"experiments": self.created_experiments})
        given = request.get_json()
        experiment = {**given, "experiment_id": str(uuid.uuid4())}
        self.created_experiments.append(experiment)
        return _json(experiment)

    def _runs(self, request: Request) -> Response:
        run = {**request.get_json(), "run_id": str(uuid.uuid4()), "state": "PENDING"}
        self.started.append(run)
        return _json(run)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(value), status=status, content_type="application/json")


@contextmanager
def kubeflow(token: str | None = None) -> Iterator[Kubeflow]:
    """A running server on a free port of the loopback."""
    state = Kubeflow(token)
    server = make_server("127.0.0.1", 0, state, threaded=True)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
