from datetime import date

import pytest

from feyntune.errors import UserError
from feyntune.ingestion.atom import read_atom
from feyntune.ingestion.fields import CategoryFilter
from feyntune.ingestion.tally import Tally

FEED = """<?xml version="1.0" encoding="UTF-8"?>
<feed xmlns="http://www.w3.org/2005/Atom" xmlns:arxiv="http://arxiv.org/schemas/atom">
<title>answer</title>
{}
</feed>
"""
ENTRY = """<entry><id>http://arxiv.org/abs/{id}</id><title>On\n  branes</title>
<updated>2020-02-03T00:00:00Z</updated><published>2019-01-02T10:00:00Z</published>
<summary>  {summary}\n</summary><arxiv:comment>{comment}</arxiv:comment>
<category term="gr-qc"/><category term="hep-th"/><category term="81T30"/><category term="I.2.6; F.1"/>
<arxiv:primary_category term="{primary}"/></entry>"""


def entry(id="1901.00001v2", summary="A $\\alpha$ text\nin lines.", comment="9 pages", primary="hep-th"):
    return ENTRY.format(id=id, summary=summary, comment=comment, primary=primary)


def read(path, text, names=None):
    path.write_text(text)
    tally = Tally()
    return [r.paper for r in read_atom(path, CategoryFilter(names), tally)], tally


def test_an_entry_becomes_a_paper(tmp_path):
    [paper], _ = read(tmp_path / "a.xml", FEED.format(entry()))
    assert paper.id == "1901.00001"
    assert paper.primary == "hep-th"
    assert paper.categories == ["hep-th", "gr-qc"]
    assert paper.title == "On branes"
    assert paper.abstract == "A $\\alpha$ text in lines."
    assert paper.date == date(2019, 1, 2)


def test_old_ids_lose_only_their_version(tmp_path):
    papers, _ = read(tmp_path / "a.xml", FEED.format(entry(id="hep-th/9901001v3") + entry(id="math/0309136")))
    assert [p.id for p in papers] == ["hep-th/9901001", "math/0309136"]


def test_the_lead_of_an_rss_abstract_is_cut_off(tmp_path):
    [paper], _ = read(
        tmp_path / "a.xml", FEED.format(entry(summary="arXiv:2609.38209v1 Announce Type: new Abstract: The text."))
    )
    assert paper.abstract == "The text."


def test_bad_entries_are_counted_with_their_line_and_others_left_out(tmp_path):
    text = FEED.format(entry(id="nonsense") + entry() + entry(id="1901.00002v1", primary="cs.LG"))
    papers, tally = read(tmp_path / "a.xml", text, ["hep-th"])
    assert len(papers) == 1
    assert tally.read == 3
    assert list(tally.examples) == ["not an arXiv id"]
    assert tally.left_out == {"other primary category": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (FEED.format(entry()).rpartition("</feed>")[0][:-40], "not whole XML"),
        ("<html><body>Rate exceeded</body></html>", "page of <html>"),
        ("Rate exceeded.", "not whole XML"),
        ("", "not whole XML"),
        (
            FEED.format(
                "<entry><id>https://arxiv.org/api/errors#x</id><title>Error</title><summary>bad id</summary></entry>"
            ),
            "error message .bad id",
        ),
    ],
)
def test_what_is_no_whole_feed_is_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read(tmp_path / "a.xml", text)


def test_a_wrong_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_atom(tmp_path / "nothing", CategoryFilter(None), Tally()))
