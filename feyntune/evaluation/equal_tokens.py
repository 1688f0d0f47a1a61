"""Variants after the same number of training tokens, read from their learning curves, beside the end of training."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def equal_tokens(curves: Mapping[str, Any], tokens: Mapping[str, int | None]) -> dict[str, Any] | None:
    """Change of the validation loss (nats a token) since the base, at equal tokens and at the end of training.

    Each mixture has validation papers of its own, so a change against the base on the same papers is what compares,
    not the perplexity. Between two validations the loss is interpolated linearly in tokens; at a point before its end
    a training has not yet lowered its learning rate, so its figure is an upper bound of what fewer steps would give.

    Args:
        curves: each variant's curve.json.
        tokens: tokens each variant was trained on; those without a number are left out.

    Returns:
        `tokens`, the fewest any variant saw, and `variants[NAME]`: {at_equal_tokens, at_end, tokens}; None for fewer
        than two variants with a curve.
    """
    points = {name: _points(curves[name], n) for name, n in tokens.items() if n}
    points = {name: p for name, p in points.items() if len(p) > 1}
    if len(points) < 2:
        return None
    fewest = min(p[-1][0] for p in points.values())
    variants = {}
    for name, p in points.items():
        at, losses = zip(*p, strict=True)
        variants[name] = {
            "at_equal_tokens": float(np.interp(fewest, at, losses) - losses[0]),
            "at_end": float(losses[-1] - losses[0]),
            "tokens": round(at[-1]),
        }
    return {"tokens": round(fewest), "variants": dict(sorted(variants.items(), key=lambda i: i[1]["at_equal_tokens"]))}


def _points(curve: Mapping[str, Any], tokens: int) -> list[tuple[float, float]]:
    """(tokens seen, validation loss), the base first; steps hold equally many abstracts, so tokens grow evenly."""
    steps = max(1, len(curve["loss"]))
    return [
        (tokens * v["step"] / steps, math.log(v["perplexity"]))
        for v in curve["validation"]
        if v["perplexity"] is not None
    ]
