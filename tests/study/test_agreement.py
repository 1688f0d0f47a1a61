import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from feyntune.statistics import mean_over_papers
from feyntune.study.agreement import alpha, icc, interval_over_papers

# Shrout & Fleiss, Psychological Bulletin 86 (1979) 420, table 2: four judges of six targets.
SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), part C: four observers of twelve units.
_ = np.nan
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
).T

scores = arrays(float, st.tuples(st.integers(2, 8), st.integers(2, 4)), elements=st.integers(1, 10).map(float))


def test_icc_is_that_of_the_published_example():
    assert icc(SHROUT_FLEISS) == pytest.approx(0.29, abs=0.005)


def test_alpha_is_that_of_the_published_example():
    assert alpha(KRIPPENDORFF) == pytest.approx(0.849, abs=0.0005)


@given(scores)
def test_alpha_is_the_definition_over_all_pairs(ratings):
    """Pair by pair, as Krippendorff writes it, without the short cut by variances."""
    pooled = ratings.ravel()
    within = [(a - b) ** 2 / (len(row) - 1) for row in ratings for i, a in enumerate(row) for b in np.delete(row, i)]
    across = [(a - b) ** 2 / (len(pooled) - 1) for i, a in enumerate(pooled) for b in np.delete(pooled, i)]
    if sum(across):
        assert alpha(ratings) == pytest.approx(1 - sum(within) / sum(across), abs=1e-9)
    else:
        assert np.isnan(alpha(ratings))


@given(scores)
def test_raters_who_agree_agree_wholly_and_an_offset_is_disagreement(ratings):
    same = np.repeat(ratings[:, :1], 3, axis=1)
    if np.ptp(same) == 0:
        assert np.isnan(icc(same))
        assert np.isnan(alpha(same))
        return
    assert icc(same) == pytest.approx(1)
    assert alpha(same) == pytest.approx(1)
    shifted = same + np.array([0, 0, 2])
    assert icc(shifted) < 1
    assert alpha(shifted) < 1


def test_the_interval_is_over_papers_and_not_over_scores():
    """Papers differ, scores within one do not: more scores a paper must not narrow the interval."""
    means = np.array([1.0, 3.0, 5.0, 7.0, 9.0])
    few = mean_over_papers(means * 2, np.full(5, 2), 999, 1)
    many = mean_over_papers(means * 200, np.full(5, 200), 999, 1)
    assert few == many
    assert few["mean"] == 5
    assert 1.5 < few["low"] < 4 < 6 < few["high"] < 8.5


def test_a_mean_over_papers_weighs_scores_alike():
    result = mean_over_papers(np.array([2.0, 30.0, 0.0]), np.array([1, 5, 0]), 999, 1, null=0.0)
    assert (result["mean"], result["papers"]) == (pytest.approx(32 / 6), 2)


def test_p_is_that_of_flipping_the_signs_of_papers():
    """Of 2^6 signs, only all plus and all minus are as far from zero as six gains."""
    gains = np.array([1.0, 2.0, 0.5, 3.0, 1.5, 1.0])
    assert mean_over_papers(gains, np.ones(6), 999, 1, null=0.0)["p"] == pytest.approx(2 / 64)
    assert mean_over_papers(gains * 0 + 0.5, np.ones(6), 999, 1, null=0.5)["p"] == 1


def test_p_holds_its_level_where_papers_are_few():
    rng = np.random.default_rng(0)
    result = [mean_over_papers(rng.normal(size=7), np.ones(7), 199, 1, null=0.0)["p"] for _ in range(300)]
    assert np.mean(np.array(result) < 0.05) < 0.08


def test_one_paper_has_no_interval():
    result = mean_over_papers(np.array([5.0]), np.array([1]), 999, 1, null=0.0)
    assert (result["mean"], result["low"], result["p"]) == (5.0, None, None)
    assert interval_over_papers(icc, [SHROUT_FLEISS], 99, 1) == {"value": icc(SHROUT_FLEISS), "low": None, "high": None}


def test_the_interval_of_a_coefficient_holds_it():
    rng = np.random.default_rng(3)
    blocks = [np.clip(rng.normal(5, 2, (8, 1)) + rng.normal(0, 1, (8, 3)), 1, 10) for _ in range(6)]
    result = interval_over_papers(icc, blocks, 299, 1)
    assert result["value"] == icc(np.concatenate(blocks))
    assert result["low"] < result["value"] < result["high"]
