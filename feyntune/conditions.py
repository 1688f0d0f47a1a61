"""How figures were measured, in one record, and whether two of them may be compared. No heavy imports."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

CONDITIONS = "conditions.json"  # in every evaluation

_LABELS = {
    "test": "test set",
    "precision": "precision",
    "lora": "precision of the adapter",
    "attention": "attention kernel",
    "max_length": "maximum length",
    "special_tokens": "special tokens",
    "evaluation": "version of the evaluation",
}


class Conditions(BaseModel):
    """What two perplexities must agree in to be compared.

    Attributes:
        test: digest of the test set.
        precision: of the base's weights and arithmetic: fp32, bf16, fp16, nf4.
        lora: precision in which the adapter's two products are computed.
        attention: the kernel, as feyntune.model.packed.attention_backend names it.
        max_length: tokens at which a text is cut; None where whole texts are scored.
        special_tokens: what stands around a text, and which of it counts.
        evaluation: feyntune.artifacts.cache.EVALUATION_VERSION.
    """

    model_config = ConfigDict(frozen=True)

    test: str
    precision: str
    lora: str
    attention: str
    max_length: int | None
    special_tokens: str
    evaluation: str


def read_conditions(text: str | bytes | None) -> Conditions | None:
    """The record in an evaluation's conditions.json; None where there is none, or one of another version."""
    try:
        return None if text is None else Conditions.model_validate_json(text)
    except ValidationError:
        return None


def differences(a: Conditions | None, b: Conditions | None) -> list[str]:
    """What keeps a figure measured under `a` from being compared with one under `b`, a phrase each; [] if nothing does.

    A figure without a record (made before 0.2) compares with none.
    """
    if a is None or b is None:
        return ["conditions of measurement (not recorded before version 0.2)"]
    return [
        f"{label} ({_shown(getattr(a, field))}, not {_shown(getattr(b, field))})"
        for field, label in _LABELS.items()
        if getattr(a, field) != getattr(b, field)
    ]


def as_served_sentence(measured: Mapping[str, Any]) -> str:
    """How far the endpoint's arithmetic is from that of the scores (evaluation.as_served), for report and model card.

    Of the system where the two are farthest apart; "" where nothing was measured.
    """
    if not measured:
        return ""
    name = max(measured, key=lambda n: measured[n]["mean_difference"])
    m = measured[name]
    scored, served = m["scored"], m["served"]
    arithmetic = lambda m: f"adapters in {m['lora']} with {m['attention']} attention"
    if arithmetic(scored) == arithmetic(served):
        how = f"Scored as served: scores, completions and the endpoint compute {arithmetic(scored)}."
    else:
        how = f"The scores compute {arithmetic(scored)}, completions and the endpoint {arithmetic(served)}."
    return (
        f"{how} On {m['texts']} test abstracts scored both ways, log-probabilities differ by "
        f"{m['mean_difference']:.1g} nats a token on average, at most {m['largest_difference']:.1g}; the perplexity is "
        f"{scored['perplexity']:.3f} by the scores and {served['perplexity']:.3f} by the endpoint's engine ({name}"
        + (", where they differ most)." if len(measured) > 1 else ").")
    )


def _shown(value: object) -> str:
    return "none" if value is None else str(value)[:32]
