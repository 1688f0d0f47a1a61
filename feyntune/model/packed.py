"""Packing: documents end to end in one row, without padding, each attending only to itself.

Half of a random padded batch of 16 abstracts is padding; a packed one has none. Position ids restart at each
document, and attention runs per document: FlashAttention's varlen kernel, or torch's own, on a GPU that has one; one
SDPA call a document elsewhere (on a CPU 9 times faster than one call under a block mask).
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

IGNORE = -100
ATTENTION = "feyntune_packed"  # the name under which transformers finds the function below


@dataclass
class Packed:
    """Documents end to end.

    Attributes:
        input_ids, position_ids, labels: [1, tokens]. `labels[t]` is the token after t in the same document,
            IGNORE at the last token of each.
        lengths: tokens of each document, in order.
        cu_seqlens: [documents + 1], int32: where each document starts, and the end of the last.
        predicted: positions whose label is not IGNORE.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    cu_seqlens: torch.Tensor
    predicted: torch.Tensor

    def to(self, device: torch.device | str) -> "Packed":
        """Copies on `device`; to a GPU without waiting for it."""
        if torch.device(device).type == "cpu":
            return self
        tensors = (self.input_ids, self.position_ids, self.labels, self.cu_seqlens, self.predicted)
        ids, positions, labels, ends, predicted = (t.pin_memory().to(device, non_blocking=True) for t in tensors)
        return Packed(ids, positions, labels, self.lengths, ends, predicted)


def pack(documents: Sequence[Sequence[int]]) -> Packed:
    """Lay token ids of `documents` end to end. An empty document is refused."""
    if not documents or any(len(d) == 0 for d in documents):
        raise ValueError("pack: every document must hold at least one token")
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for d in documents:
        ids += d
        positions += range(len(d))
        labels += [*d[1:], IGNORE]
    input_ids, position_ids, targets = (
        torch.tensor(values, dtype=torch.long)[None] for values in (ids, positions, labels)
    )
    lengths = [len(d) for d in documents]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    predicted = (targets[0] != IGNORE).nonzero()[:, 0]
    return Packed(input_ids, position_ids, targets, lengths, cu_seqlens, predicted)


def group_by_token_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of documents grouped in order so that no group exceeds `budget` tokens.

    A document longer than the budget is a group of its own. Sort the lengths first to make groups even.
    """
    groups: list[list[int]] = []
    remaining = 0
    for i, n in enumerate(lengths):
        if not groups or n > remaining:
            groups.append([])
            remaining = budget
        groups[-1].append(i)
        remaining -= n
    return groups


@cache
def attention_backend(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """Which attention runs for values of `dtype` on `device`: "flash-attn", "torch-varlen" or "sdpa"."""
    device = torch.device(device)
    if device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device)[0] < 8:
        return "sdpa"
    for name, module in (("flash-attn", "flash_attn"), ("torch-varlen", "torch.nn.attention.varlen")):
        try:
            importlib.import_module(module)
            return name
        except ImportError:
            continue
    return "sdpa"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    lengths: Sequence[int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; shapes as transformers': [1, heads, tokens, head dim]."""
    if lengths is None or cu_seqlens is None:
        raise ValueError("packed attention needs the documents' lengths: call the model through hidden_states()")
    out: Any
    backend = attention_backend(query.device, query.dtype)
    if backend == "sdpa":
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and query.is_cuda:  # of its kernels only flash reads fewer keys than queries
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            groups = 1
        sdpa = partial(F.scaled_dot_product_attention, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        parts = zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
        return torch.cat([sdpa(q, k, v) for q, k, v in parts], dim=2).transpose(1, 2), None

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head dim]
    longest = max(lengths)
    if backend == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scaling, causal=True
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        causal = (-1, 0)  # any number of tokens to the left, none to the right
        out = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scaling,
            window_size=causal,
            enable_gqa=q.shape[1] > k.shape[1],
        )
    return out[None], None


# No mask function is registered: transformers then builds no mask and does not look for packed sequences itself.
AttentionInterface.register(ATTENTION, _attention)


def backbone(model: Any) -> PreTrainedModel:
    """The decoder without its head, adapters in place, of a causal LM with or without a PEFT wrapper."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.model


def head(model: Any) -> torch.nn.Linear:
    """The output embedding (`lm_head`)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_output_embeddings()


def hidden_states(model: Any, batch: Packed) -> torch.Tensor:
    """Last hidden states [tokens, hidden] of packed documents; `model` was loaded with packed attention."""
    out = backbone(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        lengths=batch.lengths,
        cu_seqlens=batch.cu_seqlens,
    )
    return out.last_hidden_state[0]
