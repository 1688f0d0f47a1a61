"""Sources of arXiv metadata into one corpus: canonical records, sorted by id, with the counts of what was read."""

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from feyntune.artifacts.artifact import Manifest, read_manifest, write_artifact
from feyntune.artifacts.records import TEXT_FORM
from feyntune.errors import UserError
from feyntune.ingestion.fields import CategoryFilter, Row, parse_day
from feyntune.ingestion.sorting import write_sorted
from feyntune.ingestion.tally import AFTER_CUT_OFF, DELETED, OTHER_CATEGORY, REPEATED, Tally
from feyntune.telemetry import log, progress


def ingest(
    source: str,
    out: str | Path,
    *,
    until: str | None = None,
    categories: list[str] | None = None,
    max_bad: float = 0.001,
    converted_text: bool = False,
    oai_set: str | None = None,
    prefix: str = "arXivRaw",
    since: str | None = None,
    delay: float = 3.0,
    state: str | Path | None = None,
) -> Manifest:
    """Read papers from `source` into the artifact `out` (kind `corpus`).

    Args:
        source: `kaggle:FILE`, `oai:URL`, `atom:FILE`, `jsonl:FILE` or `synthetic:N`.
        until: keep papers whose version 1 was submitted on this day (YYYY-MM-DD) or before.
        categories: archives (`hep-th`, `cs`) or categories (`cs.LG`) to keep by primary category; None is all.
        max_bad: share of unusable records above which the corpus is refused.
        converted_text: accept a format whose server turns TeX into Unicode (OAI prefix `arXiv`, the Atom API).
            Perplexities over such text and over TeX do not compare.
        oai_set: harvest one set only (`physics:hep-th`). It holds cross-lists too: use `categories` as well.
        prefix: OAI metadata format, `arXivRaw` or `arXiv`.
        since: harvest only records changed on this day (YYYY-MM-DD) or later.
        delay: seconds between OAI requests; arXiv's terms ask for 3.
        state: folder in which a harvest is kept, to resume it, and later to fetch only what changed;
            default `OUT.harvest`.

    Raises:
        UserError: an argument or the source is wrong, or too many records are bad. What was read until then is
            in the folder `OUT.partial` (papers.parquet, counts.json; not sealed).
    """
    started = time.monotonic()
    out = Path(out)
    category_filter = CategoryFilter(categories)
    last_day = parse_day("until", until)
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is {max_bad}, not a share: give a number between 0 and 1, such as 0.001.")
    kind, colon, where = source.partition(":")
    if not colon or not where or kind not in ("kaggle", "oai", "atom", "jsonl", "synthetic"):
        raise UserError(f"Source {source!r}: write kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.")
    tally = Tally()
    config = {
        "source": {"oai": f"oai-{prefix}", "atom": "atom-api" if converted_text else "atom"}.get(kind, kind),
        "text_form": TEXT_FORM,
        "until": until,
        "categories": sorted(categories) if categories is not None else None,
    }
    if kind == "kaggle":
        from feyntune.ingestion.kaggle import read_kaggle

        rows = read_kaggle(where, category_filter, tally)
    elif kind == "atom":
        from feyntune.ingestion.atom import read_atom

        rows = read_atom(where, category_filter, tally, converted_text=converted_text)
    elif kind == "jsonl":
        from feyntune.ingestion.jsonl import read_jsonl

        rows = read_jsonl(where, category_filter, tally)
    elif kind == "synthetic":
        rows = synthetic_rows(where, category_filter, tally)
    else:
        from feyntune.ingestion.oai import Harvest

        harvest = Harvest(
            where,
            state if state is not None else out.with_name(f"{out.name}.harvest"),
            prefix=prefix,
            converted_text=converted_text,
            oai_set=oai_set,
            since=parse_day("since", since),
            delay=delay,
        )
        if prefix == "arXiv" and until:
            log.warning("in the OAI format arXiv most dates are those of the current version: --until goes by them")
        harvest.run()
        rows = harvest.papers(category_filter, tally)

    with write_artifact(out, "corpus", config=config) as folder:
        counts = _Counts()
        try:
            with tempfile.TemporaryDirectory(prefix=".runs.", dir=out.parent) as scratch:
                write_sorted(
                    _up_to(rows, last_day, tally), folder.path / "papers.parquet", Path(scratch), seen=counts.add
                )
            counts.write(folder.path / "counts.json", tally)
            tally.check(max_bad)
            if not counts.kept:
                raise UserError(f"{source}: none of the {tally.read:,} records read was kept ({counts.why(tally)}).")
        except UserError as e:
            if not tally.read:
                raise
            counts.write(folder.path / "counts.json", tally)
            raise UserError(f"{e} What was read is in {_keep_partial(folder.path, out)}.") from e
        folder.stats |= {"seconds": round(time.monotonic() - started, 2), "given": where, "max_bad": max_bad}
    log.info("%s: %d papers of %d records read", out, counts.kept, tally.read)
    return read_manifest(out)


def synthetic_rows(text: str, categories: CategoryFilter, tally: Tally) -> Iterator[Row]:
    """`N` or `N:SEED` records of the generator, read as the Kaggle file they would be."""
    import orjson

    from feyntune.ingestion.kaggle import read_lines
    from feyntune.ingestion.synthetic import synthetic_records

    n, _, seed = text.partition(":")
    if not n.isdecimal() or not (seed or "0").isdecimal() or int(n) == 0:
        raise UserError(f"Source synthetic:{text}: write synthetic:N, or synthetic:N:SEED, with whole numbers.")
    lines = (orjson.dumps(record) + b"\n" for record in synthetic_records(int(n), int(seed or "0")))
    return read_lines(lines, "synthetic", categories, tally, source="synthetic")


def _up_to(rows: Iterator[Row], last_day: date | None, tally: Tally) -> Iterator[Row]:
    """The rows submitted up to `last_day`, with progress shown."""
    with progress("ingest", None, "records") as bar:
        reported = 0
        for k, row in enumerate(rows):
            if k % 1000 == 0:
                bar.advance(tally.read - reported)
                reported = tally.read
            if last_day is not None and row.left_out != OTHER_CATEGORY and row.paper.date > last_day:
                tally.left_out[AFTER_CUT_OFF] += 1
                continue
            yield row


class _Counts:
    """The figures of the corpus itself, added up part by part."""

    def __init__(self) -> None:
        self.kept = self.withdrawn = 0
        self.left_out: Counter[str] = Counter()
        self.by_primary: Counter[str] = Counter()
        self.dates: list[date] = []

    def add(self, part: pa.Table, left_out: Counter[str]) -> None:
        self.left_out += left_out
        if part.num_rows:
            self.kept += part.num_rows
            self.withdrawn += pc.sum(part["withdrawn"]).as_py()
            for entry in pc.value_counts(part["primary"]).to_pylist():
                self.by_primary[entry["values"]] += entry["counts"]
            ends = pc.min_max(part["date"]).as_py()
            self.dates = [min([ends["min"], *self.dates]), max([ends["max"], *self.dates])]

    def write(self, path: Path, tally: Tally) -> None:
        counts: dict[str, Any] = tally.as_json()
        counts["kept"] = self.kept
        counts["withdrawn"] = self.withdrawn
        for reason in (REPEATED, DELETED, OTHER_CATEGORY):
            if self.left_out[reason]:
                counts["left_out"][reason] = counts["left_out"].get(reason, 0) + self.left_out[reason]
        counts["by_primary"] = dict(sorted(self.by_primary.items()))
        counts["dates"] = [d.isoformat() for d in self.dates]
        path.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")

    def why(self, tally: Tally) -> str:
        reasons = tally.left_out | Counter({OTHER_CATEGORY: self.left_out[OTHER_CATEGORY]}) | tally.refused
        listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "the source is empty"
        return listed + (f"; --categories names what to keep: it has {', '.join(tally.others)}" if tally.others else "")


def _keep_partial(folder: Path, out: Path) -> Path:
    """Move what was written to `OUT.partial`, where a person can look at it."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in folder.iterdir():
        os.replace(file, partial / file.name)
    return partial
