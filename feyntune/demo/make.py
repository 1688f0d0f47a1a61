"""Makes the base model of the demonstration again: `feyntune make-base OUT`."""

from pathlib import Path

from feyntune.artifacts.artifact import Manifest
from feyntune.artifacts.records import normal_form
from feyntune.ingestion.synthetic import everyday_texts, synthetic_records

TEXTS = 8000
PHYSICS_SHARE = 0.1  # of the texts: enough to write sentences of the field, and much is left to learn
STEPS = 1500


def demo_texts(physics_share: float = PHYSICS_SHARE, texts: int = TEXTS) -> list[str]:
    """Everyday prose, abstracts of computer science and biology, and a few of physics; none is in the run's corpus."""
    physics = round(texts * physics_share)
    other = (texts - physics) // 2
    records = [
        *synthetic_records(other, seed=1, categories=("cs", "q-bio")),
        *synthetic_records(physics, seed=2, categories=("hep-th", "hep-ph", "gr-qc", "other")),
    ]
    return [*everyday_texts(other, seed=0), *(normal_form(record["abstract"]) for record in records)]


def retention_texts(texts: int = 64) -> dict[str, list[str]]:
    """The shipped retention sets (feyntune/evaluation/retention_texts): prose and science as the base was trained on,
    but not the same documents."""
    records = synthetic_records(texts, seed=12, categories=("other",))
    return {
        "everyday": list(everyday_texts(texts, seed=11)),
        "other-sciences": [normal_form(record["abstract"]) for record in records],
    }


def make_demo_base(out: str | Path, physics_share: float = PHYSICS_SHARE, steps: int = STEPS) -> Manifest:
    """Train the tiny Llama of the demonstration: 4 layers, 4 heads of 32 dimensions (what vLLM's kernels need), bf16.

    About five minutes of one CPU core. The same versions of torch and tokenizers on the same kind of CPU give the same
    bytes.
    """
    import torch

    from feyntune.training.tiny_base import make_tiny_base

    return make_tiny_base(out, demo_texts(physics_share), heads=4, kv_heads=2, steps=steps, dtype=torch.bfloat16)
