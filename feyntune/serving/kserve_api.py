"""KServe's V1 and V2 protocols, REST and gRPC, through KServe's own server, and the server itself.

V1: `{"instances": ["text", …], "parameters": {"max_tokens": 16, …}}` gives `{"predictions": ["text", …]}`.
V2: a BYTES tensor `text` of shape [n], the same parameters; gives BYTES tensors `text` and `finish_reason` [n].
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any
from uuid import uuid4

_arguments, sys.argv = sys.argv, sys.argv[:1]  # kserve parses the command line when imported: it is not for it
import kserve  # noqa: E402
from kserve.errors import InvalidInput  # noqa: E402
from kserve.protocol.dataplane import DataPlane  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as v2_grpc  # noqa: E402
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor  # noqa: E402
from kserve.protocol.grpc.servicer import InferenceServicer  # noqa: E402
from kserve.protocol.model_repository_extension import ModelRepositoryExtension  # noqa: E402
from kserve.protocol.rest.server import RESTServer  # noqa: E402

sys.argv = _arguments

import grpc  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.middleware.cors import CORSMiddleware  # noqa: E402
from fastapi.requests import Request as HttpRequest  # noqa: E402
from fastapi.responses import ORJSONResponse, PlainTextResponse, Response  # noqa: E402
from fastapi.routing import APIRoute  # noqa: E402
from pydantic import BaseModel, ConfigDict, Field, ValidationError  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

from feyntune.constants import RELEASE_HEADER, VERSION_HEADER  # noqa: E402
from feyntune.engine.api import Sampling  # noqa: E402
from feyntune.errors import UserError  # noqa: E402
from feyntune.names import BASE, slug  # noqa: E402
from feyntune.serving import openai_api, tokenize_api  # noqa: E402
from feyntune.serving.completions import OWNER, ApiError, CompletionRequest, Server  # noqa: E402
from feyntune.serving.guard import Keys, RequestGuard, error_response  # noqa: E402
from feyntune.serving.workbench import add_workbench  # noqa: E402
from feyntune.telemetry import log  # noqa: E402


class Parameters(BaseModel):
    """What V1 and V2 requests may set. Greedy unless asked otherwise."""

    model_config = ConfigDict(extra="forbid")

    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []

    @classmethod
    def read(cls, given: Any) -> "Parameters":
        if isinstance(given, dict) and isinstance(given.get("stop"), str):
            given = given | {"stop": [given["stop"]]}
        try:
            return cls.model_validate(given)
        except ValidationError as e:
            error = e.errors()[0]
            field = ".".join(str(p) for p in error["loc"]) or "parameters"
            raise InvalidInput(f"{field}: {error['msg']}") from e


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
        if len(asked.stop) > limits.stop or not all(0 < len(s) <= limits.stop_characters for s in asked.stop):
            raise InvalidInput(f"stop: at most {limits.stop} strings of 1 to {limits.stop_characters} characters")
        prompts = [await self.server.tokens(text) for text in texts]
        with CompletionRequest(self.server, self.name, protocol) as request:
            choices = []
            for ids in prompts:
                seed = None if asked.seed is None else asked.seed % 2**63
                sampling = Sampling(asked.max_tokens, asked.temperature, asked.top_p, seed)
                choices.append(request.complete(ids, sampling, asked.stop))
            return list(await asyncio.gather(*(choice.text() for choice in choices)))
        raise AssertionError("unreachable")


def _v1_texts(payload: Any) -> list[str]:
    instances = payload.get("instances") if isinstance(payload, dict) else None
    if not isinstance(instances, list) or not all(isinstance(i, str) for i in instances):
        raise InvalidInput('send JSON: {"instances": ["text", ...], "parameters": {"max_tokens": 16}}')
    return instances


def _v2_texts(payload: kserve.InferRequest) -> list[str]:
    if len(payload.inputs) != 1 or payload.inputs[0].name != "text" or payload.inputs[0].datatype != "BYTES":
        raise InvalidInput("send one input tensor, `text`, of datatype BYTES")
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

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().decode(*args, **kwargs)
        except InvalidInput:
            raise
        except Exception as e:  # whatever is wrong with it, the body is the client's
            raise InvalidInput(f"the request cannot be read ({type(e).__name__}: {e})") from e


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
        app.title = "feyntune"
        openai = openai_api.router(self.server)
        app.include_router(openai)
        app.include_router(tokenize_api.router(self.server))
        for route in openai.routes:  # /v1/models is KServe's
            if isinstance(route, APIRoute) and "POST" in (route.methods or ()):
                path = route.path.removeprefix("/openai")
                app.add_api_route(path, route.endpoint, methods=["POST"], include_in_schema=False)
        add_workbench(app, self.workbench, self.dataplane.live)
        app.add_api_route("/cards/{name}", self.card, response_class=PlainTextResponse, responses={404: {}, 503: {}})
        app.add_api_route("/v2/health/ready", self.ready, tags=["V2"], responses={503: {}})
        super()._register_endpoints(app)

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
            param = ".".join(str(p) for p in first["loc"] if p != "body").encode(errors="replace").decode()
            error = ApiError(400, "invalid_request", f"{param or 'body'}: {first['msg']}", param=param or None)
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
