"""How much memory a training step takes, and how many layers must recompute their activations so that it fits.

The figures count what autograd keeps of a Llama layer under LoRA, where frozen weights need no input kept. A test
compares them with what autograd keeps on a CPU; they have not been checked against a GPU's peak
(`python -m benchmarks.gpu` does).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from feyntune.errors import UserError
from feyntune.training.config import TARGETS, TrainConfig

if TYPE_CHECKING:
    import torch

GPU_VOCAB_CHUNK = 8192  # vocabulary entries at once in the loss
GPU_TOKENS = 8192  # of a micro-batch: more than any batch of 16 abstracts has
CPU_TOKENS = 1024  # a working set that fits a CPU's caches is faster than a larger one
MIN_TOKENS = 1024
RESERVED_BYTES = 2e9  # bytes: the driver's context, kernels' workspace
_FRAGMENTATION = 0.08  # share of a device that the allocator cannot use
_SHRINK = 0.9  # of what was thought to fit, after the device ran out of memory

# Bytes of a weight: NF4 has 4 bits, a scale of 8 bits to 64 weights, and one of 32 bits to 256 scales
# (arXiv 2305.14314 §3).
_WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "bf16": 2.0, "fp32": 4.0}


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
    """How micro-batches are computed on a device.

    Attributes:
        micro_batch_tokens: most tokens of a micro-batch.
        layers: layers that recompute in the largest micro-batch.
        bytes: what the device needs for the largest micro-batch; 0 on a CPU, which is not planned.
        capacity: the most tokens that fit while 0, 1, 2, … layers recompute; empty where `layers` always recompute.
    """

    micro_batch_tokens: int
    layers: int
    bytes: float = 0.0
    capacity: tuple[float, ...] = ()

    def layers_for(self, tokens: int) -> int:
        """How many layers recompute in a micro-batch of `tokens` tokens: as few as fit."""
        if not self.capacity:
            return self.layers
        return next((layers for layers, most in enumerate(self.capacity) if tokens <= most), len(self.capacity) - 1)

    def lower(self, tokens: int) -> "MemoryPlan":
        """The plan after `tokens` tokens at once ran out of memory: more layers recompute, then fewer tokens."""
        if not self.capacity:
            return replace(self, micro_batch_tokens=tokens // 2)
        fitted = min(tokens / self.capacity[self.layers_for(tokens)], 1.0)
        capacity = tuple(_SHRINK * fitted * most for most in self.capacity)
        budget = min(self.micro_batch_tokens, int(max(capacity)))
        lowered = replace(self, micro_batch_tokens=budget, capacity=capacity)
        return replace(lowered, layers=lowered.layers_for(min(budget, tokens)))


def adapter_parameters(shape: Shape, method: str, rank: int) -> int:
    """Weights of a LoRA adapter: rank x (in + out) for each adapted layer."""
    return shape.layers * sum(rank * sum(shape.projections[name]) for name in TARGETS[method])


def base_bytes(shape: Shape, precision: str) -> float:
    """The frozen base on a device; under NF4 only the linear layers are quantized, the rest stays in bf16."""
    rest = shape.parameters - shape.linear
    return shape.linear * _WEIGHT_BYTES[precision] + rest * (
        _WEIGHT_BYTES["bf16"] if precision == "nf4" else _WEIGHT_BYTES[precision]
    )


def layer_bytes(shape: Shape, method: str, dropout: float, precision: str) -> float:
    """What one decoder layer keeps for each token until its backward pass.

    Norms keep their input (two, of the residual stream) and 1/rms; attention its three inputs, its output and a
    log-sum-exp for each head; the MLP gate, up and SiLU(gate). An adapted layer keeps its input, which q, k and v
    share, as gate and up do, and with dropout a mask of one byte a value; also rank values, which are not counted.
    """
    h, i, kv = shape.hidden, shape.intermediate, shape.kv
    value = 4 if precision == "fp32" else 2
    targets = TARGETS[method]
    values = 2 * h + (2 * h + 2 * kv) + 3 * i
    values += h if {"q_proj", "k_proj", "v_proj"} & set(targets) else 0  # the first norm's output
    values += h if {"gate_proj", "up_proj"} & set(targets) else 0  # the second norm's
    values += i if "down_proj" in targets else 0  # SiLU(gate) x up; o_proj's input is attention's output
    masks = sum(shape.projections[name][0] for name in targets) if dropout > 0 else 0
    return values * value + masks + 4 * (2 + shape.heads)


def step_bytes(shape: Shape, method: str, config: TrainConfig, tokens: int, layers: int) -> float:
    """What a device needs at the peak of a step of `tokens` tokens with `layers` layers recomputing."""
    value = 4 if config.precision == "fp32" else 2
    one = layer_bytes(shape, method, config.lora_dropout, config.precision) * tokens
    activations = (shape.layers - layers) * one + layers * shape.hidden * value * tokens + (one if layers else 0)
    activations += 4 * tokens * shape.intermediate * value  # of the backward pass itself
    dequantized = max(a * b for a, b in shape.projections.values()) * 2 if config.precision == "nf4" else 0
    chunk = config.vocab_chunk_size or GPU_VOCAB_CHUNK
    logits = tokens * chunk * (4 + value) + tokens * shape.hidden * (4 + 3 * value)
    trainable = adapter_parameters(shape, method, config.lora_rank) * 4 * 4  # weights, gradient, two moments in fp32
    return base_bytes(shape, config.precision) + trainable + activations + dequantized + logits + RESERVED_BYTES


def plan(shape: Shape, method: str, config: TrainConfig, memory: float, largest: int | None = None) -> MemoryPlan:
    """How to compute micro-batches in `memory` bytes with as few recomputing layers as fit.

    Args:
        largest: tokens of the largest micro-batch that will come; without it, the most that are allowed.

    Raises:
        UserError: not even 1,024 tokens with every layer recomputing fit.
    """
    usable = memory * (1 - _FRAGMENTATION)
    fixed = config.activation_checkpointing_layers
    counts = range(shape.layers + 1) if fixed == "auto" else (min(fixed, shape.layers),)
    capacity = []
    for layers in counts:
        nothing = step_bytes(shape, method, config, 0, layers)
        capacity.append((usable - nothing) / (step_bytes(shape, method, config, 1, layers) - nothing))
    budget = config.micro_batch_tokens or GPU_TOKENS
    tokens = budget if largest is None else min(budget, largest)
    fits = int(max(capacity))
    if fits < tokens:
        if config.micro_batch_tokens or fits < min(MIN_TOKENS, tokens):
            needed = step_bytes(shape, method, config, tokens, counts[-1])
            raise UserError(
                f"A step needs {needed / 1e9:.1f} GB of the device's {memory / 1e9:.1f} ({tokens} tokens at once, "
                f"{counts[-1]} of {shape.layers} layers recomputing): set precision to nf4, lower micro_batch_tokens, "
                "or take a larger device."
            )
        budget = tokens = fits
    layers = next(n for n, most in zip(counts, capacity, strict=True) if tokens <= most)
    needed = step_bytes(shape, method, config, tokens, layers)
    return MemoryPlan(budget, layers, needed, tuple(capacity) if fixed == "auto" else ())


def plan_memory(
    model: "torch.nn.Module", method: str, config: TrainConfig, device: "torch.device", largest: int | None = None
) -> MemoryPlan:
    """The plan for a loaded model on its device. On a CPU layers recompute only if the config says so."""
    shape = Shape.of(model.config.get_text_config().to_dict())  # type: ignore[union-attr,operator]
    if device.type == "cuda":
        import torch  # `feyntune plan` does without

        return plan(shape, method, config, float(torch.cuda.get_device_properties(device).total_memory), largest)
    fixed = config.activation_checkpointing_layers
    return MemoryPlan(config.micro_batch_tokens or CPU_TOKENS, 0 if fixed == "auto" else min(fixed, shape.layers))
