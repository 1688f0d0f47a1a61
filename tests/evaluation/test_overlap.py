import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.evaluation import overlap
from feyntune.evaluation.overlap import longest_overlaps


def by_definition(text, others):
    """Every run of words of every length, looked for in every other text."""
    words = text.split()
    for n in range(len(words), 0, -1):
        runs = {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
        for other in others:
            other = other.split()
            if any(tuple(other[i : i + n]) in runs for i in range(len(other) - n + 1)):
                return n
    return 0


few_words = st.lists(st.sampled_from(["a", "b", "c", "A", "$x$"]), max_size=40).map(" ".join)


@given(st.lists(few_words, min_size=1, max_size=4), st.lists(few_words, min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_it_is_the_longest_run_by_definition(texts, others):
    result = longest_overlaps(texts, pa.chunked_array([others]))
    assert result.tolist() == [by_definition(t, others) for t in texts]


def test_long_runs_are_measured_whole_and_end_with_the_abstract(monkeypatch):
    monkeypatch.setattr(overlap, "CHUNK", 7)
    r = np.random.default_rng(1)
    word = lambda: f"w{r.integers(400)}"
    others = [" ".join(word() for _ in range(90)) for _ in range(60)]
    copied = others[41].split()[20:75]
    across = [*others[3].split()[-9:], *others[4].split()[:9]]  # no abstract holds both halves
    texts = [" ".join(["x1", *copied, "x2"]), " ".join(across), "x3 x4", others[59]]
    result = longest_overlaps(texts, pa.chunked_array([others[:30], others[30:]]))
    assert result.tolist() == [55, by_definition(texts[1], others), 0, 90]
    assert result[1] < 18


def test_case_and_punctuation_count():
    others = pa.chunked_array([["we study the brane. It ends on a string"]])
    assert longest_overlaps(["the brane it ends", "the brane. It ends", ""], others).tolist() == [1, 4, 0]


def test_a_hash_that_lies_is_found_out(monkeypatch):
    true = overlap._hashes
    monkeypatch.setattr(overlap, "_hashes", lambda tokens, n: np.minimum(true(tokens, n), np.uint64(7)))
    texts, others = ["a b c d e f g h i"], pa.chunked_array([["p q r s t u v w a b c d e f g h i"]])
    assert longest_overlaps(texts, others).tolist() == [9]
    assert longest_overlaps(["a a a a a a a a a a"], pa.chunked_array([["b " * 20 + "b"]])).tolist() == [0]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_runs_over_a_gap_have_no_hash(n):
    tokens = np.array([1, 2, 3, -1, 4, 5, 6, 7, 8, 9, 10, 11, 12, -1])
    empty = overlap._hashes(tokens, n) == 0
    assert empty.tolist() == [-1 in tokens[i : i + n] for i in range(len(tokens) - n + 1)]
