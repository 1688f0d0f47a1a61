"""The check that no training set holds a held-out paper or a near-duplicate of one.

It reads the written files and nothing else, and finds near-duplicates by another method than the one that made
the split: an exact set-similarity join instead of MinHash, so what MinHash missed is found here.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from feyntune.errors import UserError
from feyntune.splitting.assign import EXCLUDED, SPLITS
from feyntune.splitting.duplicates import THRESHOLD, equal_pairs

_WORD = re.compile(r"\w+")
# Odd multipliers, so that the order of a run's words counts.
_MIX = [np.uint64(m) for m in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]
_BUCKETS = 1 << 22
_BITS = 512


def verify_no_leakage(folder: str | Path, threshold: float = THRESHOLD) -> dict[str, Any]:
    """Check `papers.parquet` and `mixtures.parquet` of a split; returns what was compared.

    Checked: identifiers are unique; every drawn paper is in the corpus, not withdrawn, drawn once a mixture
    and in the split it is assigned to; no paper of one split is a near-duplicate (Jaccard similarity of 3-word
    shingle sets >= `threshold`, the same text included) of a paper of another.

    Raises:
        UserError: one of these does not hold; the message names papers.
    """
    folder = Path(folder)
    papers = pq.read_table(folder / "papers.parquet", columns=["id", "split", "withdrawn"])
    drawn = pq.read_table(folder / "mixtures.parquet")
    ids = papers["id"].to_numpy()
    split = papers["split"].to_numpy()

    values, times = np.unique(ids, return_counts=True)
    _require(values[times > 1], "stand more than once in papers.parquet")
    unknown = set(np.unique(split)) - {*SPLITS, EXCLUDED}
    _require(ids[np.isin(split, sorted(unknown))], f"have an unknown split ({', '.join(sorted(unknown))})")

    row = pc.index_in(drawn["id"], value_set=papers["id"].combine_chunks())
    _require(drawn["id"].filter(pc.is_null(row)).to_numpy(), "are in a mixture but not in papers.parquet")
    row = row.to_numpy()
    _require(ids[row[papers["withdrawn"].to_numpy()[row]]], "are withdrawn and in a mixture")
    drawn_as = drawn["split"].to_numpy()
    elsewhere = drawn_as != split[row]
    _require(ids[row[elsewhere]], "are in a mixture under another split than their own")
    _, mixture = np.unique(drawn["mixture"].to_numpy(), return_inverse=True)
    values, times = np.unique(mixture * len(ids) + row, return_counts=True)
    _require(ids[values[times > 1] % max(len(ids), 1)], "were drawn twice by a mixture")

    side = np.select([split == s for s in SPLITS], range(len(SPLITS)), -1)
    pairs, compared = _near_duplicates_across(folder / "papers.parquet", side, threshold)
    named = [f"{ids[a]} ({split[a]}) and {ids[b]} ({split[b]}), similarity {j:.2f}" for a, b, j in pairs]
    _require(named, "are near-duplicates in different splits", separator="; ")
    return {
        "holds": True,
        "threshold": threshold,
        "training_papers": int((split == "train").sum()),
        "held_out_papers": int((side > 0).sum()),
        "drawn_for_training": len(np.unique(row[drawn_as == "train"])),
        "drawn_to_be_held_out": len(np.unique(row[drawn_as != "train"])),
        "pairs_compared": compared,
        "near_duplicates_across_splits": 0,
    }


def _require(rows: Any, what: str, separator: str = ", ") -> None:
    if len(rows):
        some = separator.join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")
        raise UserError(
            f"The split's audit fails: {len(rows)} {what}: {some}. Train nothing on it, make it again from its corpus."
        )


def _near_duplicates_across(path: Path, side: np.ndarray, threshold: float) -> tuple[list[tuple[int, int, float]], int]:
    """Pairs of rows of different sides whose Jaccard similarity reaches `threshold`, with it; and how many met.

    Side -1 is no side.

    Prefix filtering (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007): with the n shingles of
    every text in one common order, two texts of similarity t share one of their first n - ceil(t n) + 1. The
    order is rarest first, so few texts meet; the counts behind it may be coarse, any common order is exact.
    Those that meet are first compared by bitmaps (Sandes, Teodoro and Melo 2020), which drops no pair either.
    """
    rows, starts, shingles = _shingled(path, side >= 0)
    size = np.zeros(len(side), dtype=np.int64)
    size[rows] = np.diff(starts)
    counts = sum(
        (np.bincount(part % _BUCKETS, minlength=_BUCKETS) for part in np.array_split(shingles, 16)),
        start=np.zeros(_BUCKETS, dtype=np.int64),
    )
    bitmaps = np.zeros((len(side), _BITS // 8), dtype=np.uint8)
    keys, holders = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for i, start, n in zip(rows.tolist(), starts.tolist(), size[rows].tolist(), strict=False):
        hashes = shingles[start : start + n]
        first = n - math.ceil(threshold * n - 1e-9) + 1
        keys.append(hashes[np.lexsort((hashes, counts[hashes % _BUCKETS]))[:first]])
        holders.append(np.full(len(keys[-1]), i))
        bits = np.zeros(_BITS, dtype=np.uint8)
        bits[hashes % _BITS] = 1
        bitmaps[i] = np.packbits(bits)
    key, row = np.concatenate(keys), np.concatenate(holders)
    del keys, holders

    met = 0
    codes = [np.empty(0, dtype=np.int64)]
    for at, other in equal_pairs(key):
        a, b = row[at], row[other]
        a, b = a[side[a] != side[b]], b[side[a] != side[b]]
        met += len(a)
        # Each bit that differs is a shingle of only one of the two, which bounds what they can have in common.
        differ = np.bitwise_count(bitmaps[a] ^ bitmaps[b]).sum(axis=1, dtype=np.int64)
        common = (size[a] + size[b] - differ) // 2
        keep = common >= threshold * (size[a] + size[b] - common) - 1e-9
        codes.append(np.minimum(a, b)[keep] * len(side) + np.maximum(a, b)[keep])
    codes_met = np.unique(np.concatenate(codes))
    pairs = np.stack([codes_met // max(len(side), 1), codes_met % max(len(side), 1)], axis=1)

    start_of = dict(zip(rows.tolist(), starts.tolist(), strict=False))
    near = []
    for a, b in pairs.tolist():
        x, y = (shingles[start_of[i] : start_of[i] + size[i]] for i in (a, b))
        common = len(np.intersect1d(x, y, assume_unique=True))
        similarity = common / (len(x) + len(y) - common)
        if similarity >= threshold:
            near.append((a, b, similarity))
    return near, met


def _shingled(path: Path, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hashed shingles of the selected rows: runs of 3 words, lower case, without punctuation.

    Returns:
        rows [texts]; starts [texts + 1]; shingles, of which [starts[k] : starts[k + 1]] are those of rows[k],
        ascending and each once.
    """
    rows: list[int] = []
    sets: list[np.ndarray] = []
    i = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["abstract"]):
        texts = batch.column(0).to_pylist()
        words = [_WORD.findall(t.lower()) if selected[i + k] else [] for k, t in enumerate(texts)]
        code = {w: _hash(w) for w in {w for ws in words for w in ws}}
        codes = np.fromiter((code[w] for ws in words for w in ws), np.uint64)
        runs = codes[:-2] * _MIX[0] + codes[1:-1] * _MIX[1] + codes[2:] * _MIX[2]
        done = 0
        for k, ws in enumerate(words):
            if selected[i + k]:
                rows.append(i + k)
                short = [_hash(" ".join(ws) or texts[k])]
                few = len(ws) < len(_MIX)
                sets.append(np.array(short, np.uint64) if few else np.unique(runs[done : done + len(ws) - 2]))
            done += len(ws)
        i += len(texts)
    starts = np.cumsum([0, *map(len, sets)])
    return np.array(rows, dtype=np.int64), starts, np.concatenate([np.empty(0, np.uint64), *sets])


def _hash(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode())
