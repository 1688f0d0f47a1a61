"""The engine that leaves the computing to a vLLM server: for GPUs and many clients.

The server is a child process (`vllm_process.py`). Requests go to it as token ids and come back as token ids; those it
has no room for wait here, so that the queue is fair and a restart loses none of them. When vLLM ends or hangs it is
started again and every adapter is loaded again; meanwhile `unavailable` says so.

What vLLM would take without a word is refused before it gets there: an adapter of foreign layers or shapes
(`lora.read_adapter`), and one whose weights are so large that what it computes may not be finite, since vLLM's cache
keeps such numbers and gives them to whoever gets the same block next.
"""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

from feyntune.engine.api import (
    EngineDeadError,
    EngineSettings,
    EngineUnavailableError,
    InvalidAdapterError,
    Load,
    NoFreeSlotError,
    NonFiniteError,
    QueueFullError,
    Sampling,
    Token,
    check_request,
    received,
)
from feyntune.engine.fair_queue import FairQueue
from feyntune.engine.lora import TARGETS, largest_adapter, read_adapter
from feyntune.serving.vllm_process import BASE, VllmProcess
from feyntune.telemetry import log

START_SECONDS = 1800.0  # a large model, read and compiled for
STARTS = 3  # failures in a row, after which only a restart of this process may help
LARGEST_DELTA = 1000.0  # norm of B A alpha / r, estimated from above; a trained adapter's is a hundredth of it


class _Failed(Exception):
    """vLLM does not come up, or stands still."""


@dataclass
class _Adapter:
    folder: Path
    users: int = 0
    retired: bool = False


@dataclass(eq=False)
class _Request:
    """`engine.Generation`; with `score` the prompt's own log probabilities in place of a completion."""

    adapter: str | None
    prompt: list[int]
    sampling: Sampling
    owner: str
    score: bool = False
    tokens: asyncio.Queue[Token | Exception | None] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None
    expiry: asyncio.TimerHandle | None = None
    started: float = 0.0  # monotonic; when vLLM got it
    tries: int = 0
    answered: bool = False  # whether a token has come
    over: bool = False

    def __aiter__(self) -> AsyncIterator[Token]:
        return received(self.tokens)


class VllmEngine:
    """`engine.Engine` over a vLLM server.

    Args:
        vocabulary: token ids are below this.
        eos: ids that end a text.
        projections: of the base; see `lora.projections`.
        process: not yet started.
        max_length: one less than the process takes: scoring a prompt completes one token.
    """

    def __init__(
        self,
        process: VllmProcess,
        settings: EngineSettings,
        *,
        vocabulary: int,
        max_length: int,
        eos: Sequence[int],
        projections: Mapping[str, tuple[int, int]],
    ):
        self.settings, self.vocabulary, self.max_length = settings, vocabulary, max_length
        self.process = process
        self._eos, self._projections = list(eos), projections
        self.adapter_bytes = largest_adapter(projections, settings.max_rank)
        self._adapters: dict[str, _Adapter] = {}
        self._waiting: FairQueue[_Request] = FairQueue()
        self._running: set[_Request] = set()
        self._loading = asyncio.Lock()
        self._seconds = 1.0  # of a request, smoothed: for Retry-After
        self._last_answer = 0.0  # monotonic
        self._up = False
        self._suspect = False  # a connection broke: wait for its health before anything is sent
        self._tainted = False  # its cache may hold numbers that are not finite
        self._dead: str | None = None  # why it is not started again
        self._tasks: set[asyncio.Task[None]] = set()  # unloading; kept, or they would be collected
        self._supervisor: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=str(self.process.socket),
                # vLLM closes an idle connection after five seconds; a request must not meet that.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2),
            ),
            base_url="http://vllm",
            timeout=httpx.Timeout(None, connect=10),
        )
        self._supervisor = asyncio.create_task(self._supervise())

    def stop(self) -> None:
        if self._supervisor is not None and not self._supervisor.get_loop().is_closed():
            self._supervisor.cancel()
        self.process.close()

    def alive(self) -> bool:
        return self._dead is None

    @property
    def unavailable(self) -> str | None:
        return None if self._up and not self._tainted and not self._suspect else "vLLM is starting"

    def load(self) -> Load:
        adapters = sum(not a.retired for a in self._adapters.values())
        return Load(len(self._running), len(self._waiting), adapters)

    # -- the process

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                self.process.start()
                await asyncio.wait_for(self._come_up(), START_SECONDS)
                failures, self._up, self._tainted, self._suspect = 0, True, False, False
                log.info("vLLM answers")
                self._admit()
                await self._watch()
            except Exception as e:  # whatever it is, vLLM is started again, so many times
                failures = 0 if self._up else failures + 1
                log.error("vLLM: %s", str(e) or type(e).__name__)
            self._up = False
            for request in list(self._running):
                self._lost(request)
            await asyncio.to_thread(self.process.stop)
            if failures == STARTS:
                self._dead = f"vLLM did not start {STARTS} times in a row: its own log says why."
                while self._waiting:
                    self._finish(self._waiting.pop(), EngineDeadError(self._dead))
                return

    async def _come_up(self) -> None:
        """Wait for vLLM, load every adapter, and let the base answer: /health says nothing about that."""
        while True:
            self._check_process()
            with suppress(httpx.TransportError):
                if (await self._http.get("/health", timeout=10)).status_code == 200:
                    break
            await asyncio.sleep(0.5)
        for key, adapter in list(self._adapters.items()):
            await self._load(key, adapter.folder)
        body = {"model": BASE, "prompt": [0], "max_tokens": 1}
        answer = await self._http.post("/v1/completions", json=body, timeout=self.settings.stall_seconds)
        if answer.status_code != 200:
            raise _Failed(f"the base does not answer: {answer.text[:300]}")

    async def _watch(self) -> None:
        """Return when vLLM must be started again to get a clean cache; raise when it has ended or stands still."""
        silent = 0
        while not (self._tainted and not self._running):
            self._check_process()
            try:
                if (await self._http.get("/health", timeout=10)).status_code != 200:
                    raise _Failed("its engine has failed")
                silent = 0
                if self._suspect:
                    self._suspect = False
                    self._admit()
            except httpx.TransportError as e:
                silent += 1
                if silent == 3:
                    raise _Failed("it does not answer") from e
            oldest = min((r.started for r in self._running), default=None)
            if oldest is not None and time.monotonic() - max(oldest, self._last_answer) > self.settings.stall_seconds:
                raise _Failed(f"it has made no token for {self.settings.stall_seconds:g} s")
            await asyncio.sleep(0.5)

    def _check_process(self) -> None:
        if self.process.exit_code is not None:
            raise _Failed(f"it ended with exit code {self.process.exit_code}")

    # -- requests

    def submit(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling, owner: str = "") -> _Request:
        check_request(prompt, sampling, self.vocabulary, self.max_length)
        return self._queue(_Request(adapter, list(prompt), sampling, owner))

    async def score(self, adapter: str | None, tokens: Sequence[int], top: int, owner: str = "") -> list[Token]:
        request = self._queue(_Request(adapter, list(tokens), Sampling(1, logprobs=top), owner, score=True))
        try:
            return [token async for token in request]
        finally:
            self.cancel(request)

    def _queue(self, request: _Request) -> _Request:
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        waiting = self._waiting.count(request.owner)
        if waiting >= self.settings.queue:
            raise QueueFullError(f"{waiting} requests are waiting already: try again later.", self._retry_after())
        if request.adapter is not None:
            self._adapters[request.adapter].users += 1
        self._waiting.push(request.owner, request)
        self._admit()
        if request.task is None and self.settings.queue_seconds < float("inf"):
            self._expire_later(request)
        return request

    def _expire_later(self, request: _Request) -> None:
        loop = asyncio.get_running_loop()
        request.expiry = loop.call_later(self.settings.queue_seconds, self._expire, request)

    def _expire(self, request: _Request) -> None:
        if request.over or request.task is not None:
            return
        if not self._up:  # not the queue's fault
            self._expire_later(request)
            return
        self._waiting.discard(request.owner, request)
        message = f"The request waited for {self.settings.queue_seconds:g} s: try again later."
        self._finish(request, QueueFullError(message, self._retry_after()))

    def _retry_after(self) -> int:
        """Seconds until what waits now has probably ended."""
        return max(1, round(self._seconds * len(self._waiting) / self.settings.batch_requests))

    def _admit(self) -> None:
        while self._waiting and self.unavailable is None and len(self._running) < self.settings.batch_requests:
            request = self._waiting.pop()
            request.started = time.monotonic()
            request.tries += 1
            self._running.add(request)
            request.task = asyncio.create_task(self._run(request))

    async def _run(self, request: _Request) -> None:
        error: Exception | None = None
        try:
            if request.score:
                await self._score(request)
            else:
                await self._complete(request)
        except (httpx.HTTPError, orjson.JSONDecodeError):
            self._suspect = True
            self._lost(request)
            return
        except NonFiniteError as e:
            self._tainted = True
            error = e
        except Exception as e:  # whatever vLLM answers, its client is told
            log.error("vLLM: %s: %s", type(e).__name__, e)
            error = EngineUnavailableError(str(e))
        self._finish(request, error)

    def _lost(self, request: _Request) -> None:
        """vLLM went away with it: try it once more if nothing was answered. It may be what ended vLLM."""
        if request.over:
            return
        if request.answered or request.tries == 2:
            self._finish(request, EngineUnavailableError("vLLM has stopped and is started again: ask again."))
            return
        self._running.discard(request)
        if request.task is not None and request.task is not asyncio.current_task():
            request.task.cancel()
        request.task = None
        self._waiting.push(request.owner, request)
        self._admit()

    async def _complete(self, request: _Request) -> None:
        sampling = request.sampling
        body = {"stream": True, "return_token_ids": True, "return_tokens_as_token_ids": True, **_settings(sampling)}
        body |= {"model": request.adapter or BASE, "prompt": request.prompt}
        # vLLM ends at the tokenizer's EOS by itself; a model may have several.
        body["stop_token_ids"] = [*([] if sampling.ignore_eos else self._eos), *sampling.stop_token_ids]
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise EngineUnavailableError(_message(await answer.aread()))
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = orjson.loads(line[6:])
                if "error" in event:
                    raise EngineUnavailableError(_message(line[6:].encode()))
                self._last_answer = time.monotonic()
                for choice in event["choices"]:
                    for token in _tokens(choice, sampling.logprobs):
                        request.answered = True
                        request.tokens.put_nowait(token)
                    if choice["finish_reason"] is not None:
                        return
        raise httpx.RemoteProtocolError("the stream ended early")

    async def _score(self, request: _Request) -> None:
        top = request.sampling.logprobs or 0
        body = {"model": request.adapter or BASE, "prompt": request.prompt, "max_tokens": 1, "prompt_logprobs": top}
        answer = await self._http.post("/v1/completions", json=body)
        self._last_answer = time.monotonic()
        if answer.status_code == 400 and "float" in answer.text:  # JSON has no NaN
            raise NonFiniteError("The model's output for this request is not finite.")
        if answer.status_code != 200:
            raise EngineUnavailableError(_message(answer.content))
        known = answer.json()["choices"][0]["prompt_logprobs"]
        request.tokens.put_nowait(Token(request.prompt[0]))
        for token, entry in zip(request.prompt[1:], known[1:], strict=True):
            ranked = sorted((v["rank"], int(i), v["logprob"]) for i, v in entry.items())
            best = tuple((i, p) for rank, i, p in ranked if rank <= top)
            request.tokens.put_nowait(Token(token, entry[str(token)]["logprob"], best))

    def cancel(self, request: _Request) -> None:  # type: ignore[override]
        if request.over:
            return
        if request.task is None:
            self._waiting.discard(request.owner, request)
        else:
            request.task.cancel()  # closes the connection, at which vLLM gives it up
        self._finish(request, None)

    def _finish(self, request: _Request, error: Exception | None) -> None:
        if request.over:
            return
        request.over = True
        if request.expiry is not None:
            request.expiry.cancel()
        request.tokens.put_nowait(error)
        if request in self._running:
            self._running.discard(request)
            self._seconds += 0.1 * (time.monotonic() - request.started - self._seconds)
        if request.adapter is not None:
            self._release(request.adapter)
        self._admit()

    # -- adapters

    async def load_adapter(self, key: str, folder: Path) -> None:
        async with self._loading:
            if key in self._adapters:
                self._adapters[key].retired = False
                return
            if len(self._adapters) >= self.settings.max_adapters:
                raise NoFreeSlotError(f"all {self.settings.max_adapters} adapter slots are taken: raise max_adapters")
            if not self._up:
                raise EngineUnavailableError("vLLM is starting: the adapter is loaded once it answers")
            await asyncio.to_thread(self._check, folder)
            copy = self.process.adapters / key  # vLLM may read it again at any time
            await asyncio.to_thread(_keep, folder, copy)
            try:
                await self._load(key, copy)
            except httpx.HTTPError as e:
                raise EngineUnavailableError(f"vLLM does not answer ({type(e).__name__})") from e
            self._adapters[key] = _Adapter(copy)

    def _check(self, folder: Path) -> None:
        for module, (a, b) in read_adapter(folder, self._projections, self.settings.max_rank).items():
            norm = float(a.float().norm() * b.float().norm())
            if norm > LARGEST_DELTA:
                raise InvalidAdapterError(
                    f"{module}: its weights are too large (norm {norm:.3g}, at most {LARGEST_DELTA:g}): what it "
                    "computes may not be finite"
                )

    async def _load(self, key: str, folder: Path) -> None:
        body = {"lora_name": key, "lora_path": str(folder)}
        answer = await self._http.post("/v1/load_lora_adapter", json=body, timeout=self.settings.stall_seconds)
        if answer.status_code != 200:
            raise InvalidAdapterError(f"vLLM refuses it: {_message(answer.content)}")

    def unload_adapter(self, key: str) -> None:
        self._adapters[key].retired = True
        self._unload_unused(key)

    @contextmanager
    def hold(self, adapter: str | None) -> Iterator[None]:
        if adapter is None:
            yield
            return
        self._adapters[adapter].users += 1
        try:
            yield
        finally:
            self._release(adapter)

    def _release(self, key: str) -> None:
        self._adapters[key].users -= 1
        self._unload_unused(key)

    def _unload_unused(self, key: str) -> None:
        adapter = self._adapters[key]
        if adapter.retired and not adapter.users:
            task = asyncio.get_running_loop().create_task(self._unload(key, adapter))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unload(self, key: str, adapter: _Adapter) -> None:
        async with self._loading:
            if not adapter.retired or adapter.users or self._adapters.get(key) is not adapter:
                return  # loaded again meanwhile
            del self._adapters[key]
            with suppress(httpx.HTTPError):  # a vLLM that starts again does not know it
                await self._http.post("/v1/unload_lora_adapter", json={"lora_name": key}, timeout=60)
            await asyncio.to_thread(shutil.rmtree, adapter.folder, ignore_errors=True)


def _settings(sampling: Sampling) -> dict[str, Any]:
    """A request's settings as vLLM names them."""
    settings: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "ignore_eos": sampling.ignore_eos,
        # The token's own is always asked for: it alone shows that a number was not finite.
        "logprobs": sampling.logprobs or 0,
    }
    if sampling.seed is not None:
        settings["seed"] = sampling.seed
    if sampling.logit_bias:
        settings["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
    return settings


def _tokens(choice: dict[str, Any], logprobs: int | None) -> list[Token]:
    """The tokens of one event.

    Raises:
        NonFiniteError: vLLM shows such a number as null.
    """
    tokens = []
    known = choice["logprobs"]
    for i, token in enumerate(choice["token_ids"]):
        logprob = known["token_logprobs"][i]
        if logprob is None:
            raise NonFiniteError("The model's output for this request is not finite.")
        if logprobs is None:
            tokens.append(Token(token))
            continue
        ranked = sorted(
            ((p, int(name.partition(":")[2])) for name, p in known["top_logprobs"][i].items()), reverse=True
        )
        tokens.append(Token(token, logprob, tuple((t, p) for p, t in ranked[:logprobs])))
    return tokens


def _message(answer: bytes) -> str:
    """vLLM's own words, from its error in OpenAI's shape."""
    try:
        return str(orjson.loads(answer)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return answer[:300].decode(errors="replace")


def _keep(folder: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    shutil.copyfile(folder / "adapter_model.safetensors", copy / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    known = {k: config[k] for k in ("peft_type", "r", "lora_alpha", "use_rslora") if config.get(k) is not None}
    # `read_adapter` takes any value of the fields that mean nothing to the weights; vLLM may not.
    (copy / "adapter_config.json").write_bytes(orjson.dumps(known | {"target_modules": list(TARGETS), "bias": "none"}))
