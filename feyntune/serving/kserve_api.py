"""KServe's V1 and V2 protocols, REST and gRPC, through KServe's own server, and the server itself.

V1: `{"instances": ["text", …], "parameters": {"max_tokens": 16, …}}` gives `{"predictions": ["text", …]}`.
V2: a BYTES tensor `text` of shape [n], the same parameters; gives BYTES tensors `text` and `finish_reason` [n].
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent import futures
from typing import Any
from uuid import uuid4

_arguments, sys.argv = sys.argv, sys.argv[:1]  # kserve parses the command line when imported: it is not for it
import kserve  # noqa: E402
from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER  # noqa: E402
from kserve.errors import InvalidInput  # noqa: E402
from kserve.protocol.dataplane import DataPlane  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as v2_grpc  # noqa: E402
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor  # noqa: E402
from kserve.protocol.grpc.servicer import InferenceServicer  # noqa: E402
from kserve.protocol.model_repository_extension import ModelRepositoryExtension  # noqa: E402
from kserve.protocol.rest.server import RESTServer  # noqa: E402
from kserve.protocol.rest.v2_endpoints import V2Endpoints  # noqa: E402

sys.argv = _arguments

import grpc  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.middleware.cors import CORSMiddleware  # noqa: E402
from fastapi.requests import Request as HttpRequest  # noqa: E402
from fastapi.responses import ORJSONResponse, PlainTextResponse, Response  # noqa: E402
from fastapi.routing import APIRoute  # noqa: E402
from pydantic import Field, ValidationError  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

from feyntune.constants import RELEASE_HEADER, VERSION, VERSION_HEADER  # noqa: E402
from feyntune.errors import UserError  # noqa: E402
from feyntune.names import BASE, slug  # noqa: E402
from feyntune.serving import openai_api, tokenize_api  # noqa: E402
from feyntune.serving.completions import OWNER, ApiError, CompletionRequest, Server  # noqa: E402
from feyntune.serving.guard import Keys, RequestGuard, error_response  # noqa: E402
from feyntune.serving.openai_fields import SamplingFields, faulty_field  # noqa: E402
from feyntune.serving.workbench import add_workbench  # noqa: E402
from feyntune.telemetry import log  # noqa: E402


class Parameters(SamplingFields):
    """What V1 and V2 requests may set. Greedy unless asked otherwise."""

    default_temperature = 0.0

    max_tokens: int | None = Field(None, ge=1)

    @classmethod
    def read(cls, given: Any) -> "Parameters":
        try:
            return cls.model_validate(given)
        except ValidationError as e:
            error = e.errors()[0]
            raise InvalidInput(f"{faulty_field(error['loc']) or 'parameters'}: {error['msg']}") from e


class NamedModel(kserve.Model):
    """One name of one adapter, an alias or the base, to KServe."""

    def __init__(self, name: str, server: Server):
        super().__init__(name)
        self.server = server
        self.ready = True

    async def healthy(self) -> bool:
        return self.server.ready

    def load(self) -> bool:
        return self.ready

    def get_input_types(self) -> list[dict]:
        return [{"name": "text", "datatype": "BYTES", "shape": [-1]}]

    def get_output_types(self) -> list[dict]:
        return [{"name": n, "datatype": "BYTES", "shape": [-1]} for n in ("text", "finish_reason")]

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        if isinstance(payload, kserve.InferRequest):
            completed = await self._complete(_v2_texts(payload), _v2_parameters(payload), "v2")
            columns = {"text": [t for t, _ in completed], "finish_reason": [f for _, f in completed]}
            return kserve.InferResponse(
                response_id=payload.id or uuid4().hex,
                model_name=self.name,
                infer_outputs=[kserve.InferOutput(n, [len(c)], "BYTES", data=c) for n, c in columns.items()],
                use_binary_outputs=payload.use_binary_outputs,
                requested_outputs=payload.request_outputs,
            )
        completed = await self._complete(_v1_texts(payload), Parameters.read(payload.get("parameters") or {}), "v1")
        return {"predictions": [text for text, _ in completed]}

    async def _complete(self, texts: list[str], asked: Parameters, protocol: str) -> list[tuple[str, str]]:
        """Text and finish reason of each completion."""
        limits = self.server.limits
        if not 0 < len(texts) <= limits.choices:
            raise InvalidInput(f"{len(texts)} texts: give between 1 and {limits.choices}")
        stop = asked.stops(limits.stop)
        engine, _, _ = self.server.require_ready()
        # The same for each: what a prompt's seed gives does not depend on its place in the list.
        sampling = asked.sampling(0, asked.max_tokens or 16, engine.vocabulary)
        prompts = [await self.server.tokens(text) for text in texts]
        with CompletionRequest(self.server, self.name, protocol) as request:
            choices = [request.complete(ids, sampling, stop) for ids in prompts]
            return list(await asyncio.gather(*(choice.text() for choice in choices)))
        raise AssertionError("unreachable")


_NOT_READ = "The body was not read: send JSON with the header content-type: application/json"


def _v1_texts(payload: Any) -> list[str]:
    if isinstance(payload, bytes):  # KServe reads JSON where the header says so, or where there is none
        raise InvalidInput(_NOT_READ)
    instances = payload.get("instances") if isinstance(payload, dict) else None
    if not isinstance(instances, list) or not all(isinstance(i, str) for i in instances):
        raise InvalidInput('send JSON: {"instances": ["text", ...], "parameters": {"max_tokens": 16}}')
    if unknown := next((k for k in payload if k not in ("instances", "parameters", "signature_name")), None):
        raise InvalidInput(f"{unknown[:60]}: send settings within `parameters`")
    return instances


_V2_BODY = "send one input tensor, `text`, of datatype BYTES"


def _v2_texts(payload: kserve.InferRequest) -> list[str]:
    if len(payload.inputs) != 1 or payload.inputs[0].name != "text" or payload.inputs[0].datatype != "BYTES":
        raise InvalidInput(_V2_BODY)
    for output in payload.request_outputs or []:
        if output.name not in ("text", "finish_reason") or not isinstance(output.parameters or {}, Mapping):
            raise InvalidInput(f"outputs: there are `text` and `finish_reason`, not {str(output.name)[:60]!r}")
    if not isinstance(payload.id or "", str):
        raise InvalidInput("id: give a string")
    if any(not isinstance(n, int) or n < 0 for n in payload.inputs[0].shape):
        raise InvalidInput("shape: give the number of texts, as [2]")
    try:
        data = payload.inputs[0].as_numpy().ravel().tolist()
        return [t.decode() if isinstance(t, bytes) else str(t) for t in data]
    except InvalidInput:
        raise
    except Exception as e:  # numpy's complaint about shape or content, or text that is not UTF-8
        raise InvalidInput(f"the input tensor cannot be read: {e}") from e


# Parameters of the protocol itself, which come by the same way.
_KSERVES = {
    "binary_data_output",
    "binary_data_size",
    "content_type",
    "headers",
    "classification",
    "priority",
    "timeout",
}


def _v2_parameters(payload: kserve.InferRequest) -> Parameters:
    given = {}
    if not isinstance(payload.parameters or {}, Mapping):
        raise InvalidInput("parameters: give an object")
    for name, value in (payload.parameters or {}).items():
        if name in _KSERVES:
            continue
        which = getattr(value, "WhichOneof", None)
        given[name] = getattr(value, which("parameter_choice")) if which else value
    return Parameters.read(given)


class _DataPlane(DataPlane):
    def __init__(self, models: kserve.ModelRepository, server: Server):
        super().__init__(model_registry=models)
        self.server = server

    async def live(self) -> dict[str, str]:  # type: ignore[override]
        return {"status": "alive" if self.server.alive else "dead"}

    async def ready(self) -> bool:
        return self.server.ready

    def decode(self, body: Any, headers: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(body, bytes):  # V2, of which all is JSON where no header says otherwise
            headers = {INFERENCE_CONTENT_LENGTH_HEADER: str(len(body)), **headers}
        try:
            return super().decode(body, headers, *args, **kwargs)
        except InvalidInput:
            raise
        except Exception as e:  # whatever is wrong with it, the body is the client's
            raise InvalidInput(f"the request cannot be read ({type(e).__name__}: {e}): {_V2_BODY}") from e


class _Repository(ModelRepositoryExtension):
    """Clients cannot load or unload: what is served follows the registry."""

    async def load(self, model_name: str) -> None:
        raise InvalidInput("models follow the registry: promote or archive there")

    async def unload(self, model_name: str) -> None:
        raise InvalidInput("models follow the registry: promote or archive there")


class _Rest(RESTServer):
    """KServe's REST server with our routes before its own, on a socket of ours."""

    def __init__(self, server: Server, keys: Keys | None, workbench: bool, socket: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.server, self.keys, self.workbench, self.socket = server, keys, workbench, socket

    async def start(self) -> None:
        self.create_application()
        await self._server.serve(sockets=[self.socket])

    def _register_endpoints(self, app: FastAPI) -> None:
        app.title, app.version = "feyntune", VERSION
        openai = openai_api.router(self.server)
        app.include_router(openai)
        app.include_router(tokenize_api.router(self.server))
        for route in openai.routes:  # /v1/models is KServe's
            if isinstance(route, APIRoute) and "POST" in (route.methods or ()):
                path = route.path.removeprefix("/openai")
                app.add_api_route(path, route.endpoint, methods=["POST"], include_in_schema=False)
        add_workbench(app, self.workbench, self.dataplane.live)
        for path in ("/health", "/ping"):  # what probes of vLLM's and of SageMaker's servers ask
            app.add_api_route(path, self.health, tags=["V2"], responses={503: {}})
        app.add_api_route("/version", self.version, tags=["V2"])
        app.add_api_route(
            "/v2/models/{model_name}/infer", self.infer, methods=["POST"], tags=["V2"], response_model=None
        )
        app.add_api_route("/v1/models", self.models, tags=["V1"], responses={503: {}})
        app.add_api_route("/v1/models/{name}", self.model, tags=["V1"], responses={404: {}, 503: {}})
        app.add_api_route("/cards/{name}", self.card, response_class=PlainTextResponse, responses={404: {}, 503: {}})
        app.add_api_route("/v2/health/ready", self.ready, tags=["V2"], responses={503: {}})
        super()._register_endpoints(app)

    async def health(self) -> Response:
        """200 while the engine is alive, also while the base loads: see /v2/health/ready before sending requests."""
        return Response(status_code=200 if self.server.alive else 503)

    async def version(self) -> dict[str, str]:
        """This package's."""
        return {"version": VERSION}

    async def infer(self, raw_request: HttpRequest, raw_response: Response, model_name: str) -> Any:
        """KServe's own, which decodes the body instead of pydantic: that describes each of many thousand faults."""
        body = await raw_request.body()
        endpoints = V2Endpoints(self.dataplane, self.model_repository_extension)
        return await endpoints.infer(raw_request, raw_response, model_name, body)

    async def models(self) -> dict[str, Any]:
        """The models as KServe's V1 lists them, and as OpenAI does."""
        listed = openai_api.list_models(self.server)
        return {"models": [model["id"] for model in listed["data"]], **listed}

    async def model(self, name: str) -> dict[str, Any]:
        """One model as KServe's V1 shows it, and as OpenAI does."""
        return {"name": name, "ready": self.server.ready, **openai_api.show_model(self.server, name)}

    async def ready(self) -> Response:
        """Whether the base answers and the registry was read; what is served and what was refused."""
        server = self.server
        detail: dict[str, Any] = {"ready": server.ready, "live": server.alive, "draining": server.draining}
        if server.catalog is not None:
            detail["adapters"] = {name: v.name for name, v in sorted(server.catalog.names.items())}
            detail["refused"] = server.catalog.refused
            detail["missing"] = server.catalog.missing
            detail["registry_error"] = server.catalog.error
            canary = server.catalog.canary
            detail["canary"] = {
                "version": canary.candidate.name if canary.candidate else None,
                "backed_off": canary.backed_off,
            }
        if server.engine is not None:
            detail["engine"] = server.engine.unavailable or ("running" if server.alive else "stopped")
        return ORJSONResponse(detail, 200 if server.ready else 503)

    async def card(self, name: str) -> Response:
        """The model card of an adapter, by any name of it in /openai/v1/models: Markdown."""
        _, catalog, _ = self.server.require_ready()
        version = catalog.names.get(slug(name))
        if version is None:
            raise ApiError(
                404, "no_card", f"There is no model card of {name[:100]!r}: adapters have one, by their names."
            )
        try:
            text = await asyncio.to_thread(catalog.source.card, version)
        except UserError as e:
            raise ApiError(503, "registry", str(e), retry_after=30) from e
        return PlainTextResponse(text, media_type="text/markdown", headers={"X-Content-Type-Options": "nosniff"})

    def _add_exception_handlers(self, app: FastAPI) -> None:
        super()._add_exception_handlers(app)

        async def api_error(request: HttpRequest, e: ApiError) -> Response:
            return error_response(request.url.path, e)

        async def invalid(request: HttpRequest, e: RequestValidationError) -> Response:
            first = e.errors()[0]
            param = faulty_field(first["loc"])
            error = ApiError(400, "invalid_request", f"{param or 'body'}: {first['msg']}", param=param or None)
            if not param and not _says_json(request.headers.get("content-type", "")):
                error = ApiError(415, "unsupported_media_type", f"{_NOT_READ}.")
            return error_response(request.url.path, error)

        async def invalid_input(request: HttpRequest, e: InvalidInput) -> Response:
            return error_response(request.url.path, ApiError(400, "invalid_request", e.reason))

        async def http_error(request: HttpRequest, e: HTTPException) -> Response:
            code = {404: "not_found", 405: "method_not_allowed"}.get(e.status_code, "invalid_request")
            message = f"{request.method} {request.url.path[:100]}: {e.detail}."
            response = error_response(request.url.path, ApiError(e.status_code, code, message))
            response.headers.update(e.headers or {})
            return response

        async def unsupported(request: HttpRequest, e: NotImplementedError) -> Response:
            message = "Neither explanations nor V2 model versions are served: name the version in the model's name."
            return error_response(request.url.path, ApiError(400, "unsupported", message))

        app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
        app.add_exception_handler(NotImplementedError, unsupported)  # type: ignore[arg-type]
        app.add_exception_handler(ApiError, api_error)  # type: ignore[arg-type]
        app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
        app.add_exception_handler(InvalidInput, invalid_input)  # type: ignore[arg-type]

    def _add_middlewares(self, app: FastAPI) -> None:
        app.add_middleware(RequestGuard, limits=self.server.limits, keys=self.keys)
        if self.server.cors_origins:  # outermost: a browser's preflight has no key
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.server.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", VERSION_HEADER, RELEASE_HEADER, "Retry-After"],
            )


def _says_json(content_type: str) -> bool:
    """Whether FastAPI reads a body as JSON, which it does not do unasked: any web page may send other types."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _Servicer(InferenceServicer):
    """KServe's gRPC service; says no with gRPC's own codes."""

    def __init__(self, dataplane: DataPlane, repository: ModelRepositoryExtension, keys: Keys | None):
        super().__init__(dataplane, repository)
        self.keys = keys

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        await self._check_key(context)
        try:
            return await super().ModelInfer(request, context)
        except ApiError as e:
            await context.abort(_STATUS.get(e.status, grpc.StatusCode.INTERNAL), e.message)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        await self._check_key(context)
        return await super().ServerMetadata(request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        await self._check_key(context)
        return await super().ModelMetadata(request, context)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        await self._check_key(context)
        return await super().ModelReady(request, context)

    async def _check_key(self, context: Any) -> None:
        """Probes, ServerLive and ServerReady, have no key; everything else needs one."""
        metadata = dict(context.invocation_metadata() or ())
        if self.keys is None:
            return
        owner = self.keys.owner(metadata.get("authorization"))
        if owner is None:
            message = "Give a valid key: authorization: Bearer KEY."
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
        else:
            OWNER.set(owner)


class Endpoint(kserve.ModelServer):
    """KServe's model server with one engine behind all of its models, drained at SIGTERM.

    Args:
        drain_seconds: how long requests may still run after SIGTERM.
        linger_seconds: how long new requests are still taken after SIGTERM, not ready any more, until every
            load balancer has noticed.
        workbench: serve the page for browsers at `/`.
    """

    def __init__(
        self,
        server: Server,
        sockets: tuple[Any, int],
        host: str,
        keys: Keys | None,
        drain_seconds: float,
        linger_seconds: float,
        workbench: bool,
    ):
        super().__init__(workers=1, enable_latency_logging=False, grace_period=int(drain_seconds))
        self.server, self.host, self.keys = server, host, keys
        self.socket, self.grpc_port = sockets
        self.linger_seconds, self.workbench = linger_seconds, workbench
        self.dataplane = _DataPlane(self.registered_models, server)
        self.model_repository_extension = _Repository(self.registered_models)

    def sync_models(self, names: set[str]) -> None:
        """Serve exactly `names`, and the base."""
        names = names | {BASE}
        for name in self.registered_models.get_models().keys() - names:
            del self.registered_models.models[name]
        for name in names - self.registered_models.get_models().keys():
            self.registered_models.update(NamedModel(name, self.server))

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Serve while `work` (loading, then following the registry) runs, until SIGTERM or SIGINT."""
        rest = _Rest(
            self.server,
            self.keys,
            self.workbench,
            self.socket,
            "kserve.model_server:app",
            self.dataplane,
            self.model_repository_extension,
            self.socket.getsockname()[1],
            grace_period=self.grace_period,
        )
        grpc_server = await self._start_grpc()
        tasks = [asyncio.create_task(rest.start()), asyncio.ensure_future(work())]
        stop = asyncio.Event()
        while not rest._server.started and not tasks[0].done():
            await asyncio.sleep(0.01)
        for sig in (signal.SIGTERM, signal.SIGINT):  # after uvicorn has set its own
            asyncio.get_running_loop().add_signal_handler(sig, stop.set)
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            self.server.draining = True
            if stop.is_set():
                log.info("stopping: no longer ready, running requests may end")
                await asyncio.sleep(self.linger_seconds)
            rest._server.should_exit = True
            await asyncio.gather(tasks[0], grpc_server.stop(self.grace_period))
            if tasks[1].done():
                tasks[1].result()
        finally:
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)

    async def _start_grpc(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            futures.ThreadPoolExecutor(max_workers=2),
            interceptors=(ExceptionToStatusInterceptor(),),
            options=[("grpc.max_receive_message_length", self.server.limits.body_bytes)],
        )
        servicer = _Servicer(self.dataplane, self.model_repository_extension, self.keys)
        v2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        host = f"[{self.host}]" if ":" in self.host else self.host
        try:
            self.grpc_port = server.add_insecure_port(f"{host}:{self.grpc_port}")
        except RuntimeError as e:
            raise UserError(f"Port {self.grpc_port} of {self.host} cannot be used for gRPC: choose another.") from e
        await server.start()
        return server
