"""The library's batching loop with this project's hooks: each token's adapter, and the draw of the next tokens."""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from feyntune.engine.api import EngineSettings, Sampling, Token, received
from feyntune.engine.lora import Slots
from feyntune.engine.sampling import adjust, draw, with_log_probabilities

PAGE = 16  # tokens of the cache given out at once


@dataclass
class Slot:
    index: int
    users: int = 0
    retired: bool = False  # unloaded, and freed once nobody uses it


@dataclass(eq=False)
class Running:
    """A request: its settings, its tokens so far, and who waits for them (`engine.Generation`)."""

    id: str
    slot: Slot | None  # None is the base
    prompt: list[int]
    sampling: Sampling
    generator: torch.Generator | None
    submitted: float
    owner: str = ""
    expiry: asyncio.TimerHandle | None = None  # ends its wait in the queue
    tokens: asyncio.Queue[Token | Exception | None] = field(default_factory=asyncio.Queue)
    log_probabilities: list[Token] = field(default_factory=list)  # by the engine's thread, before delivery
    delivered: int = 0
    admitted: bool = False
    over: bool = False
    non_finite: bool = False  # set by the engine's thread, before delivery

    @property
    def length(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def reserved(self) -> int:
        return -(-self.length // PAGE) * PAGE

    def __aiter__(self) -> AsyncIterator[Token]:
        return received(self.tokens)


class DiscardQueue(queue.Queue):
    """Takes the place of the queue for outputs nobody waits for: upstream would keep them, prompt and all.

    Such a request was cancelled. It is cancelled again, since upstream forgets a cancellation that comes before it
    has taken the request out of its input queue.
    """

    def __init__(self, cancel: Callable[[str], None]):
        super().__init__()
        self._cancel = cancel

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if not item.is_finished():
            self._cancel(item.request_id)


class Manager(ContinuousBatchingManager):
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
        self.eos = eos
        self.output_router.output_queue = DiscardQueue(self.cancel_request)

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
        drawing = [f.state for f in runner.inputs_and_outputs.requests_in_batch if f.has_new_token]
        requests = [self.requests.get(state.request_id) for state in drawing]
        tokens = logits.argmax(-1)
        finite = torch.isfinite(logits).all(-1).tolist()
        reported: list[tuple[int, Running, int]] = []
        for i, (request, state) in enumerate(zip(requests, drawing, strict=True)):
            if request is None:
                continue
            sampling = request.sampling
            if not finite[i]:
                request.non_finite = True
                continue
            row = logits[i]
            if sampling.adjusts_logits:
                row = adjust(row, sampling, request.prompt, state.generated_tokens, self.eos)
            if request.generator is not None or sampling.adjusts_logits:
                tokens[i] = draw(row, sampling, request.generator)
            if sampling.logprobs is not None:
                reported.append((i, request, sampling.logprobs))
        if reported:
            rows = [i for i, _, _ in reported]
            known = with_log_probabilities(logits[rows], tokens[rows], max(top for _, _, top in reported))
            for token, (_, request, top) in zip(known, reported, strict=True):
                request.log_probabilities.append(Token(token.id, token.logprob, token.top[:top]))
        out[0, : len(tokens)].copy_(tokens)
