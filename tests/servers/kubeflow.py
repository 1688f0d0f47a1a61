"""A server that speaks as much of the Kubeflow Pipelines v2beta1 API as its published client uses to upload and start.

Its answers have the status codes and bodies that a real 2.17.0 gave (tests/recorded/kubeflow-2.17.0). `token`, when
set, is required of every request, as a multi-user installation does; `login` sends a proxy's login page instead, as dex
and IAP do; `refuse` lists answers (status, message) to give instead of the next ones.
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
        Rule("/apis/v2beta1/pipelines", endpoint="pipelines", methods=["GET", "POST"]),
        Rule("/apis/v2beta1/pipelines/<pipeline>", endpoint="pipeline", methods=["GET"]),
        Rule("/apis/v2beta1/pipelines/upload_version", endpoint="upload_version", methods=["POST"]),
        Rule("/apis/v2beta1/pipelines/<pipeline>/versions", endpoint="list_versions", methods=["GET"]),
        Rule("/apis/v2beta1/pipelines/<pipeline>/versions/<version>", endpoint="version", methods=["GET"]),
        Rule("/apis/v2beta1/experiments", endpoint="experiments", methods=["GET", "POST"]),
        Rule("/apis/v2beta1/runs", endpoint="runs", methods=["POST"]),
        Rule("/apis/v2beta1/runs/<run>", endpoint="run", methods=["GET"]),
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
        self.login = False
        self.ends: list[dict[str, Any]] = []  # what a run is at the next requests; the last one stays

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        try:
            if self.login:
                page = Response("<html>Log in to Your Account</html>", content_type="text/html; charset=utf-8")
                return page(environ, start_response)
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
        return _json(
            {
                "commit_sha": "unknown",
                "tag_name": "unknown",
                "multi_user": self.token is not None,
                "pipeline_store": "database",
            }
        )

    def _pipelines(self, request: Request) -> Response:
        if request.method == "POST":
            return self._create_pipeline(request.get_json())
        namespace = request.args.get("namespace") or None  # without one: shared pipelines only
        listed = [p for p in self.pipelines.values() if p["namespace"] == namespace]
        return _listed("pipelines", _filtered(request, listed))

    def _create_pipeline(self, given: dict[str, Any]) -> Response:
        name, namespace = given["display_name"], given.get("namespace")
        if any((p["display_name"], p["namespace"]) == (name, namespace) for p in self.pipelines.values()):
            return _upload_error("Failed to create a pipeline and a pipeline version", 409)
        pipeline = {**given, "pipeline_id": str(uuid.uuid4()), "namespace": namespace}
        self.pipelines[pipeline["pipeline_id"]] = pipeline
        self.versions[pipeline["pipeline_id"]] = []
        return _json(pipeline)

    def _pipeline(self, request: Request, pipeline: str) -> Response:
        if pipeline not in self.pipelines:
            return _unknown("pipeline", "Failed to get a pipeline", pipeline)
        return _json(self.pipelines[pipeline])

    def _upload_version(self, request: Request) -> Response:
        pipeline, name = request.args["pipelineid"], request.args["name"]
        if pipeline not in self.pipelines:
            return _upload_error("Failed to create a pipeline version", 400)
        if any(v["display_name"] == name for v in self.versions[pipeline]):
            return _upload_error("Failed to create a pipeline version", 409)
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
        listed = _filtered(request, self.versions[pipeline])
        if request.args.get("sort_by") == "created_at desc":
            listed = listed[::-1]
        return _listed("pipeline_versions", listed[: int(request.args.get("page_size") or 10)])

    def _version(self, request: Request, pipeline: str, version: str) -> Response:
        return _json(next(v for v in self.versions[pipeline] if v["pipeline_version_id"] == version))

    def _experiments(self, request: Request) -> Response:
        if request.method == "GET":
            return _json({"experiments": self.created_experiments})
        given = request.get_json()
        experiment = {**given, "experiment_id": str(uuid.uuid4())}
        self.created_experiments.append(experiment)
        return _json(experiment)

    def _runs(self, request: Request) -> Response:
        given = request.get_json()
        reference = given["pipeline_version_reference"]
        version = next(
            v
            for v in self.versions[reference["pipeline_id"]]
            if v["pipeline_version_id"] == reference["pipeline_version_id"]
        )
        parameters = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
        for name, value in given["runtime_config"].get("parameters", {}).items():
            wrong = _wrong(name, value, parameters)
            if wrong:
                prefix = (
                    "Failed to create a new run: Failed to generate the ExecutionSpec: invalid pipeline job inputs: "
                )
                return _error(3, f"{prefix}Invalid input error: {wrong}", wrong, 400)
        run = {**given, "run_id": str(uuid.uuid4()), "state": "PENDING"}
        self.started.append(run)
        return _json(run)

    def _run(self, request: Request, run: str) -> Response:
        started = [r for r in self.started if r["run_id"] == run]
        if not started:
            return _unknown("run", "Failed to get a run: Failed to fetch run", run)
        now = self.ends.pop(0) if len(self.ends) > 1 else (self.ends or [{}])[0]
        return _json({**started[0], **now})


def _wrong(name: str, value: Any, parameters: dict[str, Any]) -> str | None:
    """What the server has against a parameter, in its words."""
    if name not in parameters:
        return f"parameter(s) provided are not required by pipeline: {name}"
    if parameters[name]["parameterType"].startswith("NUMBER") and not isinstance(value, int | float):
        needs = "requires type double or integer, but the parameter value is not of number value type"
        return f"input parameter {name} {needs}"
    literals = parameters[name].get("literals")
    if literals and value not in literals:
        allowed = " ".join(f'string_value:"{v}"' for v in literals)
        return (
            f'input parameter "{name}" value string_value:"{value}" does not match any of the allowed literal values: '
            f"[{allowed}]"
        )
    return None


def _filtered(request: Request, listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not request.args.get("filter"):
        return listed
    predicate = json.loads(request.args["filter"])["predicates"][0]
    assert predicate["key"] in ("display_name", "name"), predicate
    return [item for item in listed if item["display_name"] == predicate["stringValue"]]


def _listed(key: str, items: list[dict[str, Any]]) -> Response:
    return _json({key: items, "total_size": len(items)} if items else {})


def _error(code: int, message: str, detail: str, status: int) -> Response:
    details = [{"@type": "type.googleapis.com/google.rpc.Status", "code": code, "message": detail}]
    return _json({"code": code, "message": message, "details": details}, status)


def _unknown(kind: str, prefix: str, item: str) -> Response:
    lacking = f"{kind.title()} {item} not found"
    with_id = f": Failed to get a pipeline with id {item}" if kind == "pipeline" else ""
    dot = ". Check error stack" if kind == "pipeline" else ""
    return _error(5, f"{prefix} {item}{dot}{with_id}: ResourceNotFoundError: {lacking}", lacking, 404)


def _upload_error(message: str, status: int) -> Response:
    body = json.dumps({"error_message": message, "error_details": f"{message} (a Go stack follows)"})
    return Response(
        body, status=status, content_type="application/json" if status == 409 else "text/plain; charset=utf-8"
    )


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
