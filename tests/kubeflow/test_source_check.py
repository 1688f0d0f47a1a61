import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from feyntune.errors import UserError
from feyntune.kubeflow.source_check import RECORDS, check_source
from feyntune.variants import load_mixtures

MINE = load_mixtures([{"name": "a", "parts": {"a": "all"}, "rule": "every a paper"}])


@pytest.fixture
def write(tmp_path: Path):
    def write(papers: int, category: str = "a", **more: Any) -> str:
        path = tmp_path / "papers.jsonl"
        lines = [
            json.dumps({"id": f"p{k}", "text": f"We study {k}.", "date": "2020-01-02", "category": category, **more})
            for k in range(papers)
        ]
        path.write_text("".join(f"{line}\n" for line in lines))
        return f"jsonl:{path}"

    return write


def look(source: str, mixtures=MINE, scored=("a",), categories=("a",), **options: Any) -> None:
    check_source(source, mixtures, {m.name for m in mixtures}, list(scored), categories=list(categories), **options)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ((0, "a"), "is empty"),
        ((1, "a"), "1 paper, too few: for mixture a train would be empty"),
        ((100, "b"), "100 of other categories, --categories names what to keep: b"),
        ((100, "not a category"), "100 of 100 records are bad"),
    ],
)
def test_a_source_that_cannot_do_is_refused(write, source, reason):
    with pytest.raises(UserError, match=reason):
        look(write(*source))


def test_enough_papers_pass(write):
    look(write(200))


def test_withdrawn_papers_do_not_count(write):
    with pytest.raises(UserError, match="all are withdrawn"):
        look(write(200, withdrawn=True))


def test_days_that_leave_nothing_are_refused(write):
    source = write(200)
    with pytest.raises(UserError, match="200 first submitted after the cut-off"):
        look(source, until=date(2020, 1, 1))
    with pytest.raises(UserError, match=r"no paper to train on: .* from 2020-01-02 to 2020-01-02"):
        look(source, after=date(2020, 1, 1))
    with pytest.raises(UserError, match="no paper to hold out"):
        look(source, after=date(2020, 1, 2))


def test_a_scored_category_without_papers_is_refused(write):
    with pytest.raises(UserError, match="none of q-bio falls into the test split"):
        look(write(200), scored=("a", "q-bio"))


def test_one_mixture_that_can_be_drawn_is_enough(write):
    other = load_mixtures([{"name": "b", "parts": {"b": "all"}, "rule": "every b paper"}])
    look(write(200), mixtures=[*MINE, *other])


def test_of_a_longer_source_only_the_beginning_is_read(write):
    source = write(RECORDS + 1, category="b")
    look(source)
    with Path(source.partition(":")[2]).open("a") as file:
        file.write("not JSON\n" * 10_000)
    look(source)


def test_generated_papers_are_looked_at_too():
    hep = [m for m in load_mixtures() if m.name == "hep-th"]
    with pytest.raises(UserError, match="synthetic:5 has 5 papers"):
        look("synthetic:5", hep, ("hep-th",), ("hep-th", "cs", "gr-qc", "hep-ph", "q-bio"))
    with pytest.raises(UserError, match=r"none of its 300 records can be used .* of other categories"):
        look("synthetic:300", hep, ("hep-th",), ("math.NT",))
