"""How far raters agree, with intervals from resampling papers.

The two coefficients are written out here: the libraries that have them (pingouin, krippendorff) are under the GPL.
"""

from collections.abc import Callable
from typing import Any

import numpy as np


def icc(ratings: np.ndarray) -> float:
    """ICC(2,1): agreement of single ratings, raters drawn at random, their offsets counted as disagreement.

    Shrout & Fleiss, Psychological Bulletin 86 (1979) 420, case 2: the two-way analysis of variance of
    ratings [items, raters] without gaps. NaN with fewer than two items or raters, or when nothing varies.
    """
    items, raters = ratings.shape
    if items < 2 or raters < 2:
        return float("nan")
    grand = ratings.mean()
    of_items, of_raters = ratings.mean(axis=1) - grand, ratings.mean(axis=0) - grand
    between_items = raters * (of_items**2).sum() / (items - 1)
    between_raters = items * (of_raters**2).sum() / (raters - 1)
    rest = ratings - grand - of_items[:, None] - of_raters[None, :]
    residual = (rest**2).sum() / ((items - 1) * (raters - 1))
    whole = between_items + (raters - 1) * residual + raters * (between_raters - residual) / items
    return float((between_items - residual) / whole) if whole else float("nan")


def alpha(ratings: np.ndarray) -> float:
    """Krippendorff's alpha with interval differences; ratings [items, raters], NaN where a rater gave none.

    1 - observed / expected disagreement (Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, part E):
    squared differences within items, each item's pairs weighted by 1 / (its ratings - 1), over those of all
    ratings pooled. Items with one rating have no pair and are left out. NaN when nothing varies.
    """
    items = [row[~np.isnan(row)] for row in ratings]
    items = [row for row in items if len(row) > 1]
    if not items:
        return float("nan")
    pooled = np.concatenate(items)
    n = len(pooled)
    # The sum of squared differences of all ordered pairs of m values is 2 m^2 times their variance.
    observed = sum(2 * len(row) ** 2 * row.var() / (len(row) - 1) for row in items) / n
    expected = 2 * n**2 * pooled.var() / (n * (n - 1))
    return float(1 - observed / expected) if expected else float("nan")


def interval_over_papers(
    statistic: Callable[[np.ndarray], float], blocks: list[np.ndarray], resamples: int, seed: int
) -> dict[str, Any]:
    """A coefficient of the rows of `blocks` (one array a paper) with its interval from resampling whole papers."""
    result: dict[str, Any] = {"value": None, "low": None, "high": None}
    if not blocks:
        return result
    value = statistic(np.concatenate(blocks))
    result["value"] = None if np.isnan(value) else value
    if len(blocks) < 2 or result["value"] is None:
        return result
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(blocks), size=len(blocks)) for _ in range(resamples))
    values = np.array([statistic(np.concatenate([blocks[i] for i in draw])) for draw in drawn])
    if not np.isnan(values).all():
        result["low"], result["high"] = map(float, np.nanquantile(values, [0.025, 0.975]))
    return result
