"""Cross-entropy through a frozen output head, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F

CPU_VOCAB_CHUNK = 1024  # vocabulary entries at once on a CPU: their weights stay in its cache between two products


def frozen_head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, labels: torch.Tensor, vocab_chunk_size: int = CPU_VOCAB_CHUNK
) -> torch.Tensor:
    """Sum of the cross-entropy of `head(hidden)` against `labels`, in nats, in fp32.

    The head is frozen, so only the hidden states need a gradient: softmax times the weight, minus the label's row of
    it. The softmax's sum and that product are accumulated in one pass over the vocabulary in chunks, as FlashAttention
    passes over keys: with a running maximum, and the sums rescaled when it rises (arXiv 2205.14135, section 3.1). The
    weight is read once, no logits are kept, and memory is 4 bytes x tokens x vocab_chunk_size instead of
    3 x 4 bytes x tokens x vocabulary.

    Args:
        hidden: [tokens, hidden].
        labels: [tokens], all real: leave out the tokens that predict nothing.
        vocab_chunk_size: vocabulary entries whose logits exist at once.

    Raises:
        ValueError: the head is trainable (it would get no gradient), or is not a plain linear layer.
    """
    if not isinstance(head, torch.nn.Linear) or hasattr(head, "base_layer"):
        raise ValueError("frozen_head_loss needs a plain linear output head")
    if any(p.requires_grad for p in head.parameters()):
        raise ValueError("frozen_head_loss gives the output head no gradient: freeze it, or use cross_entropy")
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, labels, vocab_chunk_size)
    return _accumulate(hidden.detach(), head.weight, head.bias, labels, vocab_chunk_size, None)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        vocab_chunk_size: int,
    ) -> torch.Tensor:
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        total = _accumulate(hidden, weight, bias, labels, vocab_chunk_size, gradient)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        # In fp32: a scale such as 1 / tokens rounded to bf16 would be off by up to 0.4 %.
        return (gradient.float() * outputs[0]).to(gradient.dtype), None, None, None, None


def _accumulate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    vocab_chunk_size: int,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss; `gradient` ([tokens, hidden], fp32 zeros), if given, becomes the hidden states'.

    Products are made in the weight's own precision, everything else in fp32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, label = hidden.to(weight.dtype), labels[:, None]
        top = torch.full(label.shape, float("-inf"), dtype=torch.float32, device=hidden.device)
        total, own = torch.zeros_like(top), torch.zeros_like(top)
        for first in range(0, len(weight), vocab_chunk_size):
            part = weight[first : first + vocab_chunk_size]
            logits = F.linear(hidden, part, None if bias is None else bias[first : first + vocab_chunk_size]).float()
            place = label - first
            inside = (place >= 0) & (place < len(part))
            own = torch.where(inside, logits.gather(1, place.clamp(0, len(part) - 1)), own)
            higher = torch.maximum(top, logits.amax(1, keepdim=True))
            shrink, top = (top - higher).exp_(), higher
            logits.sub_(top).exp_()
            total.mul_(shrink).add_(logits.sum(1, keepdim=True))
            if gradient is not None:
                gradient.mul_(shrink)
                if weight.dtype == torch.float32:
                    gradient.addmm_(logits, part)
                else:
                    gradient += logits.to(weight.dtype) @ part
        if gradient is not None:
            gradient.div_(total).sub_(weight[labels])
        return (top + total.log() - own).sum()
