import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from feyntune.errors import UserError
from feyntune.evaluation import statistics
from feyntune.statistics import against_the_best


def scores(losses, tokens, eos=None):
    """Columns of an evaluation from total losses and token counts."""
    losses, tokens = np.array(losses, float), np.array(tokens)
    return {
        "nll_text": losses,
        "n_tokens": tokens,
        "nll_eos": np.zeros(len(losses)) if eos is None else np.array(eos, float),
        "entropy_sum": losses,
        "n_bytes": 4 * tokens,
    }


def random_scores(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    tokens = np.random.default_rng(0).integers(5, 400, n)
    return scores(tokens * (2.5 + shift + 0.2 * rng.standard_normal(n)), tokens)


def test_both_definitions_of_perplexity_on_a_hand_made_pair():
    two = scores([10 * math.log(2), 30 * math.log(8)], [10, 30], eos=[math.log(2), math.log(8)])
    result = statistics.perplexity(two)
    assert result["abstract_mean"] == pytest.approx((2 + 8) / 2)
    assert result["token"] == pytest.approx(2 ** ((10 * 1 + 30 * 3) / 40))
    assert result["median"] == pytest.approx(5)
    assert result["abstract_mean_with_eos"] == pytest.approx(5)  # EOS as likely as the other tokens changes nothing
    assert statistics.bits_per_byte(two) == pytest.approx(100 / 160)
    assert statistics.entropy(two) == pytest.approx(100 * math.log(2) / 40)


def test_an_unexpected_end_of_text_shows_only_in_the_figures_with_eos():
    plain, ended = scores([10.0, 20.0], [10, 20]), scores([10.0, 20.0], [10, 20], eos=[9.0, 9.0])
    a, b = statistics.perplexity(plain), statistics.perplexity(ended)
    assert a["abstract_mean"] == b["abstract_mean"]
    assert a["token"] == b["token"]
    assert b["token_with_eos"] == pytest.approx(math.exp((30 + 18) / 32))
    assert b["abstract_mean_with_eos"] > a["abstract_mean_with_eos"]


def test_the_interval_is_scipys_paired_bootstrap_of_the_differences():
    base, variant = random_scores(60, 1), random_scores(60, 2, shift=-0.1)
    result = statistics.paired_bootstrap(base, {"v": variant}, resamples=999, seed=7)["v"]
    difference = statistics.per_abstract(variant) - statistics.per_abstract(base)
    expected = bootstrap(
        (difference,), np.mean, n_resamples=999, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert result["delta"]["mean"] == pytest.approx(difference.mean())
    assert result["delta"]["low"] == pytest.approx(expected.low, rel=0.05)
    assert result["delta"]["high"] == pytest.approx(expected.high, rel=0.05)


def test_token_weighted_difference_is_that_of_the_token_weighted_perplexities():
    base, variant = random_scores(50, 1), random_scores(50, 2, shift=-0.3)
    result = statistics.paired_bootstrap(base, {"v": variant}, resamples=999)["v"]
    expected = statistics.perplexity(variant)["token"] - statistics.perplexity(base)["token"]
    assert result["token_delta"]["mean"] == pytest.approx(expected)
    assert result["token_delta"]["low"] < expected < result["token_delta"]["high"]
    assert result["nll_delta"]["high"] < 0


def test_a_variant_like_the_base_is_never_better():
    base = random_scores(40, 1)
    result = statistics.paired_bootstrap(base, {"same": base}, resamples=199)["same"]
    assert result["delta"] == {"mean": 0, "low": 0, "high": 0}
    assert (result["p"], result["p_holm"], result["effect"], result["share_better"]) == (1, 1, 0, 0)


def test_noise_alone_is_rarely_called_better():
    calls = 0
    for seed in range(40):
        pair = random_scores(80, 2 * seed + 100), random_scores(80, 2 * seed + 101)
        delta = statistics.paired_bootstrap(pair[0], {"v": pair[1]}, resamples=299)["v"]["delta"]
        calls += delta["high"] < 0
    assert calls <= 5  # 2.5 % expected; 6 of 40 has a probability below 0.001


def test_pairing_finds_what_marginal_intervals_cannot():
    base = random_scores(100, 1)
    variant = base | {"nll_text": base["nll_text"] - 0.01 * base["n_tokens"]}
    result = statistics.paired_bootstrap(base, {"v": variant}, resamples=499)["v"]
    spread = statistics.per_abstract(base).std() / math.sqrt(100)
    assert abs(result["delta"]["mean"]) < spread  # hidden between abstracts
    assert result["delta"]["high"] < 0
    assert result["share_better"] == 1


def test_the_same_seed_gives_the_same_interval_whatever_the_company():
    base, a, b = random_scores(30, 1), random_scores(30, 2), random_scores(30, 3)
    alone = statistics.paired_bootstrap(base, {"a": a}, resamples=199)["a"]
    together = statistics.paired_bootstrap(base, {"b": b, "a": a}, resamples=199)["a"]
    assert alone["delta"] == pytest.approx(together["delta"])


def test_one_abstract_is_not_enough():
    with pytest.raises(UserError, match="says nothing"):
        statistics.paired_bootstrap(random_scores(1, 1), {"v": random_scores(1, 2)})


def test_the_best_of_twenty_equal_systems_is_seldom_told_apart_from_another():
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    by_all_pairs = by_holm = 0
    for _ in range(500):
        systems = np.sort(rng.normal(0, 1, 20))
        p = (2 * norm.sf((systems[1:] - systems[0]) / np.sqrt(2))).tolist()
        by_all_pairs += min(against_the_best(p)) < 0.05
        by_holm += min(statistics.holm(p)) < 0.05
    assert by_all_pairs / 500 <= 0.05
    assert by_holm / 500 > 0.15  # the weakness that it corrects
    assert against_the_best([0.01]) == [0.01]  # of two there is one pair
    assert against_the_best([]) == []


def test_holm_on_the_textbook_case():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p_values):
    adjusted = statistics.holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(order))


# Made by this code on 2026-11-24; the intervals also stand on numpy's PCG64.
FROZEN = [
    11.287132641061,
    11.073067868361,
    11.052523954359,
    -1.07480062321,
    -1.119820313046,
    -1.033215878083,
    -3.351192234921,
]


def test_figures_of_a_fixed_sample_stay_what_they_were():
    tokens = 20 + np.arange(200) % 37
    base = scores(tokens * (2.4 + 0.3 * np.sin(np.arange(200))), tokens)
    variant = scores(tokens * (2.3 + 0.3 * np.sin(np.arange(200) + 0.1)), tokens)
    result = statistics.paired_bootstrap(base, {"v": variant}, resamples=999, seed=1)["v"]
    figures = [statistics.perplexity(base)[k] for k in ("abstract_mean", "token", "median")]
    figures += [result["delta"][k] for k in ("mean", "low", "high")] + [result["effect"]]
    assert figures == pytest.approx(FROZEN, rel=1e-9)
