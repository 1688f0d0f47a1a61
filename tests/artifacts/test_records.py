import unicodedata

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from feyntune.artifacts.records import SCHEMA, SOURCES, Paper, normal_form


def test_a_paper_is_a_row_of_the_schema():
    assert Paper._fields == tuple(SCHEMA.names)
    assert SCHEMA.metadata[b"text_form"]
    paper = Paper("hep-th/9901001", "hep-th", ["hep-th"], "T", "A", None, None, False, "kaggle")
    assert paper.source in SOURCES


def test_every_run_of_white_space_is_one_space():
    assert normal_form("  We show\n  that $x$\t is\r\n\u00a0small. \n") == "We show that $x$ is small."


def test_invisible_characters_go_and_composed_ones_are_one():
    assert normal_form("e\u0301\ufeff a\u200bb\x00c") == "\u00e9 abc"


@given(st.text())
def test_the_normal_form_is_idempotent_and_clean(text):
    normal = normal_form(text)
    assert normal_form(normal) == normal
    assert unicodedata.is_normalized("NFC", normal)
    assert normal == " ".join(normal.split())


def test_the_schema_refuses_a_paper_without_an_id():
    assert not SCHEMA.field("id").nullable
    assert SCHEMA.field("license").nullable
    assert SCHEMA.field("date").type == pa.date32()
