"""What a set of variants will take: tokens, steps, memory, GPU-hours and money, before any of it is spent.

Throughput is measured (give `tokens_per_second`) or that of a roofline (roofline.py). Beside it stands the published
recipe on the same hardware, from the stats of its code: one process walks over the GPUs layer by layer, half of a
padded batch is padding, every layer is recomputed, and the whole training set is evaluated ten times (arXiv
2508.03716's repository, configs/).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from feyntune.errors import UserError
from feyntune.training.config import TrainConfig
from feyntune.training.memory import LLAMA_8B, Shape, plan
from feyntune.training.roofline import device_rate, tokens_per_paper
from feyntune.variants import load_variants

PADDING_OVERHEAD = 2.06  # tokens computed for one that counts, in random batches of 16 real hep-th abstracts
PUBLISHED_EVAL_SHARE = 0.43  # share of the published run's compute


@dataclass(frozen=True)
class Hardware:
    """One kind of device: name, dense bf16 FLOP/s, bytes of memory."""

    name: str
    flops: float
    memory: float


HARDWARE = {
    "a100-40gb": Hardware("A100-40GB", 312e12, 42.4e9),
    "a100-80gb": Hardware("A100-80GB", 312e12, 85.0e9),
    "h100": Hardware("H100", 989e12, 85.0e9),
    "h200": Hardware("H200", 989e12, 150.7e9),
}


@dataclass(frozen=True)
class Row:
    """The plan of one variant. Money is in the currency of the price that was given."""

    variant: str
    papers: int
    tokens: int  # over all epochs, padding not counted
    steps: int
    checkpointed_layers: int
    memory_bytes: float
    gpu_hours: float
    hours: float
    money: float | None
    published_gpu_hours: float
    published_hours: float
    published_money: float | None


def plan_variants(
    papers: Mapping[str, int],
    hardware: str = "a100-40gb",
    devices: int = 3,
    config: TrainConfig | None = None,
    tokens_per_second: float | None = None,
    price: float | None = None,
    shape: Shape = LLAMA_8B,
) -> list[Row]:
    """One row for each variant.

    Args:
        papers: training papers of each `MIXTURE/METHOD`.
        devices: of one training.
        tokens_per_second: useful tokens a second of one device, as measured; by the roofline without it.
        price: of one device for one hour.

    Raises:
        UserError: unknown hardware, or a step that does not fit it.
    """
    if hardware not in HARDWARE:
        raise UserError(f"Hardware {hardware!r} is not known: choose one of {', '.join(HARDWARE)}.")
    device, config = HARDWARE[hardware], config or TrainConfig()
    rows = []
    for variant, count in papers.items():
        mixture, _, method = variant.rpartition("/")
        per_paper = tokens_per_paper(mixture)
        # A long batch (99th percentile) has 1.33 times the mean tokens.
        largest = round(1.33 * per_paper * config.global_batch_size / devices)
        fit = plan(shape, method, config, device.memory, largest)
        per_epoch = -(-count // config.global_batch_size)
        steps = config.max_steps or config.epochs * per_epoch
        tokens = steps / per_epoch * count * per_paper
        rate = tokens_per_second or device_rate(hardware, shape, mixture, method, devices, config)
        hours = tokens / rate / 3600
        # The same device at the same speed, so that the recipes are compared and nothing else.
        plain = tokens_per_second or device_rate(hardware, shape, mixture, method, 1, config)
        recomputing = flops_per_token(shape, shape.layers) / flops_per_token(shape, 0)
        published = tokens * PADDING_OVERHEAD * recomputing / plain / (1 - PUBLISHED_EVAL_SHARE) / 3600
        money = lambda spent: None if price is None else round(spent * price, 2)
        rows.append(
            Row(
                variant=variant,
                papers=count,
                tokens=round(tokens),
                steps=steps,
                checkpointed_layers=fit.layers,
                memory_bytes=fit.bytes,
                gpu_hours=hours,
                hours=hours / devices,
                money=money(hours),
                published_gpu_hours=published * devices,  # two of three wait while one computes
                published_hours=published,
                published_money=money(published * devices),
            )
        )
    return rows


def paper_variants() -> dict[str, int]:
    """The twenty variants of the paper with their training papers."""
    catalog = load_variants()
    return {
        f"{mixture.name}/{method}": mixture.paper_training_papers
        for mixture in catalog.mixtures
        for method in catalog.methods
        if mixture.paper_training_papers
    }


def totals(rows: list[Row]) -> dict[str, Any]:
    """Sums over the rows; the memory is the largest."""
    keys: tuple[str, ...] = ("papers", "tokens", "steps", "gpu_hours", "hours", "money")
    keys += ("published_gpu_hours", "published_hours", "published_money")
    totals: dict[str, Any] = {"variants": len(rows), "memory_bytes": max((r.memory_bytes for r in rows), default=0)}
    for key in keys:
        values = [asdict(r)[key] for r in rows]
        totals[key] = None if None in values else sum(values)
    return totals


def flops_per_token(shape: Shape, recomputing: int) -> float:
    """FLOPs of a training step a token: 2N forward and 2N backward (frozen weights need no gradient of their own),
    and 2N again for the share of layers that recompute. N counts the matrices: linear layers and output head.
    """
    head = shape.vocabulary * shape.hidden
    return 4 * (shape.linear + head) + 2 * shape.linear * recomputing / shape.layers
