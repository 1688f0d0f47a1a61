"""Which split a paper belongs to. The README says why the rule is this one."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# The name of the rule is part of the hash (blake2b's `person`, 16 bytes): another rule is another name.
RULE = "feyntune-split-1"
KEY = "feyntune"  # of the hash, where none is given
SHARES = {"train": 70, "validation": 15, "test": 15}  # percent
HOLDOUT, EXCLUDED = "holdout", "excluded"
SPLITS = (*SHARES, HOLDOUT)

BETWEEN = "near-duplicate of papers in different splits"
REPEATS = "repeats a text from before the hold-out date"
AFTER = "repeats a text of the hold-out"
BEFORE = "excluded in the previous split"
WITHDRAWN = "withdrawn"

_OLD = "from before the hold-out date"


@dataclass
class Assignment:
    """One entry a paper, in the corpus's order.

    Attributes:
        split: train, validation, test, holdout or excluded.
        cluster: the id of the oldest paper this one repeats, directly or through others; else its own.
        reasons: row of each excluded paper -> (reason, ids of the papers it is a near-duplicate of).
    """

    split: list[str]
    cluster: list[str]
    reasons: dict[int, tuple[str, list[str]]] = field(default_factory=dict)


def hashes(ids: Sequence[str], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Two independent keyed hashes of each identifier: (its place in [0, 2^64), its order of drawing)."""
    parts = bytearray()
    for i in ids:
        parts += hashlib.blake2b(i.encode(), digest_size=16, key=key.encode(), person=RULE.encode()).digest()
    both = np.frombuffer(bytes(parts), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    return both[:, 0], both[:, 1]


def by_hash(place: np.ndarray) -> np.ndarray:
    """The split of a paper that repeats nothing, from its place: 70 % train, 15 % validation, 15 % test."""
    bounds = [(sum(list(SHARES.values())[: i + 1]) << 64) // 100 for i in range(len(SHARES) - 1)]
    return np.array(list(SHARES))[np.searchsorted(np.array(bounds, dtype=np.uint64), place, side="right")]


def assign(
    ids: Sequence[str],
    days: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray,
    place: np.ndarray,
    after: int | None = None,
    pinned: Mapping[str, tuple[str, str]] | None = None,
) -> Assignment:
    """Assign every paper, the oldest first, looking only at papers assigned before it.

    Args:
        ids: [papers] identifiers, unique.
        days: [papers] date of version 1, in days.
        text: [papers] number of each paper's text (`Duplicates.text`).
        pairs: [pairs, 2] numbers of texts that are near-duplicates.
        place: [papers] from `hashes`.
        after: papers with a later day are held out.
        pinned: id -> (split, cluster) of papers assigned by an earlier split; these come first and stay.
    """
    result = Assignment(by_hash(place).tolist(), list(ids))
    pinned = pinned or {}
    newer = days > after if after is not None else np.zeros(len(ids), dtype=bool)
    for i in np.flatnonzero(newer).tolist():
        result.split[i] = HOLDOUT
    for i, paper in enumerate(ids):
        if paper in pinned:
            result.split[i], result.cluster[i] = pinned[paper]
            if result.split[i] == EXCLUDED:
                result.reasons[i] = (BEFORE, [])

    near_texts: dict[int, list[int]] = defaultdict(list)
    for a, b in pairs.tolist():
        near_texts[a].append(b)
        near_texts[b].append(a)
    times = np.bincount(text, minlength=1)
    repeated = (times[text] > 1) | np.isin(text, pairs.ravel())  # the others repeat nothing: done above

    # Of two pinned papers that a revision has made near-duplicates, the one whose loss costs least goes.
    protected = {s: k for k, s in enumerate(("test", HOLDOUT, "validation", "train"))}
    position = np.empty(len(ids), dtype=np.int64)
    position[np.lexsort((np.array(ids), days))] = np.arange(len(ids))
    order = sorted(
        np.flatnonzero(repeated).tolist(),
        key=lambda i: (protected.get(result.split[i], 9) if ids[i] in pinned else 10, position[i]),
    )
    seen: dict[int, dict[str, int]] = defaultdict(dict)  # text -> split or _OLD -> the first paper of it
    for i in order:
        near: dict[str, int] = {}
        for t in (int(text[i]), *near_texts[int(text[i])]):
            for s, j in seen[t].items():
                near[s] = min(near.get(s, j), j, key=lambda k: position[k])
        repeats = {s: j for s, j in near.items() if s in SPLITS}
        was_pinned = ids[i] in pinned
        reason = None
        if result.split[i] == EXCLUDED:
            pass
        elif was_pinned:
            if repeats.keys() - {result.split[i]}:
                reason = BETWEEN
        elif newer[i]:
            if _OLD in near:
                reason = REPEATS
        elif len(repeats) > 1:
            reason = BETWEEN
        elif repeats.keys() == {HOLDOUT}:
            reason = AFTER
        elif repeats:
            result.split[i] = next(iter(repeats))
        if reason:
            result.split[i] = EXCLUDED
            result.reasons[i] = (reason, [ids[j] for j in sorted(set(near.values()), key=lambda j: position[j])])
        if near and not was_pinned:
            result.cluster[i] = result.cluster[min(near.values(), key=lambda j: position[j])]
        of_text = seen[int(text[i])]
        if result.split[i] != EXCLUDED:
            of_text.setdefault(result.split[i], i)
        if not newer[i]:
            of_text[_OLD] = min(of_text.get(_OLD, i), i, key=lambda k: position[k])
    return result
