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
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from feyntune.engine.api import (
    ContextLengthError,
    EngineDeadError,
    EngineSettings,
    InvalidAdapterError,
    Load,
    NoFreeSlotError,
    QueueFullError,
    Sampling,
    Token,
)
from feyntune.engine.lora import Slots, Weights, install, read_adapter
from feyntune.model.packed import backbone, head

T = TypeVar("T")
PAGE = 16  # tokens of the cache given out at once


@dataclass
class _Slot:
    index: int
    users: int = 0


@dataclass(eq=False)
class Running:
    """A request: its settings, its tokens so far, and who waits for them (`engine.Generation`)."""

    id: str
    slot: _Slot | None  # None is the base
    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator | None
    submitted: float
    tokens: asyncio.Queue[Token | Exception | None] = field(default_factory=asyncio.Queue)
    log_probabilities: list[Token] = field(default_factory=list)  # by the engine's thread, before delivery
    delivered: int = 0
    admitted: bool = False
    over: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def reserved(self) -> int:
        return -(-self.length // PAGE) * PAGE

    async def __aiter__(self) -> AsyncIterator[Token]:
        while (item := await self.tokens.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item


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
        self._slots, self._layers = install(model, settings.max_adapters, settings.max_rank, model.dtype)
        self._adapters: dict[str, _Slot] = {}
        self._retired: list[_Slot] = []
        self._requests: dict[str, Running] = {}  # admitted ones; read by the engine's thread
        self._waiting: deque[Running] = deque()
        self._reserved = 0
        self._ids = itertools.count()
        self._seconds = 1.0  # of a request, smoothed: for Retry-After
        self._manager = _Manager(model, self._eos, settings, self._slots, self._requests, on_step)
        self._writing = asyncio.Lock()
        self._pause_lock = asyncio.Lock()  # whoever has the loop paused: it sets whose tokens are in the row

    def start(self) -> None:
        self._manager.start()

    def stop(self) -> None:
        self._manager.stop(block=True, timeout=30, hard_stop=True)
        self._manager.destroy()

    def alive(self) -> bool:
        """Whether the thread runs and, if it has work, has made a step within `stall_seconds`."""
        if not self._manager.is_running() or self._manager.background_thread_status.can_accept_new_requests():
            return False
        oldest = next(iter(self._requests.values()), None)
        if oldest is None:
            return True
        since = max(self._manager.last_step, oldest.submitted)
        return time.monotonic() - since < self.settings.stall_seconds

    def load(self) -> Load:
        return Load(len(self._requests), len(self._waiting), len(self._adapters), self._manager.steps)

    def submit(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling) -> Running:
        if not prompt or not all(0 <= t < self.vocabulary for t in prompt) or sampling.max_tokens < 1:
            raise ValueError("a prompt needs at least one token, all in the vocabulary, and one to generate")
        if len(prompt) + sampling.max_tokens > self.max_length:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}: together they exceed "
                f"the model's {self.max_length}. Shorten the prompt or lower max_tokens."
            )
        if not self.alive():
            raise EngineDeadError("The engine has stopped; the server must be restarted.")
        if len(self._waiting) >= self.settings.queue:
            wait = self._seconds * len(self._waiting) / self.settings.batch_requests
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already: try again later.", max(1, round(wait))
            )
        slot = self._acquire_slot(adapter)
        request = Running(
            id=str(next(self._ids)),
            slot=slot,
            prompt=list(prompt),
            sampling=sampling,
            generator=self._generator(sampling),
            submitted=time.monotonic(),
        )
        self._waiting.append(request)
        self._admit()
        return request

    def _generator(self, sampling: Sampling) -> torch.Generator | None:
        if sampling.temperature == 0:
            return None
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        return torch.Generator(self.model.device).manual_seed(seed)

    def _admit(self) -> None:
        """Hand waiting requests over, oldest first, as long as the batch and the cache have room for them."""
        while self._waiting:
            request = self._waiting[0]
            room = self.settings.cache_tokens // PAGE * PAGE - self._reserved
            if len(self._requests) >= self.settings.batch_requests or request.reserved > room:
                return
            self._waiting.popleft()
            self._reserved += request.reserved
            request.admitted = True
            self._requests[request.id] = request
            self._manager.register_result_handler(request.id, lambda out, r=request: self._deliver(r, out))
            accepted = self._manager.add_request(
                request.prompt,
                request_id=request.id,
                max_new_tokens=request.sampling.max_tokens,
                streaming=True,
                eos_token_id=-1 if request.sampling.ignore_eos else self._eos,
            )
            if accepted is None:
                self._end(request, EngineDeadError("The engine has stopped; the server must be restarted."))

    def _deliver(self, request: Running, out: GenerationOutput) -> None:
        if request.over:
            return
        for i in range(request.delivered, len(out.generated_tokens)):
            known = request.log_probabilities
            request.tokens.put_nowait(known[i] if known else Token(out.generated_tokens[i]))
        request.delivered = len(out.generated_tokens)
        if out.is_finished():
            self._end(request, EngineDeadError(f"The engine failed: {out.error}") if out.error else None)

    def _end(self, request: Running, error: Exception | None) -> None:
        request.over = True
        request.tokens.put_nowait(error)
        if request.admitted:
            self._reserved -= request.reserved
            del self._requests[request.id]
            with self._manager.output_router._lock:
                self._manager.output_router.result_handlers.pop(request.id, None)
            self._seconds += 0.1 * (time.monotonic() - request.submitted - self._seconds)
        self._release_slot(request.slot)
        self._admit()

    def cancel(self, request: Running) -> None:  # type: ignore[override]
        if request.over:
            return
        if request.admitted:
            self._manager.cancel_request(request.id)
        else:
            self._waiting.remove(request)
        self._end(request, None)

    async def score(self, adapter: str | None, tokens: Sequence[int], top: int) -> list[Token]:
        slot = self._acquire_slot(adapter)
        try:
            return await self._run_while_paused(self._score, slot.index if slot else 0, list(tokens), top)
        finally:
            self._release_slot(slot)

    @torch.no_grad()
    def _score(self, slot: int, tokens: list[int], top: int) -> list[Token]:
        scored = [Token(tokens[0])]
        with self._paused():
            hidden = self._hidden(slot, tokens)
            for start in range(0, len(tokens) - 1, 256):  # in parts: [tokens, vocabulary] would be large
                after = torch.tensor(tokens[start + 1 : start + 257], device=hidden.device)
                logits = head(self.model)(hidden[start : start + len(after)]).float()
                scored += _with_log_probabilities(logits, after, top)
        return scored

    @torch.no_grad()
    def _hidden(self, slot: int, tokens: list[int]) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of one text, outside the batch; only while paused."""
        self._slots.select([slot] * len(tokens))
        ids = torch.tensor([tokens], device=self.model.device)
        return backbone(self.model)(input_ids=ids, use_cache=False).last_hidden_state[0]

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
            yield

    async def load_adapter(self, key: str, folder: Path) -> None:
        async with self._writing:
            if key in self._adapters:
                return
            rank = self.settings.max_rank
            weights = await asyncio.to_thread(read_adapter, folder, self._layers, rank)
            taken = {s.index for s in [*self._adapters.values(), *self._retired]}
            index = next((i for i in range(1, self.settings.max_adapters + 1) if i not in taken), None)
            if index is None:
                raise NoFreeSlotError(f"all {self.settings.max_adapters} adapter slots are taken: raise max_adapters")
            await self._run_while_paused(self._write, index, weights, max(taken | {index}))
            self._adapters[key] = _Slot(index)

    def _write(self, index: int, weights: Weights, highest: int) -> None:
        """Fill a slot and try it: what overflows would, through attention's mask (0 x inf), spoil every request."""
        with self._paused():
            for name, layer in self._layers.items():
                layer.write(index, weights.get(name))
            self._slots.use(highest)
            if torch.isfinite(self._hidden(index, list(range(min(32, self.vocabulary))))).all():
                return
            for layer in self._layers.values():
                layer.write(index, None)
        raise InvalidAdapterError("its weights make the model overflow: what it computes is not finite")

    def unload_adapter(self, key: str) -> None:
        slot = self._adapters.pop(key)
        if slot.users > 0:
            self._retired.append(slot)

    def _acquire_slot(self, adapter: str | None) -> _Slot | None:
        if adapter is None:
            return None
        slot = self._adapters[adapter]
        slot.users += 1
        return slot

    def _release_slot(self, slot: _Slot | None) -> None:
        if slot is not None:
            slot.users -= 1
            self._retired = [s for s in self._retired if s.users > 0]


class _Manager(ContinuousBatchingManager):
    def __init__(
        self,
        model: PreTrainedModel,
        eos: list[int],
        settings: EngineSettings,
        slots: Slots,
        requests: dict[str, Running],
        on_step: Callable[[int], None],
    ):
        super().__init__(
            model,  # type: ignore[arg-type]
            GenerationConfig(do_sample=False, eos_token_id=eos, max_new_tokens=16),
            ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=settings.cache_tokens // PAGE,
                max_batch_tokens=settings.batch_tokens,
                max_requests_per_batch=settings.batch_requests,
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                safety_margin=0.0,  # what is admitted fits: nothing to keep back
            ),
        )
        self.slots, self.requests, self.on_step = slots, requests, on_step
        self.last_step = time.monotonic()
        self.steps = 0

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        runner = processor.model_runner

        def draw(scores: torch.Tensor, output_ids: torch.Tensor) -> None:
            self._draw_all(runner, scores[0], output_ids)

        runner._sample = draw  # type: ignore[method-assign]
        return processor

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch  # type: ignore[union-attr]
        slots: list[int] = []
        for f in batch:
            request = self.requests.get(f.state.request_id)  # gone if cancelled: its tokens go nowhere
            slots += [request.slot.index if request and request.slot else 0] * f.query_length
        self.slots.select(slots)
        super()._generation_step()
        self.last_step = time.monotonic()
        self.steps += 1
        self.on_step(len(batch))

    def _draw_all(self, runner: Any, logits: torch.Tensor, out: torch.Tensor) -> None:
        """The next token of each request; logits [requests with a new token, vocabulary], fp32."""
        drawing = [f.state.request_id for f in runner.inputs_and_outputs.requests_in_batch if f.has_new_token]
        requests = [self.requests.get(i) for i in drawing]
        tokens = logits.argmax(-1)
        for i, request in enumerate(requests):
            if request is not None and request.generator is not None:
                tokens[i] = _draw(logits[i], request.sampling, request.generator)
        reported = [
            (i, r, r.sampling.logprobs) for i, r in enumerate(requests) if r and r.sampling.logprobs is not None
        ]
        if reported:
            rows = [i for i, _, _ in reported]
            known = _with_log_probabilities(logits[rows], tokens[rows], max(top for _, _, top in reported))
            for token, (_, request, top) in zip(known, reported, strict=True):
                request.log_probabilities.append(Token(token.id, token.logprob, token.top[:top]))
        out[0, : len(tokens)].copy_(tokens)


def _draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """One token of `logits` [vocabulary] by temperature and nucleus, by the exponential (Gumbel-max) trick."""
    p = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        largest, order = p.sort(descending=True)
        outside = largest.cumsum(-1) - largest >= sampling.top_p
        p = p.index_fill(0, order[outside], 0)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax()


def _with_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[Token]:
    """Tokens [n] with their log probabilities by `logits` [n, vocabulary] and the `top` most likely ones'."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, tokens[:, None])[:, 0].tolist()
    best = log_p.topk(top, dim=-1)
    rows = zip(tokens.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Token(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]
