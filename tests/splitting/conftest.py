"""Corpora for the split's tests, written here rather than by the ingest room."""

from collections.abc import Callable, Iterable
from datetime import date
from email.utils import parsedate_to_datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.records import SCHEMA, Paper, normal_form
from feyntune.ingestion.synthetic import synthetic_records


def paper(id: str, abstract: str, primary: str = "hep-th", day: str = "2001-01-01", withdrawn: bool = False) -> Paper:
    first = date.fromisoformat(day)
    return Paper(id, primary, [primary], "A title", normal_form(abstract), first, None, withdrawn, "synthetic")


def synthetic_papers(n: int, seed: int = 0) -> list[Paper]:
    papers = []
    for r in synthetic_records(n, seed):
        first = parsedate_to_datetime(r["versions"][0]["created"]).date()
        withdrawn = "withdrawn" in f"{r['comments']} {r['abstract']}".lower()
        categories = r["categories"].split()
        title, abstract = normal_form(r["title"]), normal_form(r["abstract"])
        papers.append(Paper(r["id"], categories[0], categories, title, abstract, first, None, withdrawn, "synthetic"))
    return papers


def write_corpus(folder: Path, papers: Iterable[Paper]) -> Path:
    rows = [p._asdict() for p in sorted(papers)]
    with write_artifact(folder, "corpus") as tmp:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp.path / "papers.parquet")
    return folder


@pytest.fixture
def corpus(tmp_path) -> Callable[[Iterable[Paper]], Path]:
    """Writes papers as a sealed corpus and returns its folder; each call makes another."""
    made = []

    def write(papers: Iterable[Paper]) -> Path:
        made.append(write_corpus(tmp_path / f"corpus-{len(made)}", papers))
        return made[-1]

    return write
