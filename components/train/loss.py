"""Cross-entropy through a frozen output head, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F


def frozen_head_loss(
    hidden: torch.Tensor, head: torch.nn.Module, labels: torch.Tensor, chunk: int = 128
) -> torch.Tensor:
    """Sum of the cross-entropy of `head(hidden)` against `labels`, in nats, in fp32.

    The head does not learn, so the one gradient wanted is that of the hidden states: softmax minus one-hot, times
    the weight. It is formed chunk by chunk in the forward pass, while a chunk's logits exist, and the logits are
    never needed again. Memory is 2 x chunk x vocabulary x 4 bytes instead of 3 x tokens x vocabulary x 4.
    (The idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989 §3.2, less the weight's gradient.)

    Args:
        hidden: [tokens, hidden].
        labels: [tokens], all real: leave out the tokens that predict nothing.
        chunk: tokens whose logits exist at once.

    Raises:
        ValueError: the head learns (it would get no gradient), or is not a plain linear layer.
    """
    if not isinstance(head, torch.nn.Linear) or hasattr(head, "base_layer"):
        raise ValueError("frozen_head_loss needs a plain linear output head")
    if any(p.requires_grad for p in head.parameters()):
        raise ValueError("frozen_head_loss gives the output head no gradient: freeze it, or use cross_entropy")
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _FrozenHeadLoss.apply(hidden, head.weight, head.bias, labels, chunk)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for i in range(0, len(hidden), chunk):
        logits = _logits(hidden, head.weight, head.bias, i, chunk)
        total += F.cross_entropy(logits, labels[i : i + chunk], reduction="sum")
    return total


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(hidden), chunk):
            logits = _logits(hidden, weight, bias, i, chunk)
            target = labels[i : i + chunk, None]
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            logits.sub_(log_sum).exp_()  # now the softmax
            logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=logits.dtype))
            with torch.autocast(hidden.device.type, enabled=False):
                gradient[i : i + chunk] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, start: int, chunk: int
) -> torch.Tensor:
    """[chunk, vocabulary] in fp32, from a product in the weight's own precision."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden[start : start + chunk].to(weight.dtype), weight, bias).float()
