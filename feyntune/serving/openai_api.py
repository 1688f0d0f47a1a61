"""OpenAI's completions, chat completions and models, as its clients expect them.

A setting that this server cannot honor is refused, never ignored.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import ORJSONResponse, StreamingResponse

from feyntune.constants import VERSION_HEADER
from feyntune.engine.api import Token
from feyntune.names import BASE, slug
from feyntune.serving.completions import ApiError, Chunk, Completion, CompletionRequest, Server
from feyntune.serving.openai_fields import ChatBody, CompletionBody, OpenAIFields
from feyntune.serving.text import Detokenizer

PREFIX = "/openai/v1"
_CHAT_TOKENS = 1024  # at most, where a conversation asks for no number: memory is set aside for each


def router(server: Server) -> APIRouter:
    """The routes under /openai/v1."""
    routes = APIRouter(prefix=PREFIX, tags=["OpenAI"], default_response_class=ORJSONResponse)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": what}
        for status, what in {
            400: "A setting is wrong, or prompt and completion are too long",
            401: "No key, or a wrong one",
            404: "There is no such model",
            413: "The body is too large",
            415: "The body is not sent as application/json",
            429: "The queue is full: see Retry-After",
            503: "Loading, or stopping",
            504: "It took too long",
        }.items()
    }

    @routes.get("/models", responses=errors)
    async def models() -> dict[str, Any]:
        """The base, the adapters and the aliases, with their lineage."""
        return list_models(server)

    @routes.get("/models/{model:path}", responses=errors)
    async def model(model: str) -> dict[str, Any]:
        """One of them, by any of its names."""
        return show_model(server, model)

    @routes.post("/completions", responses=errors)
    async def completions(asked: CompletionBody) -> Response:
        """Complete one or more prompts."""
        return await _completions(server, asked)

    @routes.post("/chat/completions", responses=errors)
    async def chat(asked: ChatBody) -> Response:
        """Answer a conversation; where the base model has a chat template or the server was given one."""
        return await _chat(server, asked)

    return routes


def list_models(server: Server) -> dict[str, Any]:
    """OpenAI's list of models."""
    _, catalog, _ = server.require_ready()
    names = [BASE, *sorted(catalog.names, key=lambda n: (n in catalog.aliases, n))]
    return {"object": "list", "data": [_model(server, name) for name in names]}


def show_model(server: Server, model: str) -> dict[str, Any]:
    """OpenAI's description of a model, by any of its names."""
    _, catalog, _ = server.require_ready()
    target = server.target(model)
    name = slug(model)
    return _model(server, name if name in catalog.names else target.label)


def _model(server: Server, name: str) -> dict[str, Any]:
    engine, catalog, _ = server.require_ready()
    shown = {
        "id": name,
        "object": "model",
        "created": int(server.started),
        "owned_by": "feyntune",
        "max_model_len": engine.max_length,
    }
    if name == BASE:
        return shown | {"root": server.base_name, "parent": None, "digest": catalog.base_digest}
    version = catalog.names[name]
    same = sorted(a for a in catalog.aliases if catalog.names[a] == version and a != name)
    return shown | {
        "root": version.name,
        "version": version.name,
        "parent": BASE,
        "variant": version.variant,
        "digest": version.digest,
        "alias": name in catalog.aliases,
        "aliases": same,
        **version.stats,
    }


@dataclass
class _Prompt:
    ids: list[int]
    text: str


async def _completions(server: Server, asked: CompletionBody) -> Response:
    engine, _, _ = server.require_ready()
    max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
    stop = asked.stops(server.limits.stop)
    _check(server, asked, max_tokens, engine.vocabulary)
    prompts = await _prompts(server, asked.prompt)
    n = asked.n or 1
    _check_choices(server, len(prompts) * n)
    for prompt in prompts:
        _check_prompt(prompt.ids, max_tokens, engine.max_length, engine.vocabulary)

    async def begin(request: CompletionRequest) -> list[_EchoedCompletion]:
        echoes: list[Chunk | None] = [None] * len(prompts)
        if asked.echo:
            scores = [[Token(t) for t in prompt.ids] for prompt in prompts]
            if asked.logprobs is not None:
                scores = await _gather([request.score(prompt.ids, asked.logprobs) for prompt in prompts])
            for i, (prompt, scored) in enumerate(zip(prompts, scores, strict=True)):
                echoes[i] = _echo(server, prompt, scored, "length" if max_tokens == 0 else None)
        begun = []
        for i in range(len(prompts) * n):
            sampling = asked.sampling(i % n, max_tokens, engine.vocabulary, asked.logprobs)
            choice = request.complete(prompts[i // n].ids, sampling, stop) if max_tokens else None
            begun.append(_EchoedCompletion(echoes[i // n], choice))
        return begun

    def shown(index: int, chunk: Chunk) -> dict[str, Any]:
        logprobs = None if asked.logprobs is None else _logprobs(server, chunk)
        return {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": chunk.finish}

    answer = _Answer(server, asked, "cmpl-", "text_completion", "text_completion", begin, shown, shown)
    return await answer.send(sum(len(p.ids) for p in prompts))


async def _chat(server: Server, asked: ChatBody) -> Response:
    engine, _, _ = server.require_ready()
    server.target(asked.model)
    ids = await server.chat_tokens([m.shown for m in asked.messages])
    max_tokens = (
        asked.max_completion_tokens or asked.max_tokens or max(1, min(_CHAT_TOKENS, engine.max_length - len(ids)))
    )
    stop = asked.stops(server.limits.stop)
    n = asked.n or 1
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    if asked.top_logprobs and top is None:
        raise ApiError(400, "invalid_value", "top_logprobs needs logprobs: true.", param="top_logprobs")
    _check_logprobs(server, top, engine.vocabulary, "top_logprobs")
    _check_choices(server, n)
    _check_prompt(ids, max_tokens, engine.max_length, engine.vocabulary)

    async def begin(request: CompletionRequest) -> list[_EchoedCompletion]:
        settings = [asked.sampling(k, max_tokens, engine.vocabulary, top) for k in range(n)]
        return [_EchoedCompletion(None, request.complete(ids, sampling, stop)) for sampling in settings]

    def probabilities(chunk: Chunk) -> dict[str, Any] | None:
        return None if top is None else _chat_logprobs(server, chunk)

    began: set[int] = set()

    def delta(index: int, chunk: Chunk) -> dict[str, Any]:
        content = {"content": chunk.text} if index in began else {"role": "assistant", "content": chunk.text}
        began.add(index)  # clients put the deltas together, the role's too
        return {"index": index, "delta": content, "logprobs": probabilities(chunk), "finish_reason": chunk.finish}

    def message(index: int, chunk: Chunk) -> dict[str, Any]:
        content = {"role": "assistant", "content": chunk.text}
        return {"index": index, "message": content, "logprobs": probabilities(chunk), "finish_reason": chunk.finish}

    answer = _Answer(server, asked, "chatcmpl-", "chat.completion", "chat.completion.chunk", begin, message, delta)
    return await answer.send(len(ids))


def _check(server: Server, asked: CompletionBody, max_tokens: int, vocabulary: int) -> None:
    if asked.best_of not in (None, asked.n or 1):
        raise ApiError(400, "unsupported", "best_of: leave it out, or set it to n.", param="best_of")
    if max_tokens == 0 and not asked.echo:
        raise ApiError(400, "invalid_value", "max_tokens is 0 without echo: nothing to do.", param="max_tokens")
    _check_logprobs(server, asked.logprobs, vocabulary, "logprobs")


def _check_logprobs(server: Server, logprobs: int | None, vocabulary: int, param: str) -> None:
    most = min(server.limits.logprobs, vocabulary)
    if logprobs is not None and logprobs > most:
        raise ApiError(400, "invalid_value", f"{param} can be at most {most}.", param=param)


async def _gather(work: Sequence[Coroutine[Any, Any, list[Token]]]) -> list[list[Token]]:
    """The results of all; when one fails or the caller is cancelled, the others are cancelled too."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _check_choices(server: Server, choices: int) -> None:
    if choices > server.limits.choices:
        message = f"{choices} completions are asked for, prompts times n: at most {server.limits.choices} at once."
        raise ApiError(400, "too_many_choices", message, param="n")


def _check_prompt(ids: Sequence[int], max_tokens: int, longest: int, vocabulary: int) -> None:
    if len(ids) + max_tokens > longest:
        message = (
            f"The prompt has {len(ids)} tokens and max_tokens is {max_tokens}: together at most {longest} fit. "
            "Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, "context_length_exceeded", message, param="prompt")
    if any(t >= vocabulary for t in ids):
        message = f"Token {max(ids)} is not in the vocabulary: ids are below {vocabulary}."
        raise ApiError(400, "invalid_value", message, param="prompt")


async def _prompts(server: Server, prompt: str | list[Any]) -> list[_Prompt]:
    """All the shapes a prompt may have: a text, texts, token ids, lists of token ids."""
    _, _, tokenizer = server.require_ready()
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    _check_choices(server, len(prompt))
    prompts = []
    for p in prompt:
        if isinstance(p, str):
            prompts.append(_Prompt(await server.tokens(p), p))
        else:
            text = tokenizer.backend_tokenizer.decode(p, skip_special_tokens=True)
            prompts.append(_Prompt(p, text))
    return prompts


def _echo(server: Server, prompt: _Prompt, tokens: list[Token], finish: str | None) -> Chunk:
    _, _, tokenizer = server.require_ready()
    detokenizer = Detokenizer(tokenizer)
    offsets = []
    for token in tokens:
        offsets.append(detokenizer.length)
        detokenizer.add(token.id)
    return Chunk(prompt.text, tuple(tokens), tuple(offsets), finish)


def _logprobs(server: Server, chunk: Chunk) -> dict[str, Any]:
    """OpenAI's arrays of the completions endpoint."""
    _, _, tokenizer = server.require_ready()
    tops: list[dict[str, float] | None] = []
    names = []
    for t in chunk.tokens:
        known = dict([(t.id, t.logprob), *t.top])
        spelled = _spell_apart(tokenizer, list(known))
        names.append(spelled[t.id])
        tops.append(None if t.logprob is None else {spelled[i]: p for i, p in known.items() if p is not None})
    return {
        "tokens": names,
        "token_logprobs": [t.logprob for t in chunk.tokens],
        "top_logprobs": tops,
        "text_offset": list(chunk.offsets),
    }


def _chat_logprobs(server: Server, chunk: Chunk) -> dict[str, Any]:
    """OpenAI's list of the chat endpoint."""
    _, _, tokenizer = server.require_ready()

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = _spell(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top]} for t in chunk.tokens]
    return {"content": content, "refusal": None}


def _spell_apart(tokenizer: Any, tokens: Sequence[int]) -> dict[int, str]:
    """Each token as text, no two alike: SentencePiece's "\u2581the" and "the" both decode to "the"."""
    spelled = {token: _spell(tokenizer, token) for token in tokens}
    if len(set(spelled.values())) == len(spelled):
        return spelled
    count = Counter(spelled.values())
    return {t: s if count[s] == 1 else tokenizer.convert_ids_to_tokens(t) for t, s in spelled.items()}


@lru_cache(maxsize=1 << 17)  # an answer may name twenty tokens at each of thousands of positions
def _spell(tokenizer: Any, token: int) -> str:
    """A token as text; one that is no whole character as the vocabulary spells it."""
    text = tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.convert_ids_to_tokens(token) or "" if "\ufffd" in text or not text else text


@dataclass
class _EchoedCompletion:
    """One completion: the echoed prompt, if asked for, and what is generated after it, if anything."""

    echo: Chunk | None
    generated: Completion | None

    async def chunks(self) -> AsyncIterator[Chunk]:
        if self.echo is not None:
            yield self.echo
        if self.generated is not None:
            start = len(self.echo.text) if self.echo else 0
            async for chunk in self.generated:
                yield replace(chunk, offsets=tuple(start + o for o in chunk.offsets))


@dataclass
class _Answer:
    """Several completions as one response, whole or streamed."""

    server: Server
    asked: OpenAIFields
    prefix: str
    whole: str  # OpenAI's `object`
    chunk: str
    begin: Callable[[CompletionRequest], Awaitable[list[_EchoedCompletion]]]
    show_whole: Callable[[int, Chunk], dict[str, Any]]
    show_chunk: Callable[[int, Chunk], dict[str, Any]]

    async def send(self, prompt_tokens: int) -> Response:
        self.id = f"{self.prefix}{uuid4().hex}"
        self.created = int(time.time())
        self.prompt_tokens = prompt_tokens
        chunks = self._chunks()
        if not self.asked.stream:
            async with aclosing(chunks):
                whole = await self._all(chunks)
                return ORJSONResponse(whole, headers=self._headers())
        try:
            first = await anext(chunks)  # what is refused is refused with a status, not inside a stream
        except BaseException:
            await chunks.aclose()
            raise
        return _Stream(self._events(first, chunks), media_type="text/event-stream", headers=self._headers())

    async def _chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        with CompletionRequest(self.server, self.asked.model, "openai") as request:
            self.target = request.target
            self.choices = await self.begin(request)
            async with aclosing(_merged([c.chunks() for c in self.choices])) as merged:
                async for item in merged:
                    yield item

    async def _all(self, chunks: AsyncGenerator[tuple[int, Chunk], None]) -> dict[str, Any]:
        parts: dict[int, list[Chunk]] = {}
        async for index, chunk in chunks:
            parts.setdefault(index, []).append(chunk)
        shown = [self.show_whole(i, _joined(parts[i])) for i in sorted(parts)]
        return self._frame(self.whole) | {"choices": shown, "usage": self._usage()}

    async def _events(
        self, first: tuple[int, Chunk], chunks: AsyncGenerator[tuple[int, Chunk], None]
    ) -> AsyncGenerator[bytes, None]:
        usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        frame = self._frame(self.chunk) | ({"usage": None} if usage else {})
        async with aclosing(chunks):
            try:
                yield _event(frame | {"choices": [self.show_chunk(*first)]})
                async for index, chunk in chunks:
                    if chunk.text or chunk.tokens or chunk.finish:
                        yield _event(frame | {"choices": [self.show_chunk(index, chunk)]})
            except ApiError as e:
                yield _event(e.body)
                return
        if usage:
            yield _event(frame | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _headers(self) -> dict[str, str]:
        """Which version answered: a name such as `champion` may mean another one at the next request."""
        version = self.target.version if self.target else None
        return {VERSION_HEADER: version.name if version else BASE}

    def _frame(self, kind: str) -> dict[str, Any]:
        version = self.target.version if self.target else None
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": slug(version.name) if version else BASE,
            "system_fingerprint": version.digest[:16] if version else None,
        }

    def _usage(self) -> dict[str, int]:
        made = sum(c.generated.completion_tokens for c in self.choices if c.generated)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


class _Stream(StreamingResponse):
    """Closes its chunks when the client goes away, wherever that catches it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _joined(chunks: list[Chunk]) -> Chunk:
    return Chunk(
        "".join(p.text for p in chunks),
        tuple(t for p in chunks for t in p.tokens),
        tuple(o for p in chunks for o in p.offsets),
        chunks[-1].finish,
    )


async def _merged(streams: list[AsyncIterator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all streams as they come, each with the number of its stream."""
    arrived: asyncio.Queue[tuple[int, Chunk] | BaseException | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait((index, chunk))
        except Exception as e:
            arrived.put_nowait(e)
        arrived.put_nowait(None)

    tasks = [asyncio.create_task(read(i, s)) for i, s in enumerate(streams)]
    try:
        open_streams = len(tasks)
        while open_streams:
            item = await arrived.get()
            if item is None:
                open_streams -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
