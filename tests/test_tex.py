"""Formulas of abstracts as MathML: set where they can be read, raw where not, and never markup of their own."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.tex import mark_words, set_formulas

pytest.importorskip("latex2mathml")  # of the locks; an environment of before has no formulas to set


def test_formulas_are_set_with_their_source() -> None:
    page = set_formulas(r"the $AdS_5$ of \(\alpha<1\)")
    assert page.count("<math") == 2
    assert "<msub><mi>S</mi><mn>5</mn></msub>" in page
    assert 'title="AdS_5"' in page
    assert "<mi>α</mi>" in page


@pytest.mark.parametrize("text", ["costs $5 and $6 a day", r"$\unknowncommand x$", r"$\frac{1$", r"a \$ sign"])
def test_what_is_no_formula_stays_as_written(text: str) -> None:
    assert set_formulas(text) == text


def test_marks_move_out_of_a_formula() -> None:
    page = mark_words([("of", False), ("the $a", True), ("+ b$ end", False)])
    assert page.startswith("of <mark>the <math")
    assert page.endswith("</math></mark> end")
    assert mark_words([("the", False), ("a <b>", True)]) == "the <mark>a &lt;b&gt;</mark>"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)


@given(st.text(alphabet="$\\{}_^ab<>&;\"'= scriptfrac", max_size=60))
def test_no_text_becomes_markup(text: str) -> None:
    parser = _Tags()
    parser.feed(set_formulas(text))
    assert all(tag.startswith("m") for tag in parser.tags)  # MathML


def test_a_script_in_a_formula_is_text() -> None:
    assert "<script" not in set_formulas("$<script>alert(1)</script>$ $&lt;script&gt;$")
