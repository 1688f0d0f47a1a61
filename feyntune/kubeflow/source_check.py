"""A look at a run's source before the run: what its first steps would refuse is said at once."""

from collections.abc import Iterator
from datetime import date
from itertools import islice

import numpy as np

from feyntune.artifacts.names import local_file
from feyntune.artifacts.records import Paper
from feyntune.errors import UserError
from feyntune.ingestion.fields import CategoryFilter, Row
from feyntune.ingestion.tally import AFTER_CUT_OFF, OTHER_CATEGORY, Tally
from feyntune.splitting.assign import HOLDOUT, KEY, by_hash, hashes
from feyntune.splitting.mixtures import belongs, draw
from feyntune.variants import Mixture

RECORDS = 2000  # read at most, which takes a fraction of a second


def check_source(
    source: str,
    mixtures: list[Mixture],
    drawn: set[str],
    scored: list[str],
    *,
    categories: list[str] | None = None,
    until: date | None = None,
    after: date | None = None,
    max_bad: float = 0.001,
    converted_text: bool = False,
) -> None:
    """Check that `source` can be read; where its first `RECORDS` are all of it, also that they suffice.

    Of the rest of a longer source nothing is known, and a harvest is not begun. Near-duplicates are not looked for:
    with them a corpus has at most as many papers.

    Args:
        mixtures: all that are defined.
        drawn: names of those that the run trains on.
        scored: categories that need test papers.
        categories, until, after, max_bad, converted_text: as in `ingest` and `split`.

    A mixture that alone cannot be drawn is no reason: its branch fails, and the report has the others.

    Raises:
        UserError: the source cannot be read, has too many bad records, or too few papers for any variant.
    """
    if source.startswith("oai:"):
        return
    tally = Tally()
    rows = list(islice(_rows(source, tally, converted_text), RECORDS + 1))
    if len(rows) > RECORDS:
        return
    if not tally.read:
        raise UserError(f"{source} is empty: give a source that has papers.")
    tally.check(max_bad)
    chosen = CategoryFilter(categories)
    papers: dict[str, Paper] = {}
    for row in rows:
        if row.left_out:
            continue
        if not chosen.accepts(row.paper.primary):
            tally.other(row.paper.primary)
        elif until is not None and row.paper.date > until:
            tally.left_out[AFTER_CUT_OFF] += 1
        else:
            papers[row.paper.id] = row.paper
    usable = [paper for paper in papers.values() if not paper.withdrawn]
    if not usable:
        raise UserError(f"{source}: none of its {tally.read:,} records can be used ({_why(tally)}).")
    _check_days(source, usable, after)
    primary = np.array([paper.primary for paper in usable])
    place, rank = hashes([paper.id for paper in usable], KEY)
    split = np.where([after is not None and paper.date > after for paper in usable], HOLDOUT, by_hash(place))
    _, report = draw(mixtures, primary, split, rank)
    few = f"{source} has {len(usable):,} paper{'s' * (len(usable) != 1)}, too few:"
    reasons = {name: report[name]["reason"] for name in report if name in drawn}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise UserError(f"{few} for mixture {name} {reason}; give more, or choose other variants.")
    for category in scored:
        if not (belongs(primary, category) & (split == "test")).any():
            raise UserError(
                f"{few} none of {category} falls into the test split; give more, or score other categories "
                "(--set evaluate.categories=[…])."
            )


def _rows(source: str, tally: Tally, converted_text: bool) -> Iterator[Row]:
    """The records of every category: a choice of categories could read a long file to its end."""
    kind, _, where = source.partition(":")
    everything = CategoryFilter(None)
    if kind == "synthetic":
        from feyntune.ingestion.ingest import synthetic_rows

        return synthetic_rows(where, everything, tally)
    if kind == "atom":
        from feyntune.ingestion.atom import read_atom

        return read_atom(local_file(where), everything, tally, converted_text=converted_text)
    if kind == "jsonl":
        from feyntune.ingestion.jsonl import read_jsonl

        return read_jsonl(where, everything, tally)
    from feyntune.ingestion.kaggle import read_kaggle

    return read_kaggle(where, everything, tally)


def _why(tally: Tally) -> str:
    others = tally.left_out.pop(OTHER_CATEGORY, 0)
    reasons = [f"{count:,} {reason}" for reason, count in (tally.left_out + tally.refused).items()]
    if others:
        reasons.append(f"{others:,} of other categories, --categories names what to keep: {', '.join(tally.others)}")
    return "; ".join(reasons) or "all are withdrawn"


def _check_days(source: str, papers: list[Paper], after: date | None) -> None:
    """Papers on both sides of the day that parts training from hold-out."""
    if after is None:
        return
    first, last = min(p.date for p in papers), max(p.date for p in papers)
    if first > after or last <= after:
        what = "train on" if first > after else "hold out"
        raise UserError(
            f"after is {after}, which leaves no paper to {what}: those of {source} are from {first} to {last}; give a "
            "day between them."
        )
