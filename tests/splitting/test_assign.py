import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.splitting.assign import (
    AFTER,
    BEFORE,
    BETWEEN,
    EXCLUDED,
    HOLDOUT,
    REPEATS,
    RULE,
    SHARES,
    SPLITS,
    assign,
    by_hash,
    hashes,
)

REFERENCE = json.loads((Path(__file__).parent / "reference.json").read_text())


class Corpus:
    """Papers by number: a day, a text, and near-duplicates between texts; numbers are identifiers too."""

    def __init__(self, papers: list[tuple[int, int]], near: set[tuple[int, int]]):
        self.papers, self.near = papers, near

    def assigned(self, numbers, after=None, pinned=None):
        """number -> (split, cluster) when the corpus is papers `numbers`, in that order."""
        ids = [name(k) for k in numbers]
        texts = {t: i for i, t in enumerate(dict.fromkeys(self.papers[k][1] for k in numbers))}
        pairs = [sorted((texts[a], texts[b])) for a, b in self.near if a in texts and b in texts]
        result = assign(
            ids,
            np.array([self.papers[k][0] for k in numbers], dtype=np.int64),
            np.array([texts[self.papers[k][1]] for k in numbers], dtype=np.int64),
            np.array(pairs, dtype=np.int64).reshape(-1, 2),
            hashes(ids, "feyntune")[0],
            after,
            pinned,
        )
        return dict(zip(ids, zip(result.split, result.cluster, strict=True), strict=True))

    def leaks(self, assigned):
        """Pairs of identifiers with equal or nearly equal texts in different splits."""
        pairs = []
        for a in range(len(self.papers)):
            for b in range(a):
                if name(a) in assigned and name(b) in assigned:
                    ta, tb = self.papers[a][1], self.papers[b][1]
                    splits = {assigned[name(a)][0], assigned[name(b)][0]} - {EXCLUDED}
                    if (ta == tb or (ta, tb) in self.near or (tb, ta) in self.near) and len(splits) > 1:
                        pairs.append((name(a), name(b)))
        return pairs


def name(k: int) -> str:
    return f"hep-th/{9900000 + k}"


@st.composite
def corpora(draw):
    papers = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=24))
    pair = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda p: p[0] < p[1])
    return Corpus(papers, draw(st.sets(pair, max_size=14)))


def number_in(split: str, start: int = 0) -> int:
    return next(k for k in range(start, start + 200) if by_hash(hashes([name(k)], "feyntune")[0])[0] == split)


@pytest.mark.parametrize("key", list(REFERENCE["keys"]))
def test_the_assignment_of_known_identifiers_never_changes(key):
    expected = REFERENCE["keys"][key]
    place, rank = hashes(list(expected), key)
    assert REFERENCE["rule"] == RULE
    assert {i: [s, int(p), int(r)] for i, s, p, r in zip(expected, by_hash(place), place, rank, strict=True)} == {
        i: [e["split"], e["place"], e["rank"]] for i, e in expected.items()
    }


def test_the_hash_gives_70_15_15():
    n = 40_000
    split = by_hash(hashes([name(k) for k in range(n)], "feyntune")[0])
    for s, percent in SHARES.items():
        share = percent / 100
        assert abs((split == s).mean() - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_the_bounds_of_the_shares_are_exact():
    edges = [0, (70 << 64) // 100 - 1, (70 << 64) // 100, (85 << 64) // 100 - 1, (85 << 64) // 100, 2**64 - 1]
    assert by_hash(np.array(edges, dtype=np.uint64)).tolist() == [
        *("train", "train"),
        *("validation", "validation"),
        *("test", "test"),
    ]


@given(corpora(), st.none() | st.integers(0, 9), st.randoms())
def test_the_order_of_the_corpus_does_not_matter(corpus, after, random):
    numbers = list(range(len(corpus.papers)))
    shuffled = random.sample(numbers, len(numbers))
    assert corpus.assigned(numbers, after) == corpus.assigned(shuffled, after)


@given(corpora(), st.none() | st.integers(0, 9))
def test_no_text_and_no_near_duplicate_is_in_two_splits(corpus, after):
    assert corpus.leaks(corpus.assigned(range(len(corpus.papers)), after)) == []


@given(corpora(), st.none() | st.integers(0, 9), st.integers(0, 9))
def test_papers_that_arrive_later_move_nothing(corpus, after, today):
    old = [k for k, (day, _) in enumerate(corpus.papers) if day <= today]
    before = corpus.assigned(old, after)
    # A paper of today's date may sort before one already here only by its identifier, hence a later day.
    grown = corpus.assigned(range(len(corpus.papers)), after)
    assert {i: grown[i] for i in before} == before


@settings(max_examples=300)
@given(corpora(), st.none() | st.integers(0, 9), st.data())
def test_with_the_previous_split_late_arrivals_of_old_papers_move_nothing_either(corpus, after, data):
    old = data.draw(st.sets(st.integers(0, len(corpus.papers) - 1)))
    before = corpus.assigned(sorted(old), after)
    grown = corpus.assigned(range(len(corpus.papers)), after, pinned=before)
    assert {i: grown[i] for i in before} == before
    assert corpus.leaks(grown) == []


@given(corpora(), st.none() | st.integers(0, 9), st.integers(0, 9))
def test_the_previous_split_changes_nothing_in_the_ordinary_case(corpus, after, today):
    everything = range(len(corpus.papers))
    before = corpus.assigned([k for k in everything if corpus.papers[k][0] <= today], after)
    assert corpus.assigned(everything, after, pinned=before) == corpus.assigned(everything, after)


@given(corpora(), st.integers(0, 9))
def test_only_papers_after_the_date_are_held_out_and_none_of_them_trains(corpus, after):
    for i, (split, _) in corpus.assigned(range(len(corpus.papers)), after).items():
        newer = corpus.papers[int(i.split("/")[1]) - 9900000][0] > after
        assert split in ((HOLDOUT, EXCLUDED) if newer else (*SHARES, EXCLUDED))


def test_a_near_duplicate_follows_the_older_paper():
    test = number_in("test")
    train = number_in("train", test + 1)
    papers = [(0, k) for k in range(train + 1)]
    papers[train] = (5, train)
    assigned = Corpus(papers, {(test, train)}).assigned([train, test])
    assert assigned[name(train)] == ("test", name(test))


def bridge():
    """A corpus of a training paper, a test paper and a later one that is a near-duplicate of both."""
    train, test = number_in("train"), number_in("test")
    papers = [(k, k) for k in range(300)]
    return Corpus(papers, {(train, 299), (test, 299)}), train, test


def test_a_paper_between_two_splits_is_excluded_and_moves_neither():
    _, train, test = bridge()
    ids = [name(k) for k in (train, test, 299)]
    pairs = np.array([[0, 2], [1, 2]])
    result = assign(ids, np.arange(3), np.arange(3), pairs, hashes(ids, "feyntune")[0])
    assert result.split == ["train", "test", EXCLUDED]
    assert result.reasons == {2: (BETWEEN, ids[:2])}


def test_a_late_old_paper_between_two_pinned_ones_is_excluded():
    corpus, train, test = bridge()
    corpus.papers[299] = (-5, 299)
    before = corpus.assigned([train, test])
    grown = corpus.assigned([train, test, 299], pinned=before)
    assert grown == {**before, name(299): (EXCLUDED, name(min(train, test)))}
    assert corpus.assigned([train, test, 299]) != grown  # without the previous split nobody can know


def test_of_two_pinned_papers_that_became_alike_the_training_paper_goes():
    ids = [name(0), name(1)]
    pinned = {ids[0]: ("train", ids[0]), ids[1]: ("test", ids[1])}
    result = assign(ids, np.arange(2), np.arange(2), np.array([[0, 1]]), hashes(ids, "k")[0], None, pinned)
    assert result.split == [EXCLUDED, "test"]


def test_what_was_excluded_before_stays_excluded():
    ids = [name(0)]
    place = hashes(ids, "k")[0]
    result = assign(ids, np.zeros(1), np.zeros(1, int), np.empty((0, 2), int), place, None, {ids[0]: (EXCLUDED, "x")})
    assert result.split == [EXCLUDED]
    assert result.reasons == {0: (BEFORE, [])}


def test_a_new_paper_that_repeats_an_old_text_is_no_hold_out():
    ids = [name(0), name(1)]
    result = assign(ids, np.array([1, 9]), np.zeros(2, int), np.empty((0, 2), int), hashes(ids, "k")[0], after=5)
    assert result.split[0] in SHARES
    assert result.split[1] == EXCLUDED
    assert result.reasons[1] == (REPEATS, [name(0)])


def test_a_late_old_paper_that_repeats_a_held_out_one_is_excluded():
    ids = [name(0), name(1)]
    pinned = {ids[1]: (HOLDOUT, ids[1])}
    days, place = np.array([1, 9]), hashes(ids, "k")[0]
    result = assign(ids, days, np.zeros(2, int), np.empty((0, 2), int), place, 5, pinned)
    assert result.split == [EXCLUDED, HOLDOUT]
    assert result.reasons == {0: (AFTER, [ids[1]])}


def test_every_split_has_a_name_the_contract_knows():
    assert SPLITS == ("train", "validation", "test", "holdout")
