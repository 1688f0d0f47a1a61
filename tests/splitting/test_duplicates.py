import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.splitting.duplicates import PERMUTATIONS, ROWS, THRESHOLD, equal_pairs, find_duplicates, jaccard, shingles
from tests.splitting.conftest import synthetic_papers


def edited(text: str, share: float, rng: random.Random) -> str:
    """`text` with that share of its words replaced."""
    words = text.split()
    for k in rng.sample(range(len(words)), round(share * len(words))):
        words[k] = f"edit{rng.randrange(10**6)}"
    return " ".join(words)


def find(texts: list[str], threshold: float = THRESHOLD, size: int = 7):
    return find_duplicates(lambda: (texts[i : i + size] for i in range(0, len(texts), size)), len(texts), threshold)


@pytest.fixture(scope="module")
def abstracts() -> list[str]:
    return list(dict.fromkeys(p.abstract for p in synthetic_papers(400, seed=3) if not p.withdrawn))


def test_shingles_are_runs_of_three_words_without_case_and_punctuation():
    assert shingles("The $SU(2)$ theory, THE su") == {b"the su 2", b"su 2 theory", b"2 theory the", b"theory the su"}


@pytest.mark.parametrize(("text", "only"), [("Two words.", b"two words"), ("...", b"..."), ("One", b"one")])
def test_a_text_of_fewer_words_is_one_shingle(text, only):
    assert shingles(text) == {only}


def test_near_duplicates_are_exactly_the_pairs_whose_real_similarity_reaches_the_threshold(abstracts):
    rng = random.Random(1)
    texts = abstracts[:150] + [edited(t, rng.choice((0.02, 0.05, 0.08, 0.12, 0.2)), rng) for t in abstracts[:150]]
    sets = [shingles(t) for t in texts]
    by_force = {
        (a, b): jaccard(sets[a], sets[b])
        for b in range(len(texts))
        for a in range(b)
        if jaccard(sets[a], sets[b]) >= THRESHOLD
    }
    duplicates = find(texts)
    assert dict(zip(map(tuple, duplicates.pairs.tolist()), duplicates.similarity.tolist(), strict=True)) == by_force
    assert 40 < len(by_force) < 150  # some of the edited ones are near, some are not


def test_recall_of_minhash_at_the_threshold_itself(abstracts):
    """Pairs between 0.6 and 0.65 are the hardest: a thousandth may be missed, here none of several hundred is."""
    rng = random.Random(2)
    texts, expected = [], set()
    for t in abstracts * 4:
        other = edited(t, 0.075, rng)
        if THRESHOLD <= jaccard(shingles(t), shingles(other)) < THRESHOLD + 0.05:
            tag = f" tag{len(texts)}"  # so that copies of one abstract are different texts
            pair = (len(texts), len(texts) + 1)
            texts += [t + tag, other + tag]
            expected.add(pair)
    pairs = set(map(tuple, find(texts).pairs.tolist()))
    assert len(expected) > 200
    assert expected <= pairs
    assert (1 - THRESHOLD**ROWS) ** (PERMUTATIONS // ROWS) < 1e-6


def test_equal_texts_share_a_number_and_are_no_pair():
    duplicates = find(["one text of some words", "another", "one text of some words", "another"], size=1)
    assert duplicates.text.tolist() == [0, 1, 0, 1]
    assert duplicates.row.tolist() == [0, 1]
    assert len(duplicates.pairs) == 0


def test_similarity_between_two_texts_does_not_depend_on_the_others(abstracts):
    rng = random.Random(4)
    texts = abstracts[:40] + [edited(t, 0.05, rng) for t in abstracts[:40]]
    alone = find(texts)
    among = find(abstracts[40:200] + texts)
    shift = 160
    assert among.pairs[among.pairs.min(axis=1) >= shift].tolist() == (alone.pairs + shift).tolist()


def test_no_texts_have_no_pairs():
    assert len(find([]).pairs) == 0


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(1, 4))
def test_equal_pairs_gives_every_pair_of_equal_values_once(values, at_once):
    pairs = [tuple(sorted(p)) for a, b in equal_pairs(np.array(values), at_once) for p in zip(a, b, strict=True)]
    assert sorted(pairs) == [
        (a, b) for a in range(len(values)) for b in range(a + 1, len(values)) if values[a] == values[b]
    ]
