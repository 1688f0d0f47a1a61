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
    return [r.paper for r in read_atom(path, CategoryFilter(names), tally, converted_text=True)], tally


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


def test_an_answer_of_the_api_holds_converted_text_and_is_refused_unless_asked_for(tmp_path):
    [paper], _ = read(tmp_path / "a.xml", FEED.format(entry()))
    assert paper.source == "atom-api"
    with pytest.raises(UserError, match=r"turns TeX into Unicode.*--converted-text"):
        list(read_atom(tmp_path / "a.xml", CategoryFilter(None), Tally()))


def test_a_daily_feed_holds_the_authors_tex_and_its_replacements_are_left_out(tmp_path):
    entries = "".join(
        f"<entry><id>oai:arXiv.org:2601.0000{i}v{i}</id><title>On branes</title><published>2026-01-02T00:00:00-05:00"
        f"</published><summary>arXiv:2601.0000{i}v{i} Announce Type: {kind} \nAbstract: An $\\alpha$ text.</summary>"
        f'<category term="hep-th"/><arxiv:announce_type>{kind}</arxiv:announce_type></entry>'
        for i, kind in enumerate(("new", "cross", "replace", "replace-cross"), 1)
    )
    (tmp_path / "a.xml").write_text(FEED.format(entries))
    tally = Tally()
    papers = [r.paper for r in read_atom(tmp_path / "a.xml", CategoryFilter(None), tally)]
    assert [(p.id, p.source, p.abstract) for p in papers] == [
        ("2601.00001", "atom-feed", "An $\\alpha$ text."),
        ("2601.00002", "atom-feed", "An $\\alpha$ text."),
    ]
    assert tally.left_out.total() == 2


def test_an_rss_feed_is_sent_to_its_atom_form(tmp_path):
    (tmp_path / "a.xml").write_text("<rss version='2.0'><channel/></rss>")
    with pytest.raises(UserError, match=r"RSS feed: save the Atom feed, https://rss\.arxiv\.org/atom"):
        list(read_atom(tmp_path / "a.xml", CategoryFilter(None), Tally()))
