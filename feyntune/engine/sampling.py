"""The next token of one request, by its own settings."""

from collections.abc import Sequence

import torch

from feyntune.engine.api import GREEDY_BELOW, Sampling, Token


def adjust(
    logits: torch.Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int], eos: Sequence[int]
) -> torch.Tensor:
    """`logits` [vocabulary] with the bias, the penalties and the least number of tokens applied.

    Repetition (arXiv 1909.05858 §4.1) counts prompt and completion; frequency and presence count the completion, as
    OpenAI's and vLLM's do.
    """
    logits = logits.clone()
    device = logits.device
    if sampling.logit_bias:
        biased, bias = zip(*sampling.logit_bias, strict=True)
        logits[torch.tensor(biased, device=device)] += torch.tensor(bias, dtype=logits.dtype, device=device)
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), device=device)
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if generated and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = torch.tensor(generated, device=device).unique(return_counts=True)
        logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    if len(generated) < sampling.min_tokens:
        logits[list({*eos, *sampling.stop_token_ids})] = -torch.inf
    return logits


def draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token of `logits` [vocabulary] by temperature, top_k, min_p and nucleus, by the exponential (Gumbel-max)
    trick; the most likely one where the temperature is 0."""
    if sampling.temperature < GREEDY_BELOW or generator is None:
        return logits.argmax()
    p = (logits / sampling.temperature).softmax(-1)
    if 0 < sampling.top_k < len(p):
        p = torch.where(p >= p.topk(sampling.top_k).values[-1], p, 0)
    if sampling.min_p > 0:
        p = torch.where(p >= sampling.min_p * p.max(), p, 0)
    if sampling.top_p < 1:
        p = p / p.sum()
        largest, order = p.sort(descending=True)
        outside = largest.cumsum(-1) - largest >= sampling.top_p
        p = p.index_fill(0, order[outside], 0)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax()


def with_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[Token]:
    """Tokens [n] with their log probabilities by `logits` [n, vocabulary] and the `top` most likely ones'."""
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, tokens[:, None])[:, 0].tolist()
    best = log_p.topk(top, dim=-1)
    rows = zip(tokens.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Token(t, p, tuple(zip(i, v, strict=True))) for t, p, i, v in rows]
