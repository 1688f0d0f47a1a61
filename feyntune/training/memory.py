"""How much memory a training step takes, and how many layers must recompute so that it fits.

The figures count what autograd keeps of a Llama layer under LoRA, where frozen weights need no input kept.
They were worked out by hand and not yet checked against a GPU; README says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from feyntune.errors import UserError
from feyntune.training.config import TARGETS, TrainConfig

GPU_WORDS = 8192  # of the vocabulary at once in the loss
GPU_TOKENS = 8192  # at once: more than any batch of 16 abstracts holds
CPU_TOKENS = 1024  # a working set that fits a CPU's caches is faster than a larger one
LEAST_TOKENS = 1024
_RESERVED = 2e9  # bytes: the driver's context, kernels' workspace
_FRAGMENTS = 0.08  # share of a device that the allocator cannot use

# Bytes of a weight: NF4 has 4 bits, a scale of 8 bits to 64 weights, and one of 32 bits to 256 scales
# (arXiv 2305.14314 §3).
_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "bf16": 2.0, "fp32": 4.0}


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-architecture model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From the fields of a config.json."""
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
        )

    @property
    def kv(self) -> int:
        """Width of keys and of values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the seven linear layers of a decoder layer."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        return {
            "q_proj": (h, h),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (h, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def linear(self) -> int:
        """Weights of all decoder layers' linear layers."""
        return self.layers * sum(a * b for a, b in self.projections.values())

    @property
    def parameters(self) -> int:
        """All weights: linear layers, embeddings, output head, norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.linear + embeddings + (2 * self.layers + 1) * self.hidden


LLAMA_8B = Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)


@dataclass(frozen=True)
class MemoryPlan:
    """How micro-batches are computed, and the bytes a device needs for it."""

    layers: int  # that recompute
    tokens: int  # at once
    bytes: float = 0.0


def adapter_parameters(shape: Shape, method: str, rank: int) -> int:
    """Weights of a LoRA adapter: rank x (in + out) for each adapted layer."""
    return shape.layers * sum(rank * sum(shape.projections[name]) for name in TARGETS[method])


def base_bytes(shape: Shape, precision: str) -> float:
    """The frozen base on a device; under NF4 only the linear layers are quantised, the rest stays in bf16."""
    rest = shape.parameters - shape.linear
    return shape.linear * _WEIGHT[precision] + rest * (_WEIGHT["bf16"] if precision == "nf4" else _WEIGHT[precision])


def layer_bytes(shape: Shape, method: str, dropout: float, precision: str) -> float:
    """What one decoder layer keeps for each token until its backward pass.

    Norms keep an fp32 copy, their scaled value and their output; attention its three inputs and its output; the MLP
    gate, its SiLU, up and their product; the residual stream two values. With dropout every adapted layer keeps a
    dropped copy of its input and a mask of one byte a value, where without it the layers share their inputs.
    """
    h, i, kv = shape.hidden, shape.intermediate, shape.kv
    value = 4 if precision == "fp32" else 2
    kept = 2 * (4 + 2 * value) * h + (2 * h + 2 * kv) * value + 4 * i * value + 2 * h * value
    if dropout > 0:
        adapted = [shape.projections[name][0] for name in TARGETS[method]]
        kept += (value + 1) * sum(adapted)
    return kept


def step_bytes(shape: Shape, method: str, config: TrainConfig, tokens: int, layers: int) -> float:
    """What a device needs at the peak of a step of `tokens` tokens with `layers` layers recomputing."""
    value = 4 if config.precision == "fp32" else 2
    one = layer_bytes(shape, method, config.lora_dropout, config.precision) * tokens
    activations = (shape.layers - layers) * one + layers * shape.hidden * value * tokens + (one if layers else 0)
    dequantised = max(a * b for a, b in shape.projections.values()) * 2 if config.precision == "nf4" else 0
    logits = tokens * (config.vocab_chunk_size or GPU_WORDS) * (4 + value) + tokens * shape.hidden * (4 + value)
    learned = adapter_parameters(shape, method, config.lora_rank) * 4 * 4  # weights, gradient, two moments in fp32
    return base_bytes(shape, config.precision) + learned + activations + dequantised + logits + _RESERVED


def plan(shape: Shape, method: str, config: TrainConfig, memory: float) -> MemoryPlan:
    """The fewest recomputing layers with which a step fits into `memory` bytes; fewer tokens at once if none does.

    Raises:
        UserError: not even 1,024 tokens with every layer recomputing fit.
    """
    usable = memory * (1 - _FRAGMENTS)
    tokens = config.micro_batch_tokens or GPU_TOKENS
    given = (
        None
        if config.activation_checkpointing_layers == "auto"
        else min(config.activation_checkpointing_layers, shape.layers)
    )
    while True:
        for layers in range(shape.layers + 1) if given is None else (given,):
            needed = step_bytes(shape, method, config, tokens, layers)
            if needed <= usable:
                return MemoryPlan(layers, tokens, needed)
        if config.micro_batch_tokens or tokens // 2 < LEAST_TOKENS:
            break
        tokens //= 2
    raise UserError(
        f"A step needs {needed / 1e9:.1f} GB of the device's {memory / 1e9:.1f} ({tokens} tokens at once, {layers} of "
        f"{shape.layers} layers recomputing): set precision to nf4, lower micro_batch_tokens, or take a larger device."
    )


def plan_memory(model: torch.nn.Module, method: str, config: TrainConfig, device: torch.device) -> MemoryPlan:
    """The plan for a loaded model on its device. On a CPU nothing recomputes unless it is asked for."""
    shape = Shape.of(model.config.get_text_config().to_dict())  # type: ignore[union-attr,operator]
    if device.type == "cuda":
        return plan(shape, method, config, float(torch.cuda.get_device_properties(device).total_memory))
    layers = (
        0
        if config.activation_checkpointing_layers == "auto"
        else min(config.activation_checkpointing_layers, shape.layers)
    )
    return MemoryPlan(layers, config.micro_batch_tokens or CPU_TOKENS)
