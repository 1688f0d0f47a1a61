"""Documents side by side in one row, without padding, each attending to itself alone.

A random padded batch of 16 abstracts is half padding; laid end to end nothing is. Position ids restart at
each document, and attention runs per document: FlashAttention's varlen kernel or torch's own where there is a
GPU that has them, one SDPA call a document elsewhere (on a CPU 9 times faster than one call under a block mask).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

IGNORE = -100
ATTENTION = "feyntune_packed"  # the name under which transformers finds the function below


@dataclass
class Packed:
    """Documents end to end.

    Attributes:
        input_ids, position_ids, labels: [1, tokens]. `labels[t]` is the token after t in the same document,
            IGNORE at the last token of each.
        lengths: tokens of each document, in order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]

    def to(self, device: torch.device | str) -> "Packed":
        return Packed(self.input_ids.to(device), self.position_ids.to(device), self.labels.to(device), self.lengths)


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
    row = lambda values: torch.tensor(values, dtype=torch.long)[None]
    return Packed(row(ids), row(positions), row(labels), [len(d) for d in documents])


def budgeted(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of documents grouped in order so that no group exceeds `budget` tokens.

    A document longer than the budget stands alone. Sort the lengths first to make groups even.
    """
    groups: list[list[int]] = []
    room = 0
    for i, n in enumerate(lengths):
        if not groups or n > room:
            groups.append([])
            room = budget
        groups[-1].append(i)
        room -= n
    return groups


def kernel(device: torch.device | str) -> str:
    """Which attention runs on `device`: "flash-attn", "torch-varlen" or "sdpa". Goes into manifests."""
    if torch.device(device).type == "cuda":
        try:
            import flash_attn  # noqa: F401

            return "flash-attn"
        except ImportError:
            pass
        if torch.cuda.get_device_capability(device)[0] >= 8:
            try:
                from torch.nn.attention.varlen import varlen_attn  # noqa: F401

                return "torch-varlen"
            except ImportError:
                pass
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document; shapes as transformers': [1, heads, tokens, head dim]."""
    if lengths is None:
        raise ValueError("packed attention needs `lengths`: call the model through hidden_states()")
    out: Any
    which = kernel(query.device)
    if which == "sdpa" or query.dtype == torch.float32:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        parts = zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
        each = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in parts]
        return torch.cat(each, dim=2).transpose(1, 2), None

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head dim]
    longest = max(lengths)
    if which == "flash-attn":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, softmax_scale=scaling, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        causal = (-1, 0)  # any number of tokens to the left, none to the right
        out = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=causal, enable_gqa=q.shape[1] > k.shape[1]
        )
    return out[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)  # else a tokens x tokens mask is built


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
    )
    return out.last_hidden_state[0]
