import unicodedata
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.artifacts import records
from feyntune.artifacts.records import normal_form
from feyntune.errors import UserError
from feyntune.ingestion.fields import SUCCESSORS, BadRecord, CategoryFilter, make_paper, parse_date, parse_id


def paper(**changes):
    fields = {
        "source": "kaggle",
        "id": "0704.0001",
        "categories": "hep-th",
        "title": "A title",
        "abstract": "  We study\nbranes.\n",
        "submitted": "Mon, 2 Apr 2007 19:18:42 GMT",
    }
    return make_paper(**fields | changes)


def test_text_is_in_normal_form():
    made = paper(title="Long\n  title", abstract="  First line\nsecond.\n  New paragraph with e\u0301.\n")
    assert made.title == "Long title"
    assert made.abstract == "First line second. New paragraph with é."


@pytest.mark.parametrize("dead", sorted(SUCCESSORS))
def test_dead_archives_are_mapped_to_their_successor(dead):
    made = paper(categories=f"{dead} hep-th")
    assert made.primary == SUCCESSORS[dead]
    assert made.categories == [dead, "hep-th"]


def test_an_archive_takes_its_categories_and_nothing_that_only_looks_like_it():
    cs, bio, exact = CategoryFilter(["cs"]), CategoryFilter(["q-bio"]), CategoryFilter(["cs.LG"])
    assert all(cs.accepts(c) for c in ("cs", "cs.LG", "cmp-lg"))  # cmp-lg was replaced by cs.CL
    assert not any(cs.accepts(c) for c in ("physics.optics", "physics.comp-ph", "math-cs", "csx.LG", "econ.cs"))
    assert [bio.accepts(c) for c in ("q-bio", "q-bio.NC", "bio.NC")] == [True, True, False]
    assert [exact.accepts(c) for c in ("cs.LG", "cs", "cs.LGX")] == [True, False, False]
    assert CategoryFilter(None).accepts("anything")


@pytest.mark.parametrize("names", [["hep th"], ["chao-dyn"], [], [""], ["hep-th", "CS"]])
def test_names_that_can_match_nothing_are_refused(names):
    with pytest.raises(UserError):
        CategoryFilter(names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0704.0001", "0704.0001"),
        ("2501.12345", "2501.12345"),
        ("hep-th/9901001", "hep-th/9901001"),
        ("math.GT/0309136", "math/0309136"),
    ],
)
def test_identifiers_have_one_spelling(text, expected):
    assert parse_id(text) == expected


@pytest.mark.parametrize(
    "text", ["704.0001", 704.0001, None, "", "0704.0001v2", "../etc/passwd", "hep-th/99010011", "٠٧٠٤.0001"]
)
def test_what_is_no_identifier_is_refused(text):
    with pytest.raises(BadRecord):
        parse_id(text)


@pytest.mark.parametrize(
    "text", ["Mon, 2 Apr 2007 19:18:42 GMT", "Mon, 02 Apr 2007 19:18:42 GMT", "2007-04-02", "2007-04-02T19:18:42Z"]
)
def test_every_source_spells_a_date_its_own_way(text):
    assert parse_date(text) == date(2007, 4, 2)


@pytest.mark.parametrize("text", [None, "", "2007-13-02", "Mon, 31 Feb 2007 00:00:00 GMT", "2 Foo 2007", 20070402])
def test_what_is_no_date_is_refused(text):
    with pytest.raises(BadRecord):
        parse_date(text)


def test_withdrawn_papers_are_marked():
    assert paper(comments="This paper has been WITHDRAWN by the author").withdrawn
    assert paper(abstract="This paper has been withdrawn.").withdrawn
    assert not paper(comments="12 pages").withdrawn


@pytest.mark.parametrize("field", ["id", "categories", "title", "abstract", "submitted"])
@pytest.mark.parametrize("value", [None, "", "  \n", 7])
def test_a_record_without_a_field_it_needs_is_refused(field, value):
    with pytest.raises(BadRecord):
        paper(**{field: value})


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(" \n\t\x1c\x85\u00a0\u200b\ufeffe\u0301\x00$\\"))))
def test_the_short_ways_to_the_normal_form_give_what_the_long_way_gives(text):
    long_way = " ".join(unicodedata.normalize("NFC", records._CONTROL.sub("", text)).split())
    assert normal_form(text) == long_way
    assert normal_form(long_way) == long_way
