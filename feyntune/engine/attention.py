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
    new, total = (kwargs[name].diff().tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    each = zip(query.split(new, 2), key.split(total, 2), value.split(total, 2), strict=True)
    return torch.cat([_attend(q, k, v, groups, scaling) for q, k, v in each], 2).transpose(1, 2), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int, scaling: float | None
) -> torch.Tensor:
    """Attention of one request's newest tokens over all of its tokens."""
    new, total = query.shape[2], key.shape[2]
    if new == 1:  # the query heads of one key head become the rows of one product
        rows = query.reshape(1, key.shape[1], groups, -1)
        return F.scaled_dot_product_attention(rows, key, value, scale=scaling).reshape(query.shape)
    mask = None
    if new < total:  # a part of a prompt whose start is in the cache
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)


def install_attention() -> None:
    """Put it in the place of transformers' "sdpa": continuous batching takes no implementation of another name."""
    AttentionInterface.register("sdpa", _attention_per_request)
