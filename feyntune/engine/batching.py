"""The engine: transformers' continuous batching, with an adapter for each token and sampling for each request.

Upstream's manager runs one thread that packs the tokens of all running requests into one row, step after step;
new requests join between two steps. Three of its seams are used, all private, so the version is pinned and tests
compare every path with `generate`:

* before a step, tell the LoRA layers whose tokens are in the row (`_generation_step`);
* draw the next tokens by each request's own settings (`ModelRunner._sample`);
* write an adapter's weights while the loop stands between two steps (`pause`).

What would stop the thread, or block its queue for everybody, is refused before it gets there: empty prompts,
tokens without an embedding, requests that can never fit. A request is handed over only when the cache can hold
its whole length, so upstream never has to throw a running one out. Prefix sharing stays off: it is keyed by
tokens alone and would give one adapter's keys and values to another.
"""

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from feyntune.engine.allocator import keep_freed_memory
from feyntune.engine.api import (
    GREEDY_BELOW,
    EngineDeadError,
    EngineSettings,
    InvalidAdapterError,
    Load,
    NoFreeSlotError,
    NonFiniteError,
    QueueFullError,
    Sampling,
    Token,
    check_request,
)
from feyntune.engine.attention import NO_CACHE, install_attention
from feyntune.engine.fair_queue import FairQueue
from feyntune.engine.lora import Weights, install, largest_adapter, projections, read_adapter
from feyntune.engine.manager import PAGE, Manager, Running, Slot
from feyntune.engine.sampling import with_log_probabilities
from feyntune.model.packed import backbone, head

T = TypeVar("T")


@dataclass(eq=False)
class _Scoring:
    """A text whose log probabilities are asked for."""

    slot: Slot | None
    owner: str
    tokens: list[int]
    top: int
    result: "asyncio.Future[list[Token]]"


class BatchingEngine:
    """`engine.Engine` over transformers. Made anywhere; used on the event loop that called `start`."""

    def __init__(
        self,
        model: PreTrainedModel,
        eos: Sequence[int],
        settings: EngineSettings,
        on_step: Callable[[int], None] = lambda requests: None,
    ):
        """`model` was loaded with "sdpa" attention; `on_step` is told the requests of each step, in its thread."""
        self.model, self.settings = model, settings
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.max_length = min(model.config.max_position_embeddings, settings.cache_tokens // PAGE * PAGE)
        self._eos = list(eos)
        install_attention()
        self._projections = projections(model)
        self.adapter_bytes = largest_adapter(self._projections, settings.max_rank)
        self._slots, self._layers = install(model, settings.max_adapters, settings.max_rank, model.dtype)
        self._adapters: dict[str, Slot] = {}
        self._requests: dict[str, Running] = {}  # admitted ones; read by the engine's thread
        self._waiting: FairQueue[Running] = FairQueue()
        self._scores: FairQueue[_Scoring] = FairQueue()
        self._scorer: asyncio.Task[None] | None = None
        self._pause_changed = 0.0  # when the loop was last paused or resumed for scores or adapters, monotonic
        self._reserved = 0
        self._ids = itertools.count()
        self._seconds = 1.0  # of a request, smoothed: for Retry-After
        self._manager = Manager(model, self._eos, settings, self._slots, self._requests, on_step)
        self._writing = asyncio.Lock()
        self._pause_lock = asyncio.Lock()  # whoever has the loop paused: it sets whose tokens are in the row

    def start(self) -> None:
        if self.model.device.type == "cpu":
            keep_freed_memory()
        self._manager.start()

    def stop(self) -> None:
        if self._scorer is not None:
            self._scorer.cancel()
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        if not self._manager.is_running():  # else it hangs in a step: `destroy` would wait for it without a limit
            self._manager.destroy()

    def alive(self) -> bool:
        """Whether the thread runs and, if it has work, has made a step within `stall_seconds`."""
        if not self._manager.is_running() or self._manager.background_thread_status.can_accept_new_requests():
            return False
        oldest = next(iter(self._requests.values()), None)
        if oldest is None:
            return True
        since = max(self._manager.last_step, oldest.submitted, self._pause_changed)
        return time.monotonic() - since < self.settings.stall_seconds

    @property
    def unavailable(self) -> str | None:
        return None

    def load(self) -> Load:
        adapters = sum(not slot.retired for slot in self._adapters.values())
        return Load(len(self._requests), self._queued, adapters, self._manager.steps)

    @property
    def _queued(self) -> int:
        return len(self._waiting) + len(self._scores)

    def _check_queue(self, owner: str) -> None:
        if not self.alive():
            raise EngineDeadError("The engine has stopped; the server must be restarted.")
        waiting = self._waiting.count(owner) + self._scores.count(owner)
        if waiting >= self.settings.queue:
            raise QueueFullError(f"{waiting} requests are waiting already: try again later.", self._retry_after())

    def _retry_after(self) -> int:
        """Seconds until what waits now has probably ended."""
        return max(1, round(self._seconds * self._queued / self.settings.batch_requests))

    def submit(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling, owner: str = "") -> Running:
        check_request(prompt, sampling, self.vocabulary, self.max_length)
        self._check_queue(owner)
        slot = self._acquire_slot(adapter)
        request = Running(
            id=str(next(self._ids)),
            slot=slot,
            prompt=list(prompt),
            sampling=sampling,
            generator=self._generator(sampling),
            submitted=time.monotonic(),
            owner=owner,
        )
        self._waiting.push(owner, request)
        self._admit()
        if not request.admitted and self.settings.queue_seconds < float("inf"):
            loop = asyncio.get_running_loop()
            request.expiry = loop.call_later(self.settings.queue_seconds, self._expire, request)
        return request

    def _expire(self, request: Running) -> None:
        if request.admitted or request.over:
            return
        self._waiting.discard(request.owner, request)
        message = f"The request waited for {self.settings.queue_seconds:g} s: try again later."
        self._end(request, QueueFullError(message, self._retry_after()))

    def _generator(self, sampling: Sampling) -> torch.Generator | None:
        if sampling.temperature < GREEDY_BELOW:
            return None
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return torch.Generator(self.model.device).manual_seed(seed)

    def _admit(self) -> None:
        """Hand waiting requests over, each owner's oldest in turn, as long as batch and cache have room for them."""
        while self._waiting:
            request = self._waiting.peek()
            room = self.settings.cache_tokens // PAGE * PAGE - self._reserved
            if len(self._requests) >= self.settings.batch_requests or request.reserved > room:
                return
            self._waiting.pop()
            self._reserved += request.reserved
            request.admitted = True
            self._requests[request.id] = request
            self._manager.register_result_handler(request.id, lambda out, r=request: self._deliver(r, out))
            accepted = self._manager.add_request(
                request.prompt,
                request_id=request.id,
                max_new_tokens=request.sampling.max_tokens,
                streaming=True,
                eos_token_id=self._end_tokens(request.sampling),  # type: ignore[arg-type]
            )
            if accepted is None:
                self._finish(request, EngineDeadError("The engine has stopped; the server must be restarted."))

    def _end_tokens(self, sampling: Sampling) -> int | list[int]:
        eos = [] if sampling.ignore_eos else self._eos
        return [*eos, *sampling.stop_token_ids] or -1

    def _deliver(self, request: Running, out: GenerationOutput) -> None:
        if request.over:
            return
        if request.non_finite:
            self._manager.cancel_request(request.id)
            self._end(request, NonFiniteError("The model's output for this request is not finite."))
            return
        for i in range(request.delivered, len(out.generated_tokens)):
            known = request.log_probabilities
            request.tokens.put_nowait(known[i] if known else Token(out.generated_tokens[i]))
        request.delivered = len(out.generated_tokens)
        if out.is_finished():
            self._end(request, EngineDeadError(f"The engine failed: {out.error}") if out.error else None)

    def _end(self, request: Running, error: Exception | None) -> None:
        self._finish(request, error)
        self._admit()

    def _finish(self, request: Running, error: Exception | None) -> None:
        request.over = True
        if request.expiry is not None:
            request.expiry.cancel()
        request.tokens.put_nowait(error)
        if request.admitted:
            self._reserved -= request.reserved
            del self._requests[request.id]
            with self._manager.output_router._lock:
                self._manager.output_router.result_handlers.pop(request.id, None)
            self._seconds += 0.1 * (time.monotonic() - request.submitted - self._seconds)
        self._release_slot(request.slot)

    def cancel(self, request: Running) -> None:  # type: ignore[override]
        if request.over:
            return
        if request.admitted:
            self._manager.cancel_request(request.id)
        else:
            self._waiting.discard(request.owner, request)
        self._end(request, None)

    async def score(self, adapter: str | None, tokens: Sequence[int], top: int, owner: str = "") -> list[Token]:
        self._check_queue(owner)
        result = asyncio.get_running_loop().create_future()
        job = _Scoring(self._acquire_slot(adapter), owner, list(tokens), top, result)
        self._scores.push(owner, job)
        if self._scorer is None or self._scorer.done():
            self._scorer = asyncio.create_task(self._score_queue())
        try:
            return await job.result
        finally:
            self._scores.discard(owner, job)
            self._release_slot(job.slot)

    async def _score_queue(self) -> None:
        """Score what waits, so many texts at once as fit a step; the batch makes a step between two groups."""
        while self._scores:
            group = [self._scores.pop()]
            tokens = len(group[0].tokens)
            while self._scores and tokens + len(self._scores.peek().tokens) <= self.settings.batch_tokens:
                group.append(self._scores.pop())
                tokens += len(group[-1].tokens)
            try:
                results: list[list[Token] | Exception] = await self._run_while_paused(self._score, group)
            except Exception as e:
                results = [e] * len(group)
            for job, result in zip(group, results, strict=True):
                if job.result.done():  # whoever asked has gone
                    continue
                if isinstance(result, Exception):
                    job.result.set_exception(result)
                else:
                    job.result.set_result(result)
            self._admit()

    @torch.no_grad()
    def _score(self, group: Sequence[_Scoring]) -> list[list[Token] | Exception]:
        results: list[list[Token] | Exception] = []
        with self._paused():
            hidden = self._hidden([(job.slot.index if job.slot else 0, job.tokens) for job in group])
            for job, states in zip(group, hidden, strict=True):
                results.append(self._log_probabilities(job, states))
        return results

    def _log_probabilities(self, job: _Scoring, hidden: torch.Tensor) -> list[Token] | Exception:
        if not torch.isfinite(hidden).all():
            return NonFiniteError("The model's output for this request is not finite.")
        scored = [Token(job.tokens[0])]
        for start in range(0, len(job.tokens) - 1, 256):  # in parts: [tokens, vocabulary] would be large
            after = torch.tensor(job.tokens[start + 1 : start + 257], device=hidden.device)
            logits = head(self.model)(hidden[start : start + len(after)]).float()
            scored += with_log_probabilities(logits, after, job.top)
        return scored

    @torch.no_grad()
    def _hidden(self, texts: Sequence[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """Last hidden states [tokens, hidden] of (slot, tokens) each, in one pass outside the batch; only while
        paused."""
        self._slots.select([slot for slot, tokens in texts for _ in tokens])
        device = self.model.device
        lengths = [len(tokens) for _, tokens in texts]
        ends = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
        hidden = backbone(self.model)(
            input_ids=torch.tensor([[t for _, tokens in texts for t in tokens]], device=device),
            position_ids=torch.tensor([[i for n in lengths for i in range(n)]], device=device),
            use_cache=False,
            cache=NO_CACHE,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
        ).last_hidden_state[0]
        return list(hidden.split(lengths))

    async def _run_while_paused(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work` in a thread that pauses the loop, one after another: upstream's pause lets several threads in.

        The turn lasts until the work is done, even when whoever asked for it has gone.
        """

        async def turn() -> T:
            async with self._pause_lock:
                return await asyncio.to_thread(work, *arguments)

        return await asyncio.shield(asyncio.ensure_future(turn()))

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """While the loop stands between two steps; only `_run_while_paused`."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._manager.pause())
            except RuntimeError as e:  # it is not running, or ended before it could stand
                raise EngineDeadError("The engine has stopped; the server must be restarted.") from e
            self._pause_changed = time.monotonic()
            try:
                yield
            finally:
                self._pause_changed = time.monotonic()

    async def load_adapter(self, key: str, folder: Path) -> None:
        async with self._writing:
            if key in self._adapters:
                self._adapters[key].retired = False
                return
            rank = self.settings.max_rank
            weights = await asyncio.to_thread(read_adapter, folder, self._projections, rank)
            taken = {slot.index for slot in self._adapters.values()}
            index = next((i for i in range(1, self.settings.max_adapters + 1) if i not in taken), None)
            if index is None:
                raise NoFreeSlotError(f"all {self.settings.max_adapters} adapter slots are taken: raise max_adapters")
            await self._run_while_paused(self._write, index, weights, max(taken | {index}))
            self._adapters[key] = Slot(index)

    def _write(self, index: int, weights: Weights, highest: int) -> None:
        """Fill a slot and try it on a few tokens: an adapter that overflows at once is refused, not quarantined."""
        with self._paused():
            try:
                for name, layer in self._layers.items():
                    layer.write(index, weights.get(name))
                self._slots.use(highest)
                [hidden] = self._hidden([(index, list(range(min(32, self.vocabulary))))])
                if torch.isfinite(hidden).all():
                    return
            except BaseException:
                self._empty(index)
                raise
            self._empty(index)
        raise InvalidAdapterError("its weights make the model overflow: its outputs are not finite")

    def _empty(self, index: int) -> None:
        for layer in self._layers.values():
            layer.write(index, None)

    def unload_adapter(self, key: str) -> None:
        self._adapters[key].retired = True
        self._free_retired()

    @contextmanager
    def hold(self, adapter: str | None) -> Iterator[None]:
        slot = self._acquire_slot(adapter)
        try:
            yield
        finally:
            self._release_slot(slot)

    def _acquire_slot(self, adapter: str | None) -> Slot | None:
        if adapter is None:
            return None
        slot = self._adapters[adapter]
        slot.users += 1
        return slot

    def _release_slot(self, slot: Slot | None) -> None:
        if slot is not None:
            slot.users -= 1
            self._free_retired()

    def _free_retired(self) -> None:
        for key in [k for k, slot in self._adapters.items() if slot.retired and not slot.users]:
            del self._adapters[key]
