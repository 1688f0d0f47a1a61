"""Attention of each request of a batch over its own keys only.

transformers packs the tokens of all requests into one row and masks every query against every request's keys. Its
cost grows with the square of the number of requests, and one request's infinity reaches the others through the
mask (0 x inf). Here each request attends to its own keys and values, so neither happens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class _NoCache:
    """In the place of upstream's cache where texts are scored: their keys are all in the row."""

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value


NO_CACHE = _NoCache()


def _attention_per_request(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' "sdpa" without a paged cache; shapes as transformers': [1, heads, tokens, head dim]."""
    if cache is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    key, value = cache.update(key, value, module.layer_idx, kwargs)
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = torch.empty_like(query)
    for i in range(len(ends_q) - 1):
        first, last = ends_q[i], ends_q[i + 1]
        new, total = last - first, ends_k[i + 1] - ends_k[i]
        if new == 0:
            continue
        q = query[:, :, first:last]
        k, v = (x[:, :, ends_k[i] : ends_k[i + 1]] for x in (key, value))
        if new == 1:  # the query heads of one key head become the rows of one product
            q = q.reshape(1, k.shape[1], groups, -1)
            out[:, :, first:last] = F.scaled_dot_product_attention(q, k, v, scale=scaling).reshape(
                1, -1, 1, q.shape[-1]
            )
            continue
        mask = None
        if new < total:  # a part of a prompt whose start is in the cache
            mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out[:, :, first:last] = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
    return out.transpose(1, 2).contiguous(), None


def install_attention() -> None:
    """Put it in the place of transformers' "sdpa": continuous batching takes no implementation of another name."""
    AttentionInterface.register("sdpa", _attention_per_request)
