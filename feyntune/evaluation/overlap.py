"""The longest run of words that a text shares with any of many others: a measure of verbatim memorization.

Exact, in a few passes over the others, in which only numbers are held. Words (case and punctuation as they are; the
normal form has one space between them) become numbers by the texts' own vocabulary; a run of n words becomes a 64-bit
hash. One pass finds where runs of SEED words agree and follows each agreement along its diagonal; for texts without
any, runs of SEED - 1, SEED - 2, … words are looked for. What the hashes say is compared word by word before it counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SEED = 8  # words; rare enough in running text that few places need to be followed
CHUNK = 20_000  # abstracts read at a time
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; of the hash of a run
_TABLE = 24  # bits of the table that tells at once that a hash is none of the texts'


def longest_overlaps(texts: Sequence[str], others: pa.ChunkedArray) -> np.ndarray:
    """For each of `texts` the words of its longest run that stands in one of `others`; [texts], int64.

    500 texts of 600 words against 200,000 abstracts take some ten seconds on one core and less than 1 GB.
    """
    words = [t.split() for t in texts]
    known = pa.array(sorted({w for ws in words for w in ws}), pa.string())
    best = np.zeros(len(texts), np.int64)
    if not len(known):
        return best
    corpus = list(_numbered(others, known))

    number = {w: i for i, w in enumerate(known.to_pylist())}
    lengths = [len(w) for w in words]
    row = np.repeat(np.arange(len(texts)), [n + 1 for n in lengths])  # which text; a gap after each
    tokens = np.full(len(row), -1, np.int64)
    starts = np.cumsum([0, *(n + 1 for n in lengths)])[:-1]
    for start, ws in zip(starts, words, strict=True):
        tokens[start : start + len(ws)] = [number[w] for w in ws]

    for chunk in corpus:
        _follow(tokens, row, chunk, best)
    for n in range(SEED - 1, 0, -1):
        open_rows = (best == 0) & (np.array(lengths) >= n)
        if open_rows.any():
            for chunk in corpus:
                _present(tokens, row, chunk, n, open_rows, best)
    return best


def _numbered(others: pa.ChunkedArray, known: pa.Array) -> Iterator[np.ndarray]:
    """The words of `others` as their places in `known`, -1 for other words and after each text; int32."""
    for start in range(0, len(others), CHUNK):
        lists = pc.split_pattern(others.slice(start, CHUNK).combine_chunks(), " ")
        flat = pc.index_in(lists.flatten(), value_set=known).fill_null(-1).to_numpy(zero_copy_only=False)
        ends = np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
        yield np.insert(flat.astype(np.int32), ends, -1)


def _hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """A hash of every run of `n` tokens; 0 where the run holds a gap (-1)."""
    size = len(tokens) - n + 1
    if size <= 0:
        return np.zeros(0, np.uint64)
    result, whole = np.zeros(size, np.uint64), np.ones(size, bool)
    numbers = (tokens + 2).astype(np.uint64)
    for i in range(n):
        part = numbers[i : i + size]
        result = (result ^ (result >> np.uint64(29))) * _FACTOR + part
        whole &= part != 1
    return np.where(whole, np.maximum(result, np.uint64(1)), np.uint64(0))


def _agreeing(hashes: np.ndarray, chunk_hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into `chunk_hashes` whose hash is one of `hashes` (sorted, unique), and its index in `hashes`."""
    shift = np.uint64(64 - _TABLE)
    table = np.zeros(1 << _TABLE, bool)
    table[((hashes * _FACTOR) >> shift).astype(np.int64)] = True
    maybe = np.flatnonzero(table[((chunk_hashes * _FACTOR) >> shift).astype(np.int64)] & (chunk_hashes != 0))
    at = np.searchsorted(hashes, chunk_hashes[maybe])
    at[at == len(hashes)] = 0
    same = hashes[at] == chunk_hashes[maybe]
    return maybe[same], at[same]


def _follow(tokens: np.ndarray, row: np.ndarray, chunk: np.ndarray, best: np.ndarray) -> None:
    """Lengthen `best` by the runs of at least SEED words that `tokens` and `chunk` share."""
    own = _hashes(tokens, SEED)
    order = np.argsort(own, kind="stable")
    order = order[own[order] != 0]
    if not len(order):
        return
    unique, first, count = np.unique(own[order], return_index=True, return_counts=True)
    present, which = _agreeing(unique, _hashes(chunk, SEED))
    many = count[which]
    other = np.repeat(present, many)
    inside = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    matches = order[np.repeat(first[which], many) + inside]
    real = np.ones(len(matches), bool)  # by the words themselves
    for i in range(SEED):
        real &= tokens[matches + i] == chunk[other + i]
    matches, other = matches[real], other[real]
    if not len(matches):
        return
    diagonal = other - matches
    order = np.lexsort((matches, diagonal))
    matches, diagonal = matches[order], diagonal[order]
    new = np.ones(len(matches), bool)
    new[1:] = (diagonal[1:] != diagonal[:-1]) | (matches[1:] != matches[:-1] + 1)
    begins = np.flatnonzero(new)
    runs = np.diff([*begins, len(matches)])
    np.maximum.at(best, row[matches[begins]], runs + SEED - 1)


def _present(
    tokens: np.ndarray, row: np.ndarray, chunk: np.ndarray, n: int, open_rows: np.ndarray, best: np.ndarray
) -> None:
    """Set `best` to `n` for the open texts of which a run of `n` words stands in `chunk`."""
    own = _hashes(tokens, n)
    own[~open_rows[row[: len(own)]]] = 0
    matches = np.flatnonzero(own)
    unique, which = np.unique(own[matches], return_inverse=True)
    if not len(unique):
        return
    present, hit = _agreeing(unique, _hashes(chunk, n))
    place = np.full(len(unique), -1)
    place[hit] = present  # any one of its places
    matches, other = matches[place[which] >= 0], place[which][place[which] >= 0]
    real = np.ones(len(matches), bool)
    for i in range(n):
        real &= tokens[matches + i] == chunk[other + i]
    best[np.unique(row[matches[real]])] = n
