"""Several seeds of a variant: what their spread allows to say."""

import json

import numpy as np
import pytest

from feyntune.evaluation import seeds
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.evaluation.statistics import paired_bootstrap, seeds_and_abstracts, t_interval
from feyntune.names import seed_names, split_seed
from tests.evaluation.conftest import ALL, QKV, QUICK, make_adapter

ALONE = EvaluateConfig(precision="fp32", completions=None)


def drawn(rng, trainings, abstracts=200, mean=0.0, between_seeds=1.0):
    """Per-abstract perplexities [trainings, abstracts]: a paper's difficulty, a seed's luck, and noise."""
    luck = rng.normal(0, between_seeds, (trainings, 1))
    return 40 + mean + luck + rng.normal(0, 0.5, (trainings, abstracts))


def test_two_variants_that_differ_by_the_luck_of_seeds_are_told_apart_no_more_often_than_the_level():
    rng = np.random.default_rng(5)
    by_abstracts = by_seeds = 0
    for _ in range(300):
        own, other = drawn(rng, 3), drawn(rng, 3)
        by_seeds += seeds_and_abstracts(own, other)["p"] < 0.05
        difference = own[0] - other[0]  # what one seed of each would say
        by_abstracts += abs(difference.mean()) > 1.96 * difference.std(ddof=1) / np.sqrt(200)
    assert by_seeds / 300 <= 0.06
    assert by_abstracts / 300 > 0.8


def test_a_difference_beyond_the_seeds_is_found():
    rng = np.random.default_rng(1)
    d = seeds_and_abstracts(drawn(rng, 3, mean=-10), drawn(rng, 3))
    assert d["high"] < 0
    assert d["p"] < 0.01
    assert d["low"] <= d["mean"] <= d["high"]


def test_without_noise_of_seeds_the_interval_is_that_of_the_abstracts():
    rng = np.random.default_rng(2)
    base = 40 + rng.normal(0, 2, 500)
    own = np.stack([base - 1 + rng.normal(0, 1, 500)] * 3)  # three seeds that do not differ
    d = seeds_and_abstracts(own, base[None])
    ones = np.ones(500)
    as_scores = lambda v: {"nll_text": np.log(v), "n_tokens": ones, "n_bytes": ones, "entropy_sum": ones}
    of_bootstrap = paired_bootstrap(as_scores(base), {"v": as_scores(own[0])})["v"]["delta"]
    assert d["low"] == pytest.approx(of_bootstrap["low"], abs=0.01)
    assert d["high"] == pytest.approx(of_bootstrap["high"], abs=0.01)


def test_welch_is_what_is_left_without_noise_of_abstracts():
    from scipy.stats import ttest_ind

    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 5.5])
    d = seeds_and_abstracts(np.tile(a[:, None], 50), np.tile(b[:, None], 50))
    expected = ttest_ind(a, b, equal_var=False)
    assert d["p"] == pytest.approx(expected.pvalue)
    assert (d["low"], d["high"]) == pytest.approx(tuple(expected.confidence_interval()))


def test_one_seed_has_no_interval():
    assert t_interval(np.array([2.0])) == {"mean": 2.0, "low": None, "high": None}
    assert seeds_and_abstracts(np.ones((1, 9)), np.zeros((1, 9)))["low"] is None


def test_names_of_seeds():
    assert seed_names(QKV, 7, 3) == [QKV, f"{QKV}/seed8", f"{QKV}/seed9"]
    assert split_seed(f"{ALL}/seed12") == (ALL, 12)
    assert split_seed(ALL) == (ALL, None)
    assert seeds.group({QKV: 7, f"{QKV}/seed9": 9, f"{QKV}/seed8": 8}) == {
        QKV: {7: QKV, 8: f"{QKV}/seed8", 9: f"{QKV}/seed9"}
    }


def test_the_median_by_validation_stands_for_a_variant():
    by_seed = {0: "a", 1: "b", 2: "c"}
    assert seeds.representative(by_seed, {"a": 9.0, "b": 7.0, "c": 8.0}) == 2
    assert seeds.representative({0: "a", 1: "b"}, {"a": 7.0, "b": 9.0}) == 1  # of two the worse
    assert seeds.representative(by_seed, {"a": 9.0, "b": None, "c": 8.0}) == 0


def told(rng, **means):
    each = {"base": 40 + rng.normal(0, 0.5, 200)}
    members = {}
    for variant, mean in means.items():
        rows = drawn(rng, 3, mean=mean, between_seeds=0.3)
        members[variant] = {i: f"{variant}/seed{i}" for i in range(3)}
        each |= dict(zip(members[variant].values(), rows, strict=True))
    result = seeds.figures(members, dict.fromkeys(members, 0), each["base"], each, {})
    return result, seeds.sentences(result, 40.0, "200 test abstracts of hep-th")


def test_the_first_sentence_does_not_rank_what_seeds_do_not_tell_apart():
    result, sentences = told(np.random.default_rng(3), one=-5.0, other=-5.1, far=-1.5)
    assert sorted([result["best"], *result["tied"]]) == ["one", "other"]
    assert sentences[0].startswith("3 seeds cannot tell other and one apart") or sentences[0].startswith(
        "3 seeds cannot tell one and other apart"
    )
    assert "far" not in sentences[0]
    assert "lowers" not in sentences[0]


def test_a_clear_winner_is_named_with_its_spread():
    result, sentences = told(np.random.default_rng(3), one=-9.0, other=-5.0)
    assert (result["best"], result["tied"]) == ("one", [])
    assert sentences[0].startswith("one lowers the perplexity of the base model from 40.00 to 3")
    assert sentences[1].startswith("The difference is −8.8 (95 % CI")
    assert "standard deviation of 0." in sentences[2]


def test_none_better_than_the_base_over_seeds():
    result, sentences = told(np.random.default_rng(4), one=0.0, other=0.1)
    assert result["best"] is None
    assert sentences[0].startswith("None of 2 variants is significantly better")


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory, tiny_base, tiny_split):
    """Three trainings of each of two variants, all scored, compared."""
    root = tmp_path_factory.mktemp("seeds")
    adapters = {}
    for variant, method in ((QKV, "lora-qkv"), (ALL, "lora-all")):
        for i, name in enumerate(seed_names(variant, 0, 3)):
            seed = 10 * len(method) + i
            adapters[name] = make_adapter(root / f"{method}{i}", tiny_base, tiny_split, method, seed, size=0.02)
    evaluate(tiny_split, tiny_base, adapters, root / "evaluation", ALONE)
    uris = {name: f"training/{name}" for name in adapters}
    compare([root / "evaluation"], adapters, tiny_split, root / "out", config=QUICK, adapter_uris=uris)
    return root / "out", adapters


def test_a_comparison_of_seeds_has_one_row_a_variant_and_says_what_they_allow(three_seeds):
    out, adapters = three_seeds
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["variants"]) == {QKV, ALL}
    of = summary["seeds"]["variants"][QKV]
    assert len(of["seeds"]) == 3
    assert of["lowest"] <= of["minus_base"]["mean"] <= of["highest"]
    variant = summary["variants"][QKV]
    assert variant["perplexity"]["abstract_mean"] == pytest.approx(of["seeds"][str(variant["seed"])]["perplexity"])
    assert variant["adapter"] in {f"training/{n}" for n in adapters}
    page = (out / "report.html").read_text()
    assert "Between seeds" in page
    assert "trained with one seed" not in page
    first = page.split('aria-label="Conclusion">')[1].split("</p>")[0]
    assert "3 seeds" in first
    assert "## Seeds" in (out / "table.md").read_text()


def test_with_one_seed_the_ranking_is_said_to_hold_within_it(tmp_path, evaluations, adapters, tiny_split):
    from tests.evaluation.test_compare import better

    ahead = [better(e, tmp_path / e.name, f) for e, f in zip(evaluations[1:], (0.5, 0.6), strict=True)]
    compare([evaluations[0], *ahead], adapters, tiny_split, tmp_path / "out", config=QUICK)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Each variant was trained with one seed: the ranking holds within it" in page
    assert "Between seeds" not in page
