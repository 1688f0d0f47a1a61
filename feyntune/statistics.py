"""Statistics that the comparison, the judges and the study share. No torch."""

from typing import Any

import numpy as np


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the chance of any false claim stays below the level."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def against_the_best(p_values: list[float]) -> list[float]:
    """p-values of n - 1 systems against the best of all n, corrected for having looked for the best.

    Which one is the best was decided by the same data, so each comparison stands for any of the n (n - 1) / 2 pairs:
    Bonferroni's correction over those. Holm's over the n - 1 alone finds a false difference among 20 equal systems in a
    fifth of all experiments (tests/evaluation/test_statistics.py).
    """
    n = len(p_values) + 1
    return [min(1.0, p * n * (n - 1) / 2) for p in p_values]


def mean_over_papers(
    sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int, null: float | None = None
) -> dict[str, Any]:
    """A mean, and its 95 % percentile interval from resampling whole papers.

    Args:
        sums, counts: [papers], the sum and number of the values of each paper; the mean is over all values.
        null: where given, `p` is two-sided against it, by flipping the signs of whole papers' differences from it
            (Fisher's randomization test): a bootstrap's p is too small where there are few papers.

    Returns:
        {mean, low, high, papers}; low, high and p are None for fewer than two papers.
    """
    from scipy.stats import bootstrap, permutation_test

    sums, counts = sums[counts > 0].astype(float), counts[counts > 0].astype(float)
    result: dict[str, Any] = {"mean": None, "low": None, "high": None, "papers": len(sums)}
    if null is not None:
        result["p"] = None
    if len(sums) == 0:
        return result
    result["mean"] = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return result
    resampled = bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    result["low"], result["high"] = map(float, np.quantile(resampled, [0.025, 0.975]))
    if null is not None:
        test = permutation_test(
            (sums - null * counts,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        )
        result["p"] = float(test.pvalue)
    return result
