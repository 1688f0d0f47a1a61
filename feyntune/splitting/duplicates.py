"""Which abstracts are the same text, or nearly: MinHash to find candidates, the real similarity to decide.

Whether two texts are near-duplicates depends on the two alone, not on what else the corpus holds, so that the
assignment built on it (`assign.py`) can be stable under growth.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from datasketch import MinHash

SHINGLE_WORDS = 3  # words of a shingle
THRESHOLD = 0.6  # Jaccard similarity of shingle sets from which two texts are near-duplicates
PERMUTATIONS = 192
# A pair at the threshold is missed with probability (1 - 0.6^3)^64 = 2e-7, one at 0.7 with 1e-12.
ROWS = 3
# The standard error of MinHash's estimate is 0.035 at the threshold: a candidate estimated this far below it
# (5.7 standard errors) is dropped without looking at its texts.
MARGIN = 0.2

_WORD = re.compile(r"\w+")


def shingles(text: str) -> set[bytes]:
    """Every run of three words of `text`, lower case and without punctuation.

    A text of fewer words is one shingle; one without any word is its own shingle.
    """
    words = " ".join(_WORD.findall(text.lower())).encode().split()
    if len(words) < SHINGLE_WORDS:
        return {b" ".join(words) or text.encode()}
    return {b" ".join(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def jaccard(a: set[bytes], b: set[bytes]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


@dataclass
class Duplicates:
    """What a corpus repeats.

    Attributes:
        text: [papers] the number of each paper's text; equal numbers are equal texts. Numbers follow the order
            of first occurrence.
        row: [texts] the first paper of each text.
        pairs: [pairs, 2] numbers of texts that are near-duplicates, each pair once and ascending.
        similarity: [pairs] their Jaccard similarity.
        candidates: pairs whose texts were compared.
    """

    text: np.ndarray
    row: np.ndarray
    pairs: np.ndarray
    similarity: np.ndarray
    candidates: int


def find_duplicates(
    batches: Callable[[], Iterable[list[str]]],
    papers: int,
    threshold: float = THRESHOLD,
    advance: Callable[[int], None] = lambda n: None,
) -> Duplicates:
    """Find equal and nearly equal texts.

    Args:
        batches: gives the texts in the corpus's order, a list at a time; called twice, so that the texts need
            not fit into memory. What is kept is 768 bytes a text.
        papers: how many texts there are.
        threshold: Jaccard similarity of 3-word shingle sets, 0.5 to 1. Below 0.6 MinHash begins to miss pairs.
        advance: told how many texts were read.
    """
    text = np.empty(papers, dtype=np.int64)
    signatures = np.empty((papers, PERMUTATIONS), dtype=np.uint32)  # pages never written to cost nothing
    rows: list[int] = []
    seen: dict[bytes, int] = {}
    done = 0
    for batch in batches():
        fresh = []
        for i, abstract in enumerate(batch, start=done):
            number = seen.setdefault(xxhash.xxh3_128_digest(abstract.encode()), len(rows))
            text[i] = number
            if number == len(rows):
                rows.append(i)
                fresh.append(abstract)
        start = len(rows) - len(fresh)
        for k, signature in enumerate(_signatures(fresh), start=start):
            signatures[k] = signature
        done += len(batch)
        advance(len(batch))
    row = np.array(rows, dtype=np.int64)
    pairs = _candidates(signatures[: len(row)], threshold)
    similarity = _similarities(batches, row, pairs)
    near = similarity >= threshold
    return Duplicates(text, row, pairs[near], similarity[near], len(pairs))


def _signatures(texts: list[str]) -> Iterator[np.ndarray]:
    sets = (shingles(t) for t in texts)
    for minhash in MinHash.generator(sets, num_perm=PERMUTATIONS, seed=1, hashfunc=xxhash.xxh32_intdigest):
        yield minhash.hashvalues


def _candidates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs of texts that agree on a band of the signature, [pairs, 2], ascending.

    datasketch's MinHashLSH keeps a Python set for every bucket of every band, 8 GB for 300,000 texts; sorting
    one band at a time finds the same pairs in the memory of one column.
    """
    n = len(signatures)
    codes = [np.empty(0, dtype=np.int64)]
    for band in range(0, PERMUTATIONS, ROWS):
        key = np.zeros(n, dtype=np.uint64)
        for column in range(band, band + ROWS):
            key = key * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column]
        for a, b in equal_pairs(key):
            alike = (signatures[a] == signatures[b]).mean(axis=1) >= threshold - MARGIN
            codes.append(np.minimum(a, b)[alike] * n + np.maximum(a, b)[alike])
    codes_met = np.unique(np.concatenate(codes))
    return np.stack([codes_met // n, codes_met % n], axis=1) if n else np.empty((0, 2), dtype=np.int64)


def equal_pairs(key: np.ndarray, at_once: int = 1 << 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every pair of positions of `key` with equal values, `at_once` at most at a time: (first, second)."""
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    at = np.flatnonzero(ordered[1:] == ordered[:-1])
    apart = 1
    while len(at):
        for start in range(0, len(at), at_once):
            part = at[start : start + at_once]
            yield order[part], order[part + apart]
        apart += 1
        at = at[at + apart < len(key)]
        at = at[ordered[at + apart] == ordered[at]]


def _similarities(batches: Callable[[], Iterable[list[str]]], row: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    if not len(pairs):
        return np.empty(0)
    number = {int(row[t]): int(t) for t in np.unique(pairs)}  # paper -> text
    sets: dict[int, set[bytes]] = {}
    done = 0
    for batch in batches():
        for i in range(len(batch)):
            if done + i in number:
                sets[number[done + i]] = shingles(batch[i])
        done += len(batch)
    return np.array([jaccard(sets[a], sets[b]) for a, b in pairs.tolist()])
