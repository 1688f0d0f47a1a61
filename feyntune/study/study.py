"""A blind study: people score completions without knowing whose they are.

`make` draws papers and writes one sheet a rater (`study`), and apart from it the key that says whose completion each
item is (`study-key`). Raters fill in the sheets, or the page of study_page.py does. `score` checks what came back and
computes what study_figures.py defines (`study-result`).
"""

import csv
import io
import json
import math
import random
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, field_validator

from feyntune.artifacts.artifact import Manifest, open_artifact, write_artifact
from feyntune.artifacts.completions import CompletionFilter, read_completions
from feyntune.errors import UserError
from feyntune.names import BASE
from feyntune.study.figures import figures, markdown

RENAMED = {"beginning": "prompt"}  # columns before 0.2
LETTERS = "abcdefghjkmnpqrstuvwxyz"  # of names: spreadsheets turn 885588040149 and 12e4567 into other numbers
SCALE = (1, 10)  # FeynTune's
FIELDS = ["study", "rater", "number", "item", "prompt", "reference", "continuation", "score", "comment"]
KEY = pa.schema([pa.field(c, pa.string(), nullable=False) for c in ("rater", "item", "id", "primary", "system")])
RATINGS = pa.schema([*KEY, pa.field("score", pa.int32(), nullable=False), pa.field("comment", pa.string())])

RUBRIC = (
    "You see the first part of an abstract and a continuation of it. Score the continuation from 1 to 10. 1: unrelated "
    "to the first part, incoherent, or plainly wrong. 10: could stand in the published abstract: it follows from the "
    "first part, what it claims is physically meaningful and right as far as you can tell, and style and notation are "
    "those of the field. Length alone is no merit."
)


class StudyConfig(BaseModel):
    """Who scores what.

    Attributes:
        raters: short names, better not the people's own: they stand in the results.
        papers: drawn at random; `common` of them are scored by all raters, the others by one each. By default 25 and
            5, or fewer where all systems completed fewer; the key says how many.
        filter: which completions.
        show_reference: show the reference continuation. FeynTune does not say whether its raters saw it.
        rubric: what raters are told.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    raters: list[str] = Field(min_length=1)
    papers: int | None = Field(
        None,
        ge=1,
        description="Papers drawn; by default 25, or as many as all systems completed where those are fewer.",
    )
    common: int | None = Field(
        None, ge=0, description="Of them, those that all raters score; by default 5, or all where those are fewer."
    )
    filter: CompletionFilter = CompletionFilter()
    show_reference: bool = False
    rubric: str = RUBRIC

    @field_validator("raters")
    @classmethod
    def _file_names(cls, raters: list[str]) -> list[str]:
        for rater in raters:
            if not rater.replace("-", "").replace("_", "").isalnum() or not rater.isascii() or len(rater) > 40:
                raise ValueError(f"rater {rater!r}: use up to 40 letters, digits, - and _")
        if len({r.lower() for r in raters}) < len(raters):
            raise ValueError("two raters have the same name")
        return raters


def make(
    folders: Sequence[str | Path],
    out: str | Path,
    key: str | Path,
    config: StudyConfig,
    seed: int | None = None,
    systems: Sequence[str] = (),
) -> Manifest:
    """Write a sealed `study` (sheets/RATER.csv, study.json) and, apart, its sealed `study-key`.

    A rater scores all systems of a paper one after the other, as FeynTune's did; papers and systems come in a random
    order of the rater's own, and items have random names. Whoever has the key, or the seed and the completions, knows
    whose they are: keep the key away from raters.

    Args:
        folders: sealed `evaluation` and `answers` folders on one test set, the base's among them.
        seed: of all draws; a fresh one by default. It is kept in the key.
        systems: those to show beside the base; all by default.

    Raises:
        UserError: see read_completions; fewer papers than asked for; an unknown system; an output folder is not empty.
    """
    out, key = Path(out), Path(key)
    if key.resolve() == out.resolve() or out.resolve() in key.resolve().parents:
        raise UserError(f"{key} lies within {out}, which raters get: keep the key in a folder apart.")
    for place in (out, key):
        if place.exists() and any(place.iterdir()):
            raise UserError(f"{place} is not empty: a study is never overwritten, choose another folder.")
    given = read_completions(folders, config.filter)
    for name in systems:
        if name not in given.texts:
            raise UserError(f"There are no completions of {name}, only of {', '.join(given.texts)}.")
    shown = [name for name in given.texts if not systems or name in systems or name == BASE]
    count = min(25, len(given.papers)) if config.papers is None else config.papers
    common_count = min(5, count) if config.common is None else config.common
    if len(given.papers) < count:
        raise UserError(f"All systems completed {len(given.papers)} papers, not {count}: ask for fewer.")
    if common_count > count:
        raise UserError(f"{common_count} common papers are more than all {count}: ask for fewer.")

    seed = secrets.randbits(63) if seed is None else seed
    draw = random.Random(seed)
    papers = draw.sample(sorted(given.papers), count)
    common, single = papers[:common_count], papers[common_count:]
    name = "".join(draw.choices(LETTERS, k=12))
    used: set[str] = set()
    sheets: dict[str, list[dict[str, Any]]] = {}
    hidden: list[dict[str, str]] = []
    for turn, rater in enumerate(config.raters):
        assigned = common + single[turn :: len(config.raters)]
        draw.shuffle(assigned)
        sheets[rater] = []
        for identifier in assigned:
            passage = given.papers[identifier]
            for system in draw.sample(shown, len(shown)):
                item = _fresh(draw, used)
                hidden.append(
                    {"rater": rater, "item": item, "id": identifier, "primary": passage.primary, "system": system}
                )
                sheets[rater].append(
                    {
                        "study": name,
                        "rater": rater,
                        "number": len(sheets[rater]) + 1,
                        "item": item,
                        "prompt": _cell(f"{passage.prompt} …"),
                        "reference": _cell(f"… {passage.reference.strip()}") if config.show_reference else "",
                        "continuation": f"… {given.texts[system][identifier].strip() or '(nothing was written)'}",
                        "score": "",
                        "comment": "",
                    }
                )
    hidden.sort(key=lambda r: r["item"])
    settings = {"study": name, "seed": seed, "systems": shown, **config.model_dump(mode="json")}
    settings |= {"papers": count, "common": common_count}
    inputs = {k: v for k, v in given.inputs().items() if k == "test" or k.removeprefix("completions of ") in shown}
    with write_artifact(key, "study-key", inputs, settings) as folder:
        pq.write_table(pa.Table.from_pylist(hidden, KEY), folder.path / "key.parquet")
    sealed_key = open_artifact(key, "study-key")
    public = {"study": name, "raters": config.raters, "scale": list(SCALE), "rubric": config.rubric}
    with write_artifact(out, "study", {"key": sealed_key.digest}, {"study": name}) as folder:
        (folder.path / "sheets").mkdir()
        for rater, rows in sheets.items():
            (folder.path / "sheets" / f"{rater}.csv").write_text(sheet(rows), encoding="utf-8-sig", newline="")
        (folder.path / "study.json").write_text(
            json.dumps(public, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return open_artifact(out, "study")


def _fresh(draw: random.Random, used: set[str]) -> str:
    """A random name."""
    while True:
        item = "".join(draw.choices(LETTERS, k=8))
        if item not in used:
            used.add(item)
            return item


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f" {text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def sheet(rows: Iterable[dict[str, Any]]) -> str:
    """A sheet as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Problem(BaseModel):
    """What is wrong with one field of one row of a returned sheet."""

    file: str
    line: int
    field: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}, {self.field}: {self.fix}."


def read_sheet(path: Path) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a sheet as any spreadsheet saves it in any language.

    Separators are commas, semicolons or tabs; a first line `sep=;` is skipped; UTF-8 and UTF-16 are read with and
    without a byte order mark, and what is neither as Windows-1252 (only comments can differ).

    Raises:
        UserError: the file cannot be read, has no header, or a column is missing.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}.") from e
    if raw.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} is a spreadsheet, not CSV: save it as CSV UTF-8.")
    text = _decode(raw)
    skipped = 0
    if re.match(r"sep=.\r?\n", text):
        text, skipped = text.partition("\n")[2], 1
    header = text.lstrip("\ufeff").partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    missing = [f for f in ("study", "rater", "item", "score") if f not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path}, line 1: the column {missing[0]} is missing: keep the sheet's columns as they were.")
    rows, line = [], reader.line_num
    for row in reader:
        # A cell may hold line breaks: the row begins after the row before it.
        rows.append(
            (
                skipped + line + 1,
                {RENAMED.get(k, k): v or "" for k, v in row.items() if isinstance(v, str | None) and k},
            )
        )
        line = reader.line_num
    return rows


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    if b"\0" in raw[:200]:
        return raw.decode("utf-16-be" if raw[:1] == b"\0" else "utf-16-le", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def check(
    sheets: Sequence[Path], study: str, items: dict[str, dict[str, str]]
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Scores in returned sheets, and everything that is wrong with them. A row without a score is neither.

    Args:
        study: the name of the study. items: rows of its key by item.
    """
    scored: dict[str, dict[str, Any]] = {}
    seen: dict[str, tuple[str, int]] = {}
    problems = []
    for path in sheets:
        for line, row in read_sheet(path):
            where = {"file": str(path), "line": line}
            bad = lambda field, fix, where=where: problems.append(Problem(**where, field=field, fix=fix))
            item = row["item"].strip()
            if not _same(row["study"], study):
                bad("study", f"{row['study'].strip()!r} is another study than {study}, return the sheet of this one")
            elif item not in items:
                bad("item", f"{item!r} is not in the study, restore the name from the sheet handed out")
            elif not _same(row["rater"], items[item]["rater"]):
                bad("rater", f"item {item} belongs to {items[item]['rater']}, restore the name")
            elif item in seen:
                bad("item", "{} is there already ({}, line {}), remove one of the rows".format(item, *seen[item]))
            else:
                seen[item] = (str(path), line)
                score = _score(row["score"])
                if isinstance(score, str):
                    bad("score", score)
                elif score is not None:
                    scored[item] = {**items[item], "score": score, "comment": row.get("comment") or None}
    return [scored[item] for item in sorted(scored)], problems


def _same(cell: str, name: str) -> bool:
    """Whether a cell is `name`, perhaps as a spreadsheet writes it: 01 as 1, 885588040149 as 8,85588E+11."""
    cell = cell.strip()
    if cell == name:
        return True
    try:
        number, expected = float(cell.replace(",", ".")), float(name)
    except ValueError:
        return False
    return math.isfinite(expected) and math.isclose(number, expected, rel_tol=1e-5)


def _score(text: str) -> int | str | None:
    """The score in a cell, what is wrong with it, or None for an empty cell."""
    text = text.strip()
    if not text:
        return None
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = float("nan")
    if not value.is_integer() or not SCALE[0] <= value <= SCALE[1]:
        return f"{text!r} is not a whole number from {SCALE[0]} to {SCALE[1]}, correct it or leave it empty"
    return int(value)


def score(
    study: str | Path,
    key: str | Path,
    sheets: Sequence[str | Path],
    out: str | Path,
    resamples: int = 9999,
    seed: int = 1,
) -> Manifest:
    """Check returned sheets and compute their figures into a sealed `study-result`.

    It holds ratings.parquet (columns RATINGS), summary.json (see study_figures.figures) and summary.md.

    Args:
        sheets: returned CSV files, or folders of them.

    Raises:
        UserError: the key is another study's; no sheet; any bad row (all are named: file, line, field, fix), since
            a row left out in silence would change the figures; no score at all, or none of the base.
    """
    sealed, hidden = open_artifact(study, "study"), open_artifact(key, "study-key")
    if sealed.inputs["key"] != hidden.digest:
        raise UserError(f"{key} is not the key of {study}: give the key that was made with it.")
    files = [f for s in map(Path, sheets) for f in (sorted(s.glob("*.csv")) if s.is_dir() else [s])]
    if not files:
        raise UserError("There is no sheet to score: give the returned CSV files or their folder.")
    items = {r["item"]: r for r in pq.read_table(Path(key) / "key.parquet").to_pylist()}
    ratings, problems = check(files, hidden.config["study"], items)
    if problems:
        shown = "\n".join(f"  {p}" for p in problems[:100])
        more = f"\n  and {len(problems) - 100} more" if len(problems) > 100 else ""
        raise UserError(f"{len(problems)} row(s) of the sheets cannot be read, nothing was scored:\n{shown}{more}")
    if not any(r["system"] == BASE for r in ratings):
        raise UserError("No completion of the base has a score yet: there is nothing to compare with.")
    config = {**hidden.config, "resamples": resamples, "bootstrap_seed": seed}
    summary = figures(ratings, items, config)
    inputs = {**hidden.inputs, "study": sealed.digest, "key": hidden.digest}
    with write_artifact(out, "study-result", inputs, config) as folder:
        pq.write_table(pa.Table.from_pylist(ratings, RATINGS), folder.path / "ratings.parquet")
        (folder.path / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        (folder.path / "summary.md").write_text(markdown(summary), encoding="utf-8")
    return open_artifact(out, "study-result")
