"""OpenAI's completions, chat completions and models, as its clients expect them.

A setting that this server cannot honour is refused, never ignored.
"""

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from uuid import uuid4

import orjson
from fastapi import APIRouter, Response
from fastapi.responses import ORJSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from feyntune.engine.api import Sampling, Token
from feyntune.names import BASE, slug
from feyntune.serving.completions import ApiError, Chunk, Completion, CompletionRequest, Server
from feyntune.serving.text import Detokenizer

PREFIX = "/openai/v1"
_CHAT_TOKENS = 1024  # at most, where a conversation asks for no number: memory is set aside for each


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
# Tokenizers hold ids in 32 bits; whether the model knows one is looked at later.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = False


class _SamplingFields(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="forbid")

    model: Name
    temperature: float | None = Field(None, ge=0, le=2, description="1 if not given; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    ignore_eos: bool | None = Field(False, description="go on to max_tokens (for measurements)")
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    def stops(self, most: int) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > most or not all(stop):
            raise ApiError(
                400, "invalid_value", f"stop: give at most {most} strings, none of them empty.", param="stop"
            )
        return stop

    def sampling(self, index: int, max_tokens: int, logprobs: int | None = None) -> Sampling:
        """Of choice number `index`: with a seed, each choice has its own and keeps it."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + index) % 2**63,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(_SamplingFields):
    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=0, description="16 if not given; 0 needs echo")
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, description="n, or not given")
    suffix: Literal[""] | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "developer"]
    content: Text | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None


class ChatBody(_SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)


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
            429: "The queue is full: see Retry-After",
            503: "Loading, or stopping",
            504: "It took too long",
        }.items()
    }

    @routes.get("/models", responses=errors)
    async def models() -> dict[str, Any]:
        """The base, the adapters and the aliases, with their lineage."""
        _, catalog, _ = server.require_ready()
        names = [BASE, *sorted(catalog.names, key=lambda n: (n in catalog.aliases, n))]
        return {"object": "list", "data": [_model(server, name) for name in names]}

    @routes.get("/models/{model:path}", responses=errors)
    async def model(model: str) -> dict[str, Any]:
        """One of them, by any of its names."""
        _, catalog, _ = server.require_ready()
        target = server.target(model)
        name = slug(model)
        if name not in catalog.names:
            name = target.label
        return _model(server, name)

    @routes.post("/completions", responses=errors)
    async def completions(asked: CompletionBody) -> Response:
        """Complete one or more prompts."""
        return await _completions(server, asked)

    @routes.post("/chat/completions", responses=errors)
    async def chat(asked: ChatBody) -> Response:
        """Answer a conversation; only where the base model has a chat template."""
        return await _chat(server, asked)

    return routes


def _model(server: Server, name: str) -> dict[str, Any]:
    _, catalog, _ = server.require_ready()
    shown = {"id": name, "object": "model", "created": int(server.started), "owned_by": "feyntune"}
    if name == BASE:
        return shown | {"root": server.base_name, "parent": None, "digest": catalog.base_digest}
    version = catalog.names[name]
    same = sorted(a for a in catalog.aliases if catalog.names[a] == version and a != name)
    return shown | {
        "root": version.name,
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
            for i, prompt in enumerate(prompts):
                scored = [Token(t) for t in prompt.ids]
                if asked.logprobs is not None:
                    scored = await request.score(prompt.ids, asked.logprobs)
                echoes[i] = _echo(server, prompt, scored, "length" if max_tokens == 0 else None)
        begun = []
        for i in range(len(prompts) * n):
            sampling = asked.sampling(i, max_tokens, asked.logprobs)
            choice = request.complete(prompts[i // n].ids, sampling, stop) if max_tokens else None
            begun.append(_EchoedCompletion(echoes[i // n], choice))
        return begun

    def shown(index: int, piece: Chunk) -> dict[str, Any]:
        logprobs = None if asked.logprobs is None else _logprobs(server, piece)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}

    answer = _Answer(server, asked, "cmpl-", "text_completion", "text_completion", begin, shown, shown)
    return await answer.send(sum(len(p.ids) for p in prompts))


async def _chat(server: Server, asked: ChatBody) -> Response:
    engine, _, tokenizer = server.require_ready()
    server.target(asked.model)
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "no_chat_template",
            f"{server.base_name} is a base model without a chat template: send a prompt to {PREFIX}/completions.",
            param="messages",
        )
    messages = [
        {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
        for m in asked.messages
    ]
    template = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    try:
        ids: Any = await asyncio.to_thread(template, messages)
    except Exception as e:  # a template raises what it likes at conversations it does not allow
        raise ApiError(400, "invalid_messages", f"The chat template refuses this: {e}", param="messages") from e
    max_tokens = (
        asked.max_completion_tokens or asked.max_tokens or max(1, min(_CHAT_TOKENS, engine.max_length - len(ids)))
    )
    stop = asked.stops(server.limits.stop)
    n = asked.n or 1
    _check_choices(server, n)
    _check_prompt(ids, max_tokens, engine.max_length, engine.vocabulary)

    async def begin(request: CompletionRequest) -> list[_EchoedCompletion]:
        return [_EchoedCompletion(None, request.complete(ids, asked.sampling(k, max_tokens), stop)) for k in range(n)]

    began: set[int] = set()

    def delta(index: int, piece: Chunk) -> dict[str, Any]:
        said = {"content": piece.text} if index in began else {"role": "assistant", "content": piece.text}
        began.add(index)  # clients put the deltas together, the role's too
        return {"index": index, "delta": said, "logprobs": None, "finish_reason": piece.finish}

    def message(index: int, piece: Chunk) -> dict[str, Any]:
        said = {"role": "assistant", "content": piece.text}
        return {"index": index, "message": said, "logprobs": None, "finish_reason": piece.finish}

    answer = _Answer(server, asked, "chatcmpl-", "chat.completion", "chat.completion.chunk", begin, message, delta)
    return await answer.send(len(ids))


def _check(server: Server, asked: CompletionBody, max_tokens: int, vocabulary: int) -> None:
    if asked.best_of not in (None, asked.n or 1):
        raise ApiError(400, "unsupported", "best_of: leave it out, or set it to n.", param="best_of")
    if max_tokens == 0 and not asked.echo:
        raise ApiError(400, "invalid_value", "max_tokens is 0 without echo: nothing to do.", param="max_tokens")
    most = min(server.limits.logprobs, vocabulary)
    if asked.logprobs is not None and asked.logprobs > most:
        raise ApiError(400, "invalid_value", f"logprobs can be at most {most}.", param="logprobs")


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


def _logprobs(server: Server, piece: Chunk) -> dict[str, Any]:
    _, _, tokenizer = server.require_ready()
    tops: list[dict[str, float] | None] = []
    for t in piece.tokens:
        if t.logprob is None:
            tops.append(None)
        else:
            tops.append({_spelt(tokenizer, i): p for i, p in ((t.id, t.logprob), *t.top)})
    return {
        "tokens": [_spelt(tokenizer, t.id) for t in piece.tokens],
        "token_logprobs": [t.logprob for t in piece.tokens],
        "top_logprobs": tops,
        "text_offset": list(piece.offsets),
    }


def _spelt(tokenizer: Any, token: int) -> str:
    """A token as text; one that is no whole character as the vocabulary spells it, so that no two are alike."""
    text = tokenizer.backend_tokenizer.decode([token], skip_special_tokens=False)
    return tokenizer.convert_ids_to_tokens(token) or "" if "\ufffd" in text or not text else text


@dataclass
class _EchoedCompletion:
    """One completion: the echoed prompt, if asked for, and what is generated after it, if anything."""

    echo: Chunk | None
    generated: Completion | None

    async def pieces(self) -> AsyncIterator[Chunk]:
        if self.echo is not None:
            yield self.echo
        if self.generated is not None:
            start = len(self.echo.text) if self.echo else 0
            async for piece in self.generated:
                yield replace(piece, offsets=tuple(start + o for o in piece.offsets))


@dataclass
class _Answer:
    """Several completions as one response, whole or streamed."""

    server: Server
    asked: _SamplingFields
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
        pieces = self._pieces()
        if not self.asked.stream:
            async with aclosing(pieces):
                return ORJSONResponse(await self._all(pieces))
        try:
            first = await anext(pieces)  # what is refused is refused with a status, not inside a stream
        except BaseException:
            await pieces.aclose()
            raise
        return _Stream(self._events(first, pieces), media_type="text/event-stream")

    async def _pieces(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        with CompletionRequest(self.server, self.asked.model, "openai") as request:
            self.target = request.target
            self.choices = await self.begin(request)
            async with aclosing(_merged([c.pieces() for c in self.choices])) as merged:
                async for item in merged:
                    yield item

    async def _all(self, pieces: AsyncGenerator[tuple[int, Chunk], None]) -> dict[str, Any]:
        parts: dict[int, list[Chunk]] = {}
        async for index, piece in pieces:
            parts.setdefault(index, []).append(piece)
        shown = [self.show_whole(i, _joined(parts[i])) for i in sorted(parts)]
        return self._frame(self.whole) | {"choices": shown, "usage": self._usage()}

    async def _events(
        self, first: tuple[int, Chunk], pieces: AsyncGenerator[tuple[int, Chunk], None]
    ) -> AsyncGenerator[bytes, None]:
        usage = bool(self.asked.stream_options and self.asked.stream_options.include_usage)
        frame = self._frame(self.chunk) | ({"usage": None} if usage else {})
        async with aclosing(pieces):
            try:
                yield _event(frame | {"choices": [self.show_chunk(*first)]})
                async for index, piece in pieces:
                    if piece.text or piece.tokens or piece.finish:
                        yield _event(frame | {"choices": [self.show_chunk(index, piece)]})
            except ApiError as e:
                yield _event(e.body)
                return
        if usage:
            yield _event(frame | {"choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

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
    """Closes its pieces when the client goes away, wherever that catches it."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _joined(pieces: list[Chunk]) -> Chunk:
    return Chunk(
        "".join(p.text for p in pieces),
        tuple(t for p in pieces for t in p.tokens),
        tuple(o for p in pieces for o in p.offsets),
        pieces[-1].finish,
    )


async def _merged(streams: list[AsyncIterator[Chunk]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The pieces of all streams as they come, each with the number of its stream."""
    arrived: asyncio.Queue[tuple[int, Chunk] | BaseException | None] = asyncio.Queue()

    async def read(index: int, stream: AsyncIterator[Chunk]) -> None:
        try:
            async for piece in stream:
                arrived.put_nowait((index, piece))
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
