"""How long a suite takes on a pool of GPUs in two layouts, from a roofline of one step.

The two layouts: one GPU a variant with as many variants at once as there are GPUs, or all GPUs on one variant after
the other. A step is the sum of its matrix products (with wave quantization: a product of few rows leaves
multiprocessors idle), elementwise traffic, dequantization of an NF4 base, and the gradient's all-reduce. Jobs start
longest first on the GPU that is free first (Graham 1969). components/train/README.md has the arithmetic. The constants
are assumptions until `python -m benchmarks.gpu` has run on a card; ratios between layouts are firmer than hours.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from feyntune.errors import UserError
from feyntune.training.config import TrainConfig
from feyntune.training.memory import LLAMA_8B, Shape, adapter_parameters

HEP_TH_TOKENS = 185.0  # of an abstract with BOS and EOS, under a 4,096-token BPE; Llama 3's was not tried
HEP_TH_CHARACTERS = 762
# Mean characters of an abstract, for mixtures that differ from the three physics archives' 794.
MIXTURE_CHARACTERS = {"hep-th": 762, "hep-th+q-bio+cs": 1020}
PHYSICS_CHARACTERS = 794

# Bytes per token, layer and hidden value that elementwise operations move, forward and backward.
ELEMENTWISE = {"lora-all": (190, 300), "lora-qkv": (150, 240)}
SLOWEST_OF_THREE = 1.035  # tokens of the fullest device over the mean, when a batch is divided
DEQUANTIZE_BANDWIDTH = 0.75  # share of the memory bandwidth
NF4_BYTES = 0.516 + 2  # read and written for each weight
LINK = 150e9  # bytes a second between GPUs (NVLink); latency 100 us


@dataclass(frozen=True)
class Card:
    """One GPU: dense bf16 FLOP/s and the share that matrix products reach; bytes a second and its share."""

    flops: float
    gemm: float
    multiprocessors: int
    bandwidth: float
    streaming: float


CARDS = {
    "a100-40gb": Card(312e12, 0.80, 108, 1.555e12, 0.84),
    "a100-80gb": Card(312e12, 0.80, 108, 2.039e12, 0.84),
    "h100": Card(989e12, 0.66, 132, 3.35e12, 0.82),
    "h200": Card(989e12, 0.66, 132, 4.8e12, 0.82),
}


@dataclass(frozen=True)
class Layout:
    """Hours of a suite on a pool, and useful tokens a second of one GPU."""

    name: str
    hours: float
    gpu_hours: float
    tokens_per_second: float


def tokens_per_paper(mixture: str) -> float:
    """Tokens of a mixture's abstracts, by their length in characters."""
    return HEP_TH_TOKENS * MIXTURE_CHARACTERS.get(mixture, PHYSICS_CHARACTERS) / HEP_TH_CHARACTERS


def step_seconds(
    card: Card, shape: Shape, method: str, tokens: int, devices: int = 1, quantized: bool = True, rank: int = 8
) -> float:
    """One optimizer step with `tokens` tokens on each of `devices` devices, no layer recomputing."""
    bandwidth = card.bandwidth * card.streaming
    products = shape.projections.values()
    gemm = sum(_gemm(card, tokens, n, k) + _gemm(card, tokens, k, n) for k, n in products) * shape.layers
    gemm += 2 * _gemm(card, tokens, shape.vocabulary, shape.hidden)
    elementwise = sum(ELEMENTWISE[method]) * shape.hidden * tokens * shape.layers / bandwidth
    dequantize = 2 * shape.linear * NF4_BYTES / (card.bandwidth * DEQUANTIZE_BANDWIDTH) if quantized else 0.0
    parameters = adapter_parameters(shape, method, rank)
    reduce = 4 * parameters * 2 * (devices - 1) / devices / LINK + 100e-6 if devices > 1 else 0.0
    optimizer = parameters * 4 * 8 / bandwidth
    return gemm + elementwise + dequantize + reduce + optimizer


def device_rate(hardware: str, shape: Shape, mixture: str, method: str, devices: int, config: TrainConfig) -> float:
    """Useful tokens a second of one of `devices` devices that train a variant together."""
    batch = config.global_batch_size * tokens_per_paper(mixture)
    quantized = config.precision == "nf4"
    seconds = step_seconds(CARDS[hardware], shape, method, int(batch / devices), devices, quantized, config.lora_rank)
    return batch / devices / (seconds * (1.0 if devices == 1 else SLOWEST_OF_THREE))


def plan_layouts(
    papers: Mapping[str, int],
    hardware: str,
    pool: int,
    config: TrainConfig | None = None,
    tokens_per_second: float | None = None,
    shape: Shape = LLAMA_8B,
) -> list[Layout]:
    """Both layouts of a suite on `pool` GPUs, the shorter first; one layout where the pool has one GPU.

    Args:
        papers: training papers of each `MIXTURE/METHOD`.
        tokens_per_second: useful tokens a second of one device, as measured; by the roofline without it.

    Raises:
        UserError: unknown hardware.
    """
    if hardware not in CARDS:
        raise UserError(f"Hardware {hardware!r} is not known: choose one of {', '.join(CARDS)}.")
    config = config or TrainConfig()
    layouts = []
    both = {"one GPU a variant": 1} | ({f"all {pool} GPUs a variant": pool} if pool > 1 else {})
    for name, devices in both.items():
        hours, total = [], 0.0
        for variant, count in papers.items():
            mixture, _, method = variant.rpartition("/")
            rate = tokens_per_second or device_rate(hardware, shape, mixture, method, devices, config)
            epochs = config.max_steps / -(-count // config.global_batch_size) if config.max_steps else config.epochs
            tokens = epochs * count * tokens_per_paper(mixture)
            hours.append(tokens / rate / devices / 3600)
            total += tokens
        length = makespan(hours, pool // devices)
        layouts.append(Layout(name, length, sum(hours) * devices, total / (sum(hours) * devices * 3600)))
    return sorted(layouts, key=lambda layout: layout.hours)


def makespan(hours: Iterable[float], pool: int) -> float:
    """Hours until all jobs are done when the longest starts first on whichever of `pool` devices is free."""
    loads = [0.0] * pool
    for job in sorted(hours, reverse=True):
        loads[loads.index(min(loads))] += job
    return max(loads)


def _gemm(card: Card, m: int, n: int, k: int) -> float:
    """Seconds of an [m, k] x [k, n] product: the best of three tile shapes, or its memory traffic."""
    times = []
    for tile_m, tile_n, efficiency in ((128, 256, 1.0), (128, 128, 0.93), (64, 128, 0.78)):
        waves = math.ceil(math.ceil(m / tile_m) * math.ceil(n / tile_n) / card.multiprocessors)
        flops = waves * card.multiprocessors * tile_m * tile_n * 2 * k
        times.append(flops / (card.flops * card.gemm * efficiency))
    return max(min(times), (n * k + m * k + m * n) * 2 / (card.bandwidth * card.streaming))
