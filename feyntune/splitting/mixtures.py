"""Which papers a training mixture takes: the rules of variants.yaml, all drawn from one assignment."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from feyntune.splitting.assign import HOLDOUT, SHARES, SPLITS
from feyntune.variants import Mixture


def belongs(primary: np.ndarray, part: str) -> np.ndarray:
    """[papers] whether each primary category is `part` or lies in it: `cs` holds cs.LG, never physics.ao-ph."""
    return (primary == part) | np.char.startswith(primary, part + ".")


def largest_remainder(total: int, percents: Sequence[int]) -> list[int]:
    """`total` shared out by `percents`: floors, then one more to the largest remainders, the first on a tie."""
    shares = [divmod(total * p, 100) for p in percents]
    counts = [whole for whole, _ in shares]
    for k in sorted(range(len(shares)), key=lambda k: -shares[k][1])[: total - sum(counts)]:
        counts[k] += 1
    return counts


def draw(
    mixtures: list[Mixture], primary: np.ndarray, split: np.ndarray, rank: np.ndarray
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, Any]]]:
    """Draw every mixture the corpus can supply.

    Each part is taken in the order of `rank`, so that a smaller draw is the beginning of a larger one: mixtures
    nest where their rules do, and papers that arrive later displace few.

    Args:
        mixtures: from `feyntune.variants.load_mixtures`.
        primary: [papers] primary categories.
        split: [papers] train, validation, test, holdout or excluded.
        rank: [papers] the second of `hashes`.

    Returns:
        mixture -> split -> rows of the papers in drawing order, for the available mixtures; and for every
        mixture `available`, the `reason` if it is not, its rule, and its sizes by split and part. A mixture
        whose hold-out alone cannot be drawn has none, and `holdout` says why.
    """
    order = np.argsort(rank, kind="stable")
    rows = {
        (part, s): order[(belongs(primary, part) & (split == s))[order]]
        for part in {p for m in mixtures for p in m.parts}
        for s in SPLITS
    }
    by_name = {m.name: m for m in mixtures}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    report: dict[str, dict[str, Any]] = {}
    for m in sorted(mixtures, key=lambda m: m.size is not None):  # those that give sizes first
        takes: dict[str, dict[str, np.ndarray]] = {}
        problems: dict[str, str] = {}
        absent = [p for p in m.parts if not any(len(rows[p, s]) for s in SHARES)]
        if absent:
            problems["train"] = f"the corpus holds no paper of {' and '.join(absent)}"
        elif m.size is not None and m.size not in drawn:
            problems["train"] = f"it takes the size of {m.size}, which is not available"
        else:
            for s in SPLITS:
                size = sum(len(rows[p, s]) for p in by_name[m.size].parts) if m.size is not None else 0
                takes[s], problem = _take(m, s, size, {p: rows[p, s] for p in m.parts}, rank)
                if problem:
                    problems[s] = problem
        held_out = problems.pop(HOLDOUT, None)
        entry: dict[str, Any] = {"available": not problems, "reason": "; ".join(problems.values()) or None}
        entry["rule"] = m.rule
        entry["sizes"] = {}
        if not problems:
            drawn[m.name] = {}
            for s, parts in takes.items():
                papers = np.concatenate([*parts.values(), np.empty(0, dtype=np.int64)])
                if len(papers):
                    drawn[m.name][s] = papers[np.argsort(rank[papers], kind="stable")]
                    sizes = {p: len(r) for p, r in parts.items()}
                    entry["sizes"][s] = {"papers": len(papers), "parts": sizes}
            if held_out:
                entry["holdout"] = held_out
        report[m.name] = entry
    return drawn, {m.name: report[m.name] for m in mixtures}


def _take(
    m: Mixture, s: str, size: int, rows: dict[str, np.ndarray], rank: np.ndarray
) -> tuple[dict[str, np.ndarray], str | None]:
    """The rows of each part in one split; or what the corpus lacks for it."""
    supply = {part: len(r) for part, r in rows.items()}
    if m.percents():
        needs = dict(zip(m.parts, largest_remainder(size, m.percents()), strict=True))
        short = [f"{needs[p]} {p} papers and has {supply[p]}" for p in m.parts if supply[p] < needs[p]]
        if short:
            return {}, f"{s} needs {', '.join(short)} for the size of {m.size}, {size}"
        taken = {part: rows[part][: needs[part]] for part in m.parts}
    else:
        taken = {part: r for part, r in rows.items() if m.parts[part] == "all"}
        pool = {part: r for part, r in rows.items() if m.parts[part] == "fill"}
        if pool:
            needed, supplied = size - sum(map(len, taken.values())), sum(map(len, pool.values()))
            names = " and ".join(pool)
            if needed < 0:
                return {}, f"{s} has {-needed} {' and '.join(taken)} papers more than the size of {m.size}, {size}"
            if supplied < needed:
                demand = f"{needed} {names} papers and has {supplied}"
                return {}, f"{s} needs {demand} for the size of {m.size}, {size}"
            everything = np.concatenate(list(pool.values()))
            chosen = everything[np.argsort(rank[everything], kind="stable")[:needed]]
            taken |= {part: r[np.isin(r, chosen)] for part, r in pool.items()}
    if s != HOLDOUT and not any(map(len, taken.values())):
        return {}, f"{s} would be empty"
    lacking = [part for part, r in taken.items() if not len(r)]
    if s == "train" and lacking:
        return {}, f"train would hold no {' and no '.join(lacking)} paper"
    return taken, None
