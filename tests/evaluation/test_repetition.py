import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.evaluation.repetition import repetition

# Counted by hand; the entropies from those counts, the compressed length by zlib on 2026-11-24.
TEXT = "The brane ends. The brane ends on the brane, and the string ends on the brane."
FROZEN = {
    "words": 19,
    "entropy_1": 2.7551,  # the 5, brane 4, ends 3, on 2, "." 2; and, string and "," once
    "entropy_2": 3.3921,
    "distinct_1": 8 / 19,
    "distinct_2": 12 / 18,
    "repeated_4": 1 / 16,
    "compression": 1.5918,
}


def test_figures_of_a_fixed_text_stay_what_they_were():
    assert repetition(TEXT) == pytest.approx(FROZEN, abs=5e-4)


def test_what_says_the_same_word_again_and_again_has_no_entropy():
    result = repetition("brane " * 50)
    assert (result["entropy_1"], result["entropy_2"]) == pytest.approx((0, 0), abs=1e-12)
    assert result["distinct_1"] == 1 / 50
    assert result["repeated_4"] == 1 - 1 / 47
    assert result["compression"] > 10


@given(st.lists(st.integers(0, 30), min_size=4, max_size=60))
def test_bounds_by_definition(numbers):
    result = repetition(" ".join(f"w{n}" for n in numbers))
    assert 0 <= result["repeated_4"] < 1
    assert result["distinct_1"] == len(set(numbers)) / len(numbers)
    assert 0 <= result["entropy_1"] <= math.log2(len(set(numbers))) + 1e-9
    assert result["entropy_1"] <= result["entropy_2"] + math.log2(len(numbers)) - math.log2(len(numbers) - 1) + 1e-9


def test_too_little_text_has_no_figure_rather_than_a_wrong_one():
    assert repetition("") == {"words": 0} | {k: None for k in FROZEN if k != "words"}
    assert repetition("one two")["repeated_4"] is None
