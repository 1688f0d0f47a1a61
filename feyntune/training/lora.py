"""A LoRA layer as one autograd function: y = base(x) + s * dropout(x) A^T B^T (arXiv 2106.09685, section 4.1).

PEFT's forward clones the base's output, scales and adds in passes of their own, and keeps a dropped copy of every
input. Here B's product is added into the base's output, the scale is applied to [tokens, rank] values, and only the
input (which layers share) and a mask of one byte a value are kept. PEFT still creates, saves and loads the adapter.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from feyntune.training.dropout import DropoutMasks


class _AddLora(torch.autograd.Function):
    """y + scale * (x * keep) A^T B^T, written into y; `dropped` is gain * x * keep, or None without dropout.

    Values of rank width are [rank, tokens]: on a CPU a product of 8 rows is three to five times faster than the same
    one with 8 columns.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropped: torch.Tensor | None,
        keep: torch.Tensor | None,
        gain: float,
    ) -> torch.Tensor:
        a16, b16 = a.to(y.dtype), b.to(y.dtype)
        read = (x if dropped is None else dropped).to(y.dtype).flatten(0, -2)
        hidden = (a16 @ read.T).mul_(scale / gain)
        y.view(-1, y.shape[-1]).addmm_(hidden.T, b16.T)
        ctx.save_for_backward(x, a, b, hidden, *(() if keep is None else (keep,)))
        ctx.scale = scale
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        dy = outputs[0]
        x, a, b, hidden, *mask = ctx.saved_tensors
        dy2, x2 = dy.flatten(0, -2), x.to(dy.dtype).flatten(0, -2)
        dhidden = (b.to(dy.dtype).T @ dy2.T).mul_(ctx.scale)
        dropped = x2 * mask[0].flatten(0, -2) if mask else x2
        da = (dhidden @ dropped).to(a.dtype)
        db = (hidden @ dy2).T.to(b.dtype)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = (dhidden.T @ a.to(dy.dtype)).view(x.shape)
            if mask:
                dx.mul_(mask[0])
            dx = dx.to(x.dtype)
        return dy, dx, da, db, None, None, None, None


def fuse_lora(model: PeftModel, p: float) -> DropoutMasks:
    """Compute every LoRA layer of `model` by the function above, with dropout `p`; returns its masks."""
    masks = DropoutMasks(p, framework=next(model.parameters()).is_cuda)
    layers: list[Any] = [m for _, m in sorted(model.named_modules()) if isinstance(m, LoraLayer)]
    for i, layer in enumerate(layers):
        layer.forward = partial(_forward, layer, i, masks)
    return masks


def _forward(layer: Any, index: int, masks: DropoutMasks, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    y = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters:
        return y
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    if not (layer.training and masks.p > 0):
        return _AddLora.apply(y, x, a, b, scale, None, None, 1.0)
    return _AddLora.apply(y, x, a, b, scale / (1 - masks.p), *masks.apply(x, index))


def fuse_norms(model: PeftModel) -> None:
    """Compute every Llama RMSNorm by torch's own: one kernel on a GPU, and on a CPU half of the passes."""
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            norm: Any = module
            norm.forward = partial(_rms_norm, norm)


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    # CUDA's autocast would compute in fp32 and return fp32 (ATen/autocast_mode.h); the kernel sums in fp32 by itself.
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.variance_epsilon)
