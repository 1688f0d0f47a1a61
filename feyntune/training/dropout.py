"""Dropout masks that belong to a document, not to a device or a micro-batch.

On a CPU a document's masks come from a generator seeded with (run seed, step, position in the global batch, layer): a
step drops the same values however its documents are divided among devices and micro-batches, after a restart, and
when a layer recomputes its activations. No random state needs saving. Drawing 16 bits a value from 64-bit numbers is
also about three times faster on a CPU than torch's dropout. On a GPU torch's own dropout draws one mask for
the micro-batch, seeded the same way: a loop over documents would cost a launch each, and GPUs of two kinds draw
different numbers anyway.
"""

from collections.abc import Sequence

import torch

from feyntune.training.batches import seed_of


class DropoutMasks:
    """The masks of all LoRA layers for the micro-batch that is being computed."""

    def __init__(self, p: float, framework: bool = False) -> None:
        """`framework`: by torch's dropout, one mask for all documents of the micro-batch."""
        self.p, self.framework = p, framework
        self.threshold = round(p * 2**16) - 2**15
        self.lengths: list[int] = []
        self.seeds: list[int] = []

    def set(self, lengths: Sequence[int], seeds: Sequence[int]) -> None:
        """Describe the micro-batch: tokens and seed of each document."""
        self.lengths, self.seeds = list(lengths), list(seeds)

    @torch.no_grad()
    def apply(self, x: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """gain * x * mask, the mask, and the gain: 1, or 1 / (1 - p) by torch's dropout, which multiplies with it."""
        if not self.framework:
            keep = self.keep(x, layer)
            return x * keep, keep, 1.0
        seed = _layer_seed(self.seeds[0], layer)
        torch.cuda.manual_seed(seed) if x.is_cuda else torch.manual_seed(seed)
        dropped, keep = torch.native_dropout(x, self.p, True)
        return dropped, keep, 1 / (1 - self.p)

    def keep(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """Boolean mask like `x` ([..., tokens, features]): False with probability `p`, exact to 2^-17."""
        features = x.shape[-1]
        if x.numel() != sum(self.lengths) * features:
            raise ValueError("DropoutMasks: set the lengths of the micro-batch before it is computed")
        generator = torch.Generator()
        parts = []
        for n, seed in zip(self.lengths, self.seeds, strict=True):
            generator.manual_seed(_layer_seed(seed, layer))
            bits = torch.empty(-(-n * features // 4), dtype=torch.int64)
            parts.append(bits.random_(-(2**63), None, generator=generator).view(torch.int16)[: n * features])
        return torch.cat(parts).view(x.shape) >= self.threshold


def document_seeds(seed: int, step: int, positions: Sequence[int]) -> list[int]:
    """Seeds of the documents at `positions` of the global batch of `step`."""
    return [seed_of(seed, "dropout", step, position) for position in positions]


def _layer_seed(seed: int, layer: int) -> int:
    return (seed + layer * 0x9E3779B97F4A7C15) % 2**63
