"""One completion after another, whichever protocol asked: limits, text, stop strings, log probabilities, counts."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from transformers import PreTrainedTokenizerBase

from feyntune.engine.api import (
    ContextLengthError,
    Engine,
    EngineDeadError,
    EngineUnavailableError,
    NonFiniteError,
    QueueFullError,
    Sampling,
    Token,
)
from feyntune.model.load import prompt as prompt_ids
from feyntune.serving import metrics
from feyntune.serving.catalog import Catalog, Target
from feyntune.serving.text import Detokenizer, Stopper

OWNER: ContextVar[str] = ContextVar("owner", default="")  # whose key a request carries; owners are served in turn


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        body_bytes: largest HTTP body.
        body_seconds: time a client has to send it.
        choices: most completions (prompts times n).
        seconds: from arrival to the last token.
        stop, logprobs: most stop strings, and alternatives reported at each token.
        stop_characters: longest stop string.
    """

    body_bytes: int = 1 << 20
    body_seconds: float = 60.0
    choices: int = 64
    seconds: float = 300.0
    stop: int = 64
    stop_characters: int = 400
    logprobs: int = 20


class ApiError(Exception):
    """An answer that is not a completion. `code` is for programs, the message for people."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's error type."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error shape."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def outcome(self) -> str:
        """The label of its count in /metrics."""
        outcomes = {404: "unknown", 413: "too_large", 429: "busy", 503: "unavailable", 504: "timeout"}
        return outcomes.get(self.status, "invalid" if self.status < 500 else "error")


@dataclass(frozen=True)
class Chunk:
    """A part of a completion: its new text, the tokens behind it, and at the end why it ended."""

    text: str
    tokens: tuple[Token, ...] = ()
    offsets: tuple[int, ...] = ()  # where in the completion each token's text begins
    finish: str | None = None  # "stop" or "length"


@dataclass
class Server:
    """Everything a protocol needs. `catalog` and `engine` are there once the base has answered."""

    limits: Limits
    base_name: str
    tokenizer: PreTrainedTokenizerBase | None = None
    engine: Engine | None = None
    catalog: Catalog | None = None
    eos: frozenset[int] = frozenset()
    cors_origins: tuple[str, ...] = ()
    draining: bool = False
    started: float = field(default_factory=time.time)

    @property
    def ready(self) -> bool:
        return not self.draining and self.catalog is not None and self.catalog.settled and self.takes_requests

    @property
    def takes_requests(self) -> bool:
        return self.engine is not None and self.engine.alive() and self.engine.unavailable is None

    @property
    def alive(self) -> bool:
        """False only when a restart is the only help; a server that still loads is alive."""
        return self.engine is None or self.engine.alive()

    def require_ready(self) -> tuple[Engine, Catalog, PreTrainedTokenizerBase]:
        """The engine, the catalog and the tokenizer.

        Raises:
            ApiError: the base is still loading.
        """
        if self.engine is None or self.catalog is None or self.tokenizer is None:
            raise ApiError(503, "loading", "The base model is still loading: try again later.", retry_after=5)
        return self.engine, self.catalog, self.tokenizer

    def target(self, model: str) -> Target:
        _, catalog, _ = self.require_ready()
        target = catalog.resolve(model)
        if target is None:
            reason = catalog.why_not(model)
            if reason is not None:
                raise ApiError(503, "adapter_refused", f"{model[:100]} is not served: {reason}", param="model")
            known = ", ".join(["base", *sorted(catalog.names)])
            raise ApiError(
                404, "model_not_found", f"There is no model {model[:100]!r}; there are: {known}.", param="model"
            )
        return target

    async def tokens(self, text: str) -> list[int]:
        """Token ids of a prompt; long ones are read in a thread, so that nobody waits for them.

        A prompt that begins with the text of BOS, as chat front ends paste it, has it once: no text of the training
        began with two.
        """
        _, _, tokenizer = self.require_ready()
        ids = (
            prompt_ids(tokenizer, text) if len(text) < 10_000 else await asyncio.to_thread(prompt_ids, tokenizer, text)
        )
        return ids[1:] if ids[1:2] == [tokenizer.bos_token_id] else ids

    async def chat_tokens(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation, by the base's chat template or the one given at start."""
        _, _, tokenizer = self.require_ready()
        if not tokenizer.chat_template:
            message = f"{self.base_name} is a base model without a chat template: send a prompt to completions instead"
            raise ApiError(
                400,
                "no_chat_template",
                f"{message}, or start the server with --chat-template.",
                param="messages",
            )
        template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        try:
            ids: Any = await asyncio.to_thread(template, messages, add_generation_prompt=add_generation_prompt)
        except Exception as e:  # a template raises what it likes at conversations it does not allow
            raise ApiError(400, "invalid_messages", f"The chat template refuses this: {e}", param="messages") from e
        return list(ids)


class CompletionRequest:
    """The completions one client asked for at once, counted and cancelled together.

    with CompletionRequest(server, "champion", "openai") as request:
        choice = request.complete(ids, sampling, stop)
        async for piece in choice: ...
    """

    def __init__(self, server: Server, model: str, protocol: str):
        self.server, self.protocol = server, protocol
        self.label = "unknown"
        self.target: Target | None = None
        self.deadline = asyncio.get_running_loop().time() + server.limits.seconds
        self._model = model
        self._completions: list[Completion] = []
        self._held = ExitStack()  # the adapter: a promotion meanwhile changes nothing for this request

    def __enter__(self) -> "CompletionRequest":
        try:
            self.target = self.server.target(self._model)
        except ApiError as e:
            metrics.REQUESTS.labels(self.label, self.protocol, e.outcome).inc()
            raise
        self.label = self.target.label
        engine, _, _ = self.server.require_ready()
        self._held.enter_context(engine.hold(self.target.key))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Free what still runs; count; turn the engine's error into a client's."""
        for completion in self._completions:
            completion.close()
        self._held.close()
        if isinstance(error, NonFiniteError) and self.target and self.target.version and self.server.catalog:
            self.server.catalog.quarantine(self.target.version, str(error))
        reported = to_api_error(error)
        if reported is not None:
            outcome = reported.outcome
        elif error is None:
            outcome = "ok"
        else:
            gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
            outcome = "cancelled" if gone else "error"
        metrics.REQUESTS.labels(self.label, self.protocol, outcome).inc()
        if self.target and self.target.arm and self.target.version and self.server.catalog:
            failed = outcome in ("error", "timeout", "unavailable")
            self.server.catalog.canary.record(self.target.arm, self.target.version, failed)
        if reported is not None and reported is not error:
            raise reported from error

    def complete(self, ids: Sequence[int], sampling: Sampling, stop: Sequence[str] = ()) -> "Completion":
        """Submit one completion."""
        assert self.target is not None
        choice = Completion(self, list(ids), sampling, stop)
        self._completions.append(choice)
        return choice

    async def score(self, ids: Sequence[int], top: int) -> list[Token]:
        """The prompt's own log probabilities (OpenAI's `echo`)."""
        engine, _, _ = self.server.require_ready()
        assert self.target is not None
        metrics.TOKENS.labels(self.label, "prompt").inc(len(ids))
        async with asyncio.timeout_at(self.deadline):
            return await engine.score(self.target.key, ids, top, OWNER.get())


class Completion:
    """One completion as it comes: iterate over its pieces."""

    def __init__(self, request: CompletionRequest, ids: list[int], sampling: Sampling, stop: Sequence[str]):
        engine, _, tokenizer = request.server.require_ready()
        assert request.target is not None
        self._request, self._engine, self._sampling = request, engine, sampling
        self._detokenizer, self._stopper = Detokenizer(tokenizer, ids), Stopper(stop)
        self._generation = engine.submit(request.target.key, ids, sampling, OWNER.get())
        self._submitted = time.monotonic()
        self.prompt_tokens, self.completion_tokens = len(ids), 0
        metrics.TOKENS.labels(request.label, "prompt").inc(len(ids))

    def close(self) -> None:
        """Free its place, if it still has one."""
        self._engine.cancel(self._generation)

    async def text(self) -> tuple[str, str]:
        """The whole completion and why it ended; raises as iterating does."""
        pieces = [piece async for piece in self]
        return "".join(p.text for p in pieces), pieces[-1].finish or ""

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Raises TimeoutError at the request's deadline, EngineDeadError when the engine fails."""
        tokens = aiter(self._generation)
        pending: list[tuple[Token, int]] = []  # tokens some of whose text is held back, and where it begins
        first = last = 0.0
        shown = 0
        finish = "length"
        try:
            while not self._stopper.stopped:
                try:
                    async with asyncio.timeout_at(self._request.deadline):
                        token = await anext(tokens)
                except StopAsyncIteration:
                    break
                last = time.monotonic()
                if not first:
                    first = last
                    metrics.FIRST_TOKEN.labels(self._request.label).observe(first - self._submitted)
                self.completion_tokens += 1
                eos = token.id in self._request.server.eos and not self._sampling.ignore_eos
                if eos or token.id in self._sampling.stop_token_ids:
                    finish = "stop"
                pending.append((token, self._detokenizer.length))
                text = self._stopper.add(self._detokenizer.add(token.id))
                shown += len(text)
                if not self._stopper.stopped and not self._stopper.holding:
                    yield _chunk(text, pending)
                    pending = []
                elif text:
                    yield Chunk(text)
        finally:
            self.close()  # one that met its stop string is not over for the engine
            self._count(first, last)
        rest = "" if self._stopper.stopped else self._stopper.add(self._detokenizer.end()) + self._stopper.end()
        if self._stopper.stopped:
            finish = "stop"
            pending = [(token, offset) for token, offset in pending if offset < shown]
        yield _chunk(rest, pending, finish)

    def _count(self, first: float, last: float) -> None:
        metrics.TOKENS.labels(self._request.label, "completion").inc(self.completion_tokens)
        if self.completion_tokens > 1:
            metrics.PER_TOKEN.labels(self._request.label).observe((last - first) / (self.completion_tokens - 1))


def _chunk(text: str, pending: list[tuple[Token, int]], finish: str | None = None) -> Chunk:
    return Chunk(text, tuple(t for t, _ in pending), tuple(o for _, o in pending), finish)


def to_api_error(error: BaseException | None) -> ApiError | None:
    """`error` as a client gets it; None where it is not for a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, "context_length_exceeded", str(error), param="max_tokens")
    if isinstance(error, QueueFullError):
        return ApiError(429, "queue_full", str(error), retry_after=error.retry_after)
    if isinstance(error, EngineDeadError):
        return ApiError(503, "engine_stopped", str(error), retry_after=30)
    if isinstance(error, EngineUnavailableError):
        return ApiError(503, "engine_restarting", str(error), retry_after=5)
    if isinstance(error, NonFiniteError):
        return ApiError(500, "not_finite", str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "timeout", "The completion took longer than this server allows: ask for fewer tokens.")
    return None
