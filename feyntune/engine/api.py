"""What the endpoint and the measurements ask of an engine, whichever it is, and the ways an engine says no.

There are two: `batching.py` (transformers' continuous batching, in this process) and `serving.vllm_engine` (a vLLM
server as a child process). Whoever completes texts knows only this file.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class EngineError(Exception):
    """The engine cannot do what was asked; the message is for the client."""


class ContextLengthError(EngineError):
    """Prompt and completion together exceed what the engine can hold."""


class QueueFullError(EngineError):
    """Too many requests wait already."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class EngineDeadError(EngineError):
    """The engine's thread has ended or stands still: only a restart helps."""


class EngineUnavailableError(EngineError):
    """The engine is starting or restarting by itself: ask again in a few seconds."""


class NonFiniteError(EngineError):
    """What the model computed for a request is not finite; the other requests are not affected."""


class InvalidAdapterError(EngineError):
    """An adapter cannot be served; the message says why."""


class NoFreeSlotError(InvalidAdapterError):
    """Every adapter slot is taken."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use; fixed at start.

    Args:
        max_adapters: adapters in memory at once. A replaced version keeps its slot until its last request ends,
            so leave a few more than are registered.
        max_rank: largest LoRA rank. Memory and time grow with max_adapters x max_rank.
        batch_tokens: most tokens in one step; longer prompts are read over several steps.
        batch_requests: most requests in one step; the others wait.
        cache_tokens: tokens of the key-value cache, shared by all requests of a batch.
        queue: most requests waiting, of each owner (of each key, in the endpoint).
        queue_seconds: longest wait in the queue.
        stall_seconds: an engine with work and no step for so long is reported dead.
    """

    max_adapters: int = 40
    max_rank: int = 8
    batch_tokens: int = 512
    batch_requests: int = 64
    cache_tokens: int = 32768
    queue: int = 256
    queue_seconds: float = float("inf")
    stall_seconds: float = 120.0


GREEDY_BELOW = 1e-5  # logits divided by a smaller temperature overflow


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn.

    Args:
        max_tokens: most tokens, at least 1.
        temperature: 0 is greedy, and so is what is below GREEDY_BELOW.
        top_k: keep the most likely tokens, so many; 0 keeps every token.
        min_p: keep tokens at least so likely as this share of the most likely one (arXiv 2407.01082); 0 keeps all.
        min_tokens: neither EOS nor a stop token before so many.
        repetition_penalty: divides the logits of tokens already seen, prompt included; 1 changes nothing.
        frequency_penalty, presence_penalty: taken from the logits of completed tokens, each time and once.
        logit_bias: (token id, added to its logit).
        stop_token_ids: end the completion as EOS does.
        top_p: nucleus sampling (arXiv 1904.09751 §3.1); 1 keeps every token.
        seed: equal seeds give equal completions, whatever shares the batch; None draws one.
        logprobs: how many alternatives to report at each token; None reports no log probabilities.
        ignore_eos: continue to max_tokens (for measurements).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def adjusts_logits(self) -> bool:
        return bool(
            self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True)
class Token:
    """One token; log probabilities (nats) are of the model's own distribution, before temperature and top_p."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Generation(Protocol):
    """A submitted request: iterate over its tokens as they are made.

    The iteration ends after EOS (which is given) or max_tokens. It raises EngineDeadError or EngineUnavailableError
    when the engine fails, NonFiniteError when the numbers of this request are not finite, and QueueFullError when the
    request has waited for `queue_seconds`.
    """

    def __aiter__(self) -> AsyncIterator[Token]: ...


def check_request(prompt: Sequence[int], sampling: Sampling, vocabulary: int, max_length: int) -> None:
    """What every engine asks of a request.

    Raises:
        ValueError: no token, one outside the vocabulary, or none to generate.
        ContextLengthError: prompt and completion exceed `max_length` tokens.
    """
    if not prompt or not all(0 <= t < vocabulary for t in prompt) or sampling.max_tokens < 1:
        raise ValueError("a prompt needs at least one token, all in the vocabulary, and one to generate")
    if len(prompt) + sampling.max_tokens > max_length:
        raise ContextLengthError(
            f"The prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}: together they exceed "
            f"the model's {max_length}. Shorten the prompt or lower max_tokens."
        )


async def received(tokens: asyncio.Queue[Token | Exception | None]) -> AsyncIterator[Token]:
    """The tokens that an engine puts into a request's queue, up to None, which ends it; an exception is raised."""
    while (item := await tokens.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item


@dataclass(frozen=True)
class Load:
    """What an engine is doing now."""

    running: int
    waiting: int
    adapters: int
    steps: int = field(default=0)


class Engine(Protocol):
    """One base model and the adapters over it. All methods are called on one event loop."""

    max_length: int  # most tokens of prompt and completion together
    vocabulary: int  # token ids are below this
    adapter_bytes: int  # more than any adapter's files have that it could serve

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def alive(self) -> bool: ...
    def load(self) -> Load: ...

    @property
    def unavailable(self) -> str | None:
        """Why it takes no requests just now, though it will; None when it takes them."""
        ...

    def hold(self, adapter: str | None) -> AbstractContextManager[None]:
        """Keep an adapter loaded while the context lasts, also when it is unloaded meanwhile."""
        ...

    def submit(self, adapter: str | None, prompt: Sequence[int], sampling: Sampling, owner: str = "") -> Generation:
        """Queue a request for the adapter loaded as `adapter` (None: the base). Owners are served in turn.

        Raises:
            ContextLengthError: see `max_length`.
            QueueFullError: the queue of this owner is full.
            EngineDeadError: see `alive`.
            EngineUnavailableError: see `unavailable`.
        """
        ...

    def cancel(self, generation: Generation) -> None:
        """Stop a request and free its place; nothing happens to one that has ended."""
        ...

    async def score(self, adapter: str | None, tokens: Sequence[int], top: int, owner: str = "") -> list[Token]:
        """The log probability of each token after those before it; the first has none.

        Raises:
            QueueFullError, EngineDeadError, EngineUnavailableError, NonFiniteError: as `submit` and its generation do.
        """
        ...

    async def load_adapter(self, key: str, folder: Path) -> None:
        """Load the LoRA weights in `folder` under `key`, while requests run.

        Raises:
            InvalidAdapterError: the folder holds no adapter this engine can serve.
            NoFreeSlotError: as many are loaded as fit.
        """
        ...

    def unload_adapter(self, key: str) -> None:
        """Take no more requests for `key`; its place is free once the running ones end."""
        ...
