"""Any corpus as JSON lines: one object a line with `id`, `text`, `date` and `category`; `title` where there is one."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feyntune.artifacts.names import local_file
from feyntune.artifacts.records import Paper, normal_form
from feyntune.ingestion.fields import BadRecord, CategoryFilter, Row, is_category, parse_date
from feyntune.ingestion.kaggle import load_object, open_blocks, read_lines
from feyntune.ingestion.tally import Tally

_ID = re.compile(r"\S{1,200}")


def read_jsonl(path: str | Path, categories: CategoryFilter, tally: Tally) -> Iterator[Row]:
    """The records of a file (`.jsonl`, in a `.zip`, `.gz`, `.bz2`, `.xz` or `.zst`) whose category is asked for.

    Raises:
        UserError: the file does not exist, holds something else, or is cut short.
    """
    path = local_file(str(path))
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
    listed = _listed(record)
    if not listed:
        raise BadRecord("no category")
    if wrong := [c for c in listed if not is_category(c)]:
        raise BadRecord(f"a category that is not letters, digits, '-' and '.' ({wrong[0][:40]})")
    paper = Paper(
        id=identifier,
        primary=listed[0],
        categories=listed,
        title=_text(record, "title"),
        abstract=text,
        date=parse_date(record.get("date")),
        license=record.get("license") if isinstance(record.get("license"), str) else None,
        withdrawn=str(record.get("withdrawn")).lower() in ("true", "1"),
        source="jsonl",
    )
    updated = record.get("updated")
    return Row(paper, updated if isinstance(updated, str) else "")


def _text(record: dict[str, Any], *names: str) -> str:
    value = next((record[n] for n in names if record.get(n) is not None), "")
    return normal_form(value) if isinstance(value, str) else ""


def _listed(record: dict[str, Any]) -> list[str]:
    """`categories`, a list or a text of words as arXiv has it, else `category`, which is one."""
    given = record.get("categories")
    if isinstance(given, str):
        return given.split()
    value = record.get("category") if given is None else given
    parts = value if isinstance(value, list) else [value]
    return [p.strip() for p in parts if isinstance(p, str) and p.strip()]
