"""How far the endpoint's arithmetic is from that of the scores: a few test abstracts, scored both ways.

The scores compute an adapter with peft, which keeps it in fp32; the engine of the endpoint and of the completions
computes the adapters of a whole batch in the base's own precision, with another attention kernel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

TEXTS = 16  # test abstracts: some thousand tokens


def difference(
    scored: Sequence[Sequence[float]], served: Sequence[Sequence[float]], scored_by: Any, served_by: Any
) -> dict[str, Any]:
    """What the endpoint's arithmetic changes: the tokens' log-probabilities, in nats, and the perplexity.

    Args:
        scored, served: losses of the tokens of each text, nats.
        scored_by, served_by: {lora, attention} of both.
    """
    apart = np.abs(np.concatenate([np.subtract(a, b) for a, b in zip(scored, served, strict=True)]))
    perplexity = lambda losses: float(np.mean([np.exp(np.mean(n)) for n in losses]))
    return {
        "texts": len(scored),
        "tokens": len(apart),
        "scored": {**scored_by, "perplexity": perplexity(scored)},
        "served": {**served_by, "perplexity": perplexity(served)},
        "mean_difference": float(apart.mean()),
        "largest_difference": float(apart.max()),
    }
