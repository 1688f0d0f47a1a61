"""Any corpus as JSON lines: one object a line with `id`, `text`, `date` and `category`; `title` where there is one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feyntune.artifacts.names import expand
from feyntune.artifacts.records import Paper, normal_form
from feyntune.ingestion.fields import BadRecord, CategoryFilter, Row, parse_date
from feyntune.ingestion.kaggle import load_object, open_blocks, read_lines
from feyntune.ingestion.tally import Tally

_ID = re.compile(r"\S{1,200}")
_CATEGORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9-]+)*")


def read_jsonl(path: str | Path, categories: CategoryFilter, tally: Tally) -> Iterator[Row]:
    """The records of a file (`.jsonl`, in a `.zip`, `.gz` or `.zst`) whose category is asked for.

    Raises:
        UserError: the file does not exist, holds something else, or is cut short.
    """
    path = expand(str(path))
    with open_blocks(path, tally) as blocks:
        yield from read_lines(blocks, path.name, categories, tally, parse=_row)


def _row(line: bytes) -> Row:
    record = load_object(line)
    identifier = record.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if not isinstance(identifier, str) or not _ID.fullmatch(identifier):
        raise BadRecord("no id" if identifier in (None, "") else "an id that is not one word of at most 200 characters")
    text = _text(record, "text", "abstract")
    if not text:
        raise BadRecord("no text")
    listed = _text_or_list(record, "categories", "category")
    if not listed:
        raise BadRecord("no category")
    if wrong := [c for c in listed if not _CATEGORY.fullmatch(c)]:
        raise BadRecord(f"a category that is not letters, digits, '-' and '.' ({wrong[0][:40]})")
    paper = Paper(
        id=identifier,
        primary=listed[0],
        categories=listed,
        title=_text(record, "title"),
        abstract=text,
        date=parse_date(record.get("date")),
        license=record.get("license") if isinstance(record.get("license"), str) else None,
        withdrawn=record.get("withdrawn") is True,
        source="jsonl",
    )
    updated = record.get("updated")
    return Row(paper, updated if isinstance(updated, str) else "")


def _text(record: dict[str, Any], *names: str) -> str:
    value = next((record[n] for n in names if record.get(n) is not None), "")
    return normal_form(value) if isinstance(value, str) else ""


def _text_or_list(record: dict[str, Any], *names: str) -> list[str]:
    value = next((record[n] for n in names if record.get(n) is not None), "")
    parts = value if isinstance(value, list) else [value]
    return " ".join(p for p in parts if isinstance(p, str)).split()
