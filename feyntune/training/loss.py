"""Cross-entropy through a frozen output head, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F

WORDS = 1024  # of the vocabulary at once, on a CPU: their weights stay in its cache from one product to the next


def frozen_head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, labels: torch.Tensor, words: int = WORDS
) -> torch.Tensor:
    """Sum of the cross-entropy of `head(hidden)` against `labels`, in nats, in fp32.

    The head does not learn, so the one gradient wanted is that of the hidden states: softmax times the weight, minus
    the label's own row of it. Both the softmax's sum and that product are gathered in one walk through the
    vocabulary, some words at a time, in the way FlashAttention walks through keys: a running maximum, and what was
    gathered so far rescaled when it rises (arXiv 2205.14135 §3.1). So the weight is read once, the logits are never
    needed again, and memory is tokens x words x 4 bytes instead of 3 x tokens x vocabulary x 4.

    Args:
        hidden: [tokens, hidden].
        labels: [tokens], all real: leave out the tokens that predict nothing.
        words: of the vocabulary whose logits exist at once.

    Raises:
        ValueError: the head learns (it would get no gradient), or is not a plain linear layer.
    """
    if not isinstance(head, torch.nn.Linear) or hasattr(head, "base_layer"):
        raise ValueError("frozen_head_loss needs a plain linear output head")
    if any(p.requires_grad for p in head.parameters()):
        raise ValueError("frozen_head_loss gives the output head no gradient: freeze it, or use cross_entropy")
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, labels, words)
    return _walk(hidden.detach(), head.weight, head.bias, labels, words, None)


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        words: int,
    ) -> torch.Tensor:
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        total = _walk(hidden, weight, bias, labels, words, gradient)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    words: int,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The summed loss; `gradient` ([tokens, hidden], fp32 zeros), if given, becomes the hidden states'.

    Products are made in the weight's own precision, everything else in fp32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, label = hidden.to(weight.dtype), labels[:, None]
        column = lambda value: torch.full(label.shape, value, dtype=torch.float32, device=hidden.device)
        top, total, own = column(float("-inf")), column(0.0), column(0.0)
        for first in range(0, len(weight), words):
            part = weight[first : first + words]
            logits = F.linear(hidden, part, None if bias is None else bias[first : first + words]).float()
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
