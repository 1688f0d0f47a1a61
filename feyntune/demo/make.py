"""Makes the base model of the demonstration again: `feyntune make-base OUT`."""

from pathlib import Path

from feyntune.artifacts.artifact import Manifest, read_manifest, require_new
from feyntune.artifacts.records import normal_form
from feyntune.demo import SHIPPED
from feyntune.errors import UserError
from feyntune.ingestion.synthetic import everyday_texts, synthetic_records

TEXTS = 8000
PHYSICS_SHARE = 0.1  # of the texts: enough to write sentences of the field, and much is left to learn
STEPS = 1500
LOSS_TOLERANCE = 0.01  # of the shipped base's loss; on another CPU 0.0015 was measured


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

    Four to six minutes of one CPU core. Tokenizer and configuration come out byte for byte as shipped. The weights do
    so only on a CPU for which torch chooses the same kernels: the order of additions differs between instruction sets
    (ATEN_CPU_CAPABILITY), and over the steps that grows. Their losses then differ by less than `LOSS_TOLERANCE`.
    """
    require_new(out)
    import torch

    from feyntune.training.tiny_base import make_tiny_base

    return make_tiny_base(out, demo_texts(physics_share), heads=4, kv_heads=2, steps=steps, dtype=torch.bfloat16)


def compare_with_shipped(made: Manifest) -> str:
    """How a base that was made again differs from the shipped one.

    Raises:
        UserError: by more than another CPU explains.
    """
    shipped = read_manifest(SHIPPED)
    if made.digest == shipped.digest:
        return "the same bytes as the shipped one"
    differing = [name for name in shipped.files if made.files.get(name) != shipped.files[name]]
    loss, before = made.stats["loss"], shipped.stats["loss"]
    if differing != ["model.safetensors"] or abs(loss / before - 1) > LOSS_TOLERANCE:
        raise UserError(
            f"It is not the shipped base: {', '.join(differing)} differ, its loss is {loss:.4f}, the shipped one's "
            f"{before:.4f}. Install the versions of requirements/dev.txt."
        )
    return f"as the shipped one but for the rounding of this CPU (loss {loss:.4f}, shipped {before:.4f})"
