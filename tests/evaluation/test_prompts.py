import math
import re

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.artifacts.records import normal_form
from feyntune.evaluation.prompts import cut, sample_papers, sentences


def papers_rule(text):
    """FeynTune's rule as its authors state it, written a second time."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    parts = parts if len(parts) > 1 else text.split()
    half = math.ceil(len(parts) / 2)
    return " ".join(parts[:half]), " ".join(parts[half:])


@given(st.text(alphabet="ab.!? $\n", min_size=1))
def test_the_papers_rule_is_the_papers(text):
    text = normal_form(text)
    assert cut(text, "paper") == papers_rule(text)


@given(st.text(alphabet="aG.!?() ${}\"'\n", min_size=1), st.sampled_from(["paper", "careful"]))
def test_prompt_and_rest_put_together_are_the_text(text, rule):
    text = normal_form(text)
    prompt, rest = cut(text, rule)
    assert f"{prompt} {rest}".strip() == text
    assert " ".join(sentences(text, rule)) == text
    if " " in text:
        assert prompt
        assert rest


def test_half_of_the_sentences_rounded_up_and_half_of_the_words_of_a_single_one():
    assert cut("One. Two! Three?", "paper") == ("One. Two!", "Three?")
    assert cut("a b c d e", "paper") == ("a b c", "d e")
    assert cut("Word.", "careful") == ("Word.", "")


@pytest.mark.parametrize(
    "text",
    [
        "This holds in general, i.e. for all groups.",
        "It was shown by Smith et al. [Phys. Rev. D 12 (1999) 3] for one loop.",
        "A talk in memory of G. Segal and J. C. Ward on knots.",
        "We set $a = b. C$ where needed.",
        "See the discussion in {\\em loc. cit. Part} for details.",
        "We compare with Ref. 12 and Eq. (3) below.",
        "Lattice sizes vs. temperature are shown.",
    ],
)
def test_the_careful_rule_sees_one_sentence_where_the_papers_sees_more(text):
    assert len(sentences(text, "paper")) > 1
    assert sentences(text, "careful") == [text]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("We study the lattice L.", "The dual theory follows."),
        ("It costs $n$.", "Thus $m$ is free."),
        ('This opens a "mass gap."', "Our strategy is new."),
        ("It was found by Smith et al.", "We extend it."),
        ("Is it finite?", "Yes."),
        ("It vanishes (at one loop.)", "Two loops differ."),
    ],
)
def test_the_careful_rule_still_ends_sentences(first, second):
    assert sentences(f"{first} {second}", "careful") == [first, second]


def test_papers_are_chosen_by_their_ids_alone():
    ids = [f"hep-th/{9901001 + i}" for i in range(200)]
    table = lambda names: pa.table({"id": pa.array(names, pa.string())})
    some = sample_papers(table(ids), 20)["id"].to_pylist()
    assert some == sorted(some)
    assert some == sample_papers(table(ids[::-1]), 20)["id"].to_pylist()
    more = [*ids, *(f"hep-th/{9902001 + i}" for i in range(20))]
    moved = set(some) - set(sample_papers(table(more), 20)["id"].to_pylist())
    assert len(moved) <= 6  # a tenth more papers take about a tenth of the places
    assert set(sample_papers(table(ids), 5)["id"].to_pylist()) < set(some)
