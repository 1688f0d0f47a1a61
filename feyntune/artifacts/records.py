"""The canonical record of a paper: one schema and one text normal form, whatever the source."""

import re
import unicodedata
from datetime import date
from typing import NamedTuple

import pyarrow as pa

# Two corpora compare only under the same version: the digest of every corpus covers this string.
TEXT_FORM = "feyntune-text-1"

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # "0704.0001", "hep-th/9901001"; never a version
        pa.field("primary", pa.string(), nullable=False),  # first category, after dead archives are mapped
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("abstract", pa.string(), nullable=False),  # in TEXT_FORM
        pa.field("date", pa.date32(), nullable=False),  # of version 1
        pa.field("license", pa.string()),  # about the paper; arXiv's metadata is CC0
        pa.field("withdrawn", pa.bool_(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # one of SOURCES
    ],
    metadata={"text_form": TEXT_FORM},
)

# Where a record came from, and whether its text is the author's TeX (True) or a Unicode rendering of it.
# "atom" (before 0.2) may be either.
SOURCES = {
    "kaggle": True,
    "oai-arXivRaw": True,
    "oai-arXiv": False,
    "atom-feed": True,
    "atom-api": False,
    "atom": True,
    "jsonl": True,
    "synthetic": True,
}


class Paper(NamedTuple):
    """One row of SCHEMA."""

    id: str
    primary: str
    categories: list[str]
    title: str
    abstract: str
    date: date
    license: str | None
    withdrawn: bool
    source: str


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\u200b]")


def normal_form(text: str) -> str:
    r"""`text` in TEXT_FORM: NFC, no control characters, every run of white space one space, no ends.

    A newline followed by indentation (arXiv's paragraph break) becomes a space too: arXiv's newer server
    stores no newlines, so keeping them would make the text depend on the source. Idempotent.
    """
    line = text.strip().replace("\n", " ")
    if line.isascii() and line.isprintable() and "  " not in line:  # most abstracts: nothing else could change
        return line
    spaced = " ".join(unicodedata.normalize("NFC", text).split())
    if spaced.isprintable():  # no control characters
        return spaced
    return " ".join(unicodedata.normalize("NFC", _CONTROL.sub("", text)).split())
