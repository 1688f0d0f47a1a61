"""Perplexities of one system, and paired comparisons of variants with the base over the same abstracts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from feyntune.errors import UserError
from feyntune.statistics import holm

Scores = Mapping[str, np.ndarray]  # columns of feyntune.evaluation.evaluate.SCHEMA, rows in the order of ids


def per_abstract(scores: Scores) -> np.ndarray:
    """Perplexity of each abstract: exp of its mean loss over text tokens, after BOS, without EOS."""
    return np.exp(scores["nll_text"] / scores["n_tokens"])


def perplexity(scores: Scores) -> dict[str, float]:
    """Every definition of one system's perplexity over one test set.

    `abstract_mean` is FeynTune's (arXiv 2508.03716, its metrics.py): the arithmetic mean of per_abstract, in which a
    short abstract counts as much as a long one. `token` is exp of the mean loss of all tokens. Those named
    `_with_eos` count the end of the text as one more predicted token.
    """
    each = per_abstract(scores)
    losses, tokens = scores["nll_text"], scores["n_tokens"]
    low, median, high = np.quantile(each, [0.25, 0.5, 0.75])
    with_eos, tokens_with_eos = losses + scores["nll_eos"], tokens + 1
    result = {
        "abstract_mean": each.mean(),
        "token": np.exp(losses.sum() / tokens.sum()),
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "sd": each.std(ddof=1),
        "abstract_mean_with_eos": np.exp(with_eos / tokens_with_eos).mean(),
        "token_with_eos": np.exp(with_eos.sum() / tokens_with_eos.sum()),
    }
    return {k: float(v) for k, v in result.items()}


def bits_per_byte(scores: Scores) -> float:
    """Loss in bits over the bytes of the texts: the one figure that compares between tokenizers."""
    return float(scores["nll_text"].sum() / np.log(2) / scores["n_bytes"].sum())


def entropy(scores: Scores) -> float:
    """Mean entropy of the predictive distribution, nats a token: how undecided the model is, right or wrong."""
    return float(scores["entropy_sum"].sum() / scores["n_tokens"].sum())


def paired_bootstrap(
    base: Scores, variants: Mapping[str, Scores], resamples: int = 9999, seed: int = 1
) -> dict[str, dict[str, Any]]:
    """Every variant minus the base, with 95 % percentile intervals from abstracts resampled in pairs.

    All variants see the same resamples. For each variant:
        delta: {mean, low, high} of the per-abstract perplexity.
        token_delta: the same for the token-weighted perplexity.
        nll_delta: the same for the loss of all tokens, nats a token.
        p: two-sided, twice the share of resamples on the other side of zero (Davison & Hinkley 1997, §4.2.3),
        p_holm: the same after Holm's correction over `variants`.
        effect: mean of the per-abstract differences over their standard deviation (Cohen's d for pairs).
        share_better: share of abstracts with a lower perplexity than under the base.

    Raises:
        UserError: fewer than two abstracts.
    """
    n = len(base["n_tokens"])
    if n < 2:
        raise UserError(f"A comparison over {n} abstract(s) says nothing: use a larger corpus or more categories.")
    names = list(variants)
    tokens = base["n_tokens"].astype(float)
    each = {name: per_abstract(variants[name]) - per_abstract(base) for name in names}
    rows = [tokens, base["nll_text"]]
    rows += [each[name] for name in names] + [variants[name]["nll_text"] for name in names]
    means = _bootstrap_means(np.stack(rows), resamples, seed)

    base_loss, base_resampled = base["nll_text"].sum() / tokens.sum(), means[1] / means[0]
    result: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        difference, resampled = each[name], means[2 + i]
        loss = variants[name]["nll_text"].sum() / tokens.sum()
        loss_resampled = means[2 + len(names) + i] / means[0]
        spread = difference.std(ddof=1)
        result[name] = {
            "delta": _interval(difference.mean(), resampled),
            "token_delta": _interval(np.exp(loss) - np.exp(base_loss), np.exp(loss_resampled) - np.exp(base_resampled)),
            "nll_delta": _interval(loss - base_loss, loss_resampled - base_resampled),
            "p": _two_sided(resampled),
            "effect": float(difference.mean() / spread) if spread > 0 else 0.0,
            "share_better": float((difference < 0).mean()),
        }
    for name, p in zip(names, holm([result[name]["p"] for name in names]), strict=True):
        result[name]["p_holm"] = p
    return result


def paired_means(
    base: np.ndarray, variants: Mapping[str, np.ndarray], resamples: int = 9999, seed: int = 1
) -> dict[str, dict[str, Any]]:
    """As paired_bootstrap, of any figure that every abstract has one of: `delta`, `p`, `p_holm` and `effect`.

    Abstracts that lack the figure (nan) under any system count for none; with fewer than two left there is nothing.
    """
    names = list(variants)
    whole = np.isfinite(base) & np.all([np.isfinite(variants[name]) for name in names], axis=0)
    if not names or whole.sum() < 2:
        return {}
    differences = np.stack([variants[name][whole] - base[whole] for name in names])
    means = _bootstrap_means(differences, resamples, seed)
    result: dict[str, dict[str, Any]] = {}
    for name, difference, resampled in zip(names, differences, means, strict=True):
        spread = difference.std(ddof=1)
        result[name] = {
            "delta": _interval(difference.mean(), resampled),
            "p": _two_sided(resampled),
            "effect": float(difference.mean() / spread) if spread > 0 else 0.0,
        }
    for name, p in zip(names, holm([result[name]["p"] for name in names]), strict=True):
        result[name]["p_holm"] = p
    return result


def t_interval(values: np.ndarray) -> dict[str, float | None]:
    """Mean of `values` with Student's 95 % interval; without an interval for fewer than two."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def seeds_and_abstracts(own: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """Mean of `own` minus mean of `other`, where trainings are a sample of seeds and abstracts one of papers.

    The variance of the difference is that between the seeds of either side, s^2 / seeds, and that between abstracts
    of the paired differences of seed means, s^2 / abstracts (the bootstrap's, in closed form). The interval is
    Student's t with Welch's and Satterthwaite's degrees of freedom (Biometrika 34, 28, 1947; Biometrics Bulletin 2,
    110, 1946).

    Args:
        own, other: figures [seeds, abstracts] on the same abstracts; one row that no seed decides stands for the base.

    Returns:
        mean, low, high, p (two-sided) and p_holm (to be filled in); only mean where `own` has one seed.
    """
    from scipy.stats import t

    difference = own.mean(0) - other.mean(0)
    mean, n = float(difference.mean()), own.shape[1]
    result: dict[str, float | None] = {"mean": mean, "low": None, "high": None, "p": None, "p_holm": None}
    if min(len(own), n) < 2:
        return result
    parts = [(float(difference.var(ddof=1)) / n, n - 1)]
    for rows in (own, other):
        if len(rows) > 1:
            parts.append((float(rows.mean(1).var(ddof=1)) / len(rows), len(rows) - 1))
    variance = sum(v for v, _ in parts)
    if variance == 0:
        return result | {"low": mean, "high": mean, "p": float(mean == 0)}
    freedom = variance**2 / sum(v**2 / df for v, df in parts)
    half = float(t.ppf(0.975, freedom)) * np.sqrt(variance)
    p = 2 * float(t.sf(abs(mean) / np.sqrt(variance), freedom))
    return result | {"low": float(mean - half), "high": float(mean + half), "p": p}


def _bootstrap_means(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [rows, resamples] of `rows` [rows, abstracts]; a resample draws the same abstracts for every row."""
    from scipy.stats import bootstrap

    return bootstrap(
        (rows,),
        np.mean,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        batch=max(1, 2**24 // rows.size),  # 128 MiB at a time
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution


def _two_sided(resampled: np.ndarray) -> float:
    """Twice the share of resamples on the other side of zero (Davison & Hinkley 1997, §4.2.3)."""
    other_side = 1 + min((resampled >= 0).sum(), (resampled <= 0).sum())
    return float(min(1.0, 2 * other_side / (len(resampled) + 1)))


def _interval(mean: float, resampled: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high)}
