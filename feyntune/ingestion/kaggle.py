"""The Kaggle snapshot: one JSON object a line, plain or compressed, read as a stream.

With a choice of categories most lines are told apart by a search of their bytes and never decoded. The search
is exact: see `_to_decode`.
"""

import bz2
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import orjson
import pyarrow as pa

from feyntune.artifacts.names import local_file
from feyntune.errors import UserError
from feyntune.ingestion.fields import BadRecord, CategoryFilter, Row, is_category, make_paper
from feyntune.ingestion.tally import OTHER_CATEGORY, Tally

_DAMAGE = (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError)
_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 98: "PPMd"}
_BLOCK = 1 << 18  # bytes read at a time: they stay in the cache
_SPELLINGS = 100_000  # of `categories` remembered
_LONGEST_LINE = 1 << 24  # bytes; what is longer is no record, and would be held in memory whole


def read_kaggle(path: str | Path, categories: CategoryFilter, tally: Tally) -> Iterator[Row]:
    """The papers of a snapshot whose primary category is categories.

    A snapshot is a `.json` or `.jsonl` file, also in a `.zip`, `.gz`, `.bz2`, `.xz` or `.zst`.

    Lines that are no usable record are counted in `tally` with file, line and reason. Of a line that belongs
    to a category not asked for, nothing else is looked at.

    Raises:
        UserError: the file is not there, is not a snapshot (its first bytes say what it is instead), or is cut
            short.
    """
    path = local_file(str(path))
    with open_blocks(path, tally) as blocks:
        yield from read_lines(blocks, path.name, categories, tally)


@contextmanager
def open_blocks(path: Path, tally: Tally) -> Iterator[Iterator[bytes]]:
    """The file in blocks of whole lines; damage becomes a UserError."""
    with _open(path) as file:
        try:
            yield _blocks(file)
        except _DAMAGE as e:
            raise UserError(f"{path} is damaged or cut short after line {tally.read:,} ({e}): fetch it again.") from e


def read_lines(
    blocks: Iterable[bytes],
    name: str,
    categories: CategoryFilter,
    tally: Tally,
    source: str = "kaggle",
    parse: Callable[[bytes], Row] | None = None,
) -> Iterator[Row]:
    """The papers in `blocks` of whole lines; `name` is said where a line is bad.

    Raises:
        UserError: the last line is not JSON and has no end: the file was cut short.
    """
    before = number = 0  # lines of the blocks before, and of this one
    taken: dict[bytes, bool] = {}  # what was decided for each spelling of `categories`
    unended = 0  # number of a line that is not JSON and has no end
    for block in blocks:
        if not before:
            block = block.removeprefix(b"\xef\xbb\xbf")
        if unended:
            tally.bad(f"{name}:{unended}", _NOT_JSON)
        blank = unended = 0
        if len(taken) > _SPELLINGS:
            taken.clear()
        for number, start, end in _to_decode(block, categories, tally, taken):
            if start == end:
                continue
            line = block[start:end]
            try:
                row = parse(line) if parse else _row(line, source)
            except BadRecord as e:
                if line.isspace():
                    blank += 1
                elif str(e) == _NOT_JSON and not line.endswith(b"\n"):
                    unended = before + number
                else:
                    tally.bad(f"{name}:{before + number}", str(e))
                continue
            if categories.accepts(row.paper.primary):
                yield row
            else:
                tally.other(row.paper.primary)
        before += number
        tally.read -= blank
    if unended:
        raise UserError(f"{name} is cut short in line {unended:,}: fetch it again.")


_NOT_JSON = "not JSON"


def load_object(line: bytes) -> dict[str, Any]:
    """The object in a line. NaN, which pandas and json.dumps write for nothing, is null.

    Raises:
        BadRecord: it is not JSON, or not an object.
    """
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise BadRecord(_why_not_json(line)) from None
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            raise BadRecord(_NOT_JSON) from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    return record


def _why_not_json(line: bytes) -> str:
    try:
        text = line.decode().lstrip()
        _, end = json.JSONDecoder().raw_decode(text)
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return _NOT_JSON
    return "more than one JSON object on the line (or a comma after it)" if text[end:].strip() else _NOT_JSON


def _row(line: bytes, source: str) -> Row:
    get = load_object(line).get
    paper = make_paper(
        source=source,
        id=get("id"),
        categories=get("categories"),
        title=get("title"),
        abstract=get("abstract"),
        submitted=_first_version(get("versions")),
        comments=get("comments"),
        license=get("license"),
    )
    updated = get("update_date")
    return Row(paper, updated if isinstance(updated, str) else "")


def _first_version(versions: Any) -> Any:
    if isinstance(versions, list):
        for version in versions:
            if isinstance(version, dict) and version.get("version") == "v1":
                return version.get("created")
        if versions and all(isinstance(v, str) for v in versions):
            raise BadRecord("versions is a list of names without dates")
    return None


_KEY = b'"categories"'


def _to_decode(
    block: bytes, categories: CategoryFilter, tally: Tally, taken: dict[bytes, bool]
) -> Iterator[tuple[int, int, int]]:
    r"""Number in the block, start and end of every line that may hold a paper wanted; start == end ends the block.

    A line is passed over only if its key `categories` can be told from its bytes and has an unwanted value.
    Why that is certain: in valid JSON a quotation mark inside a string is written `\"`. So where
    `"categories"` is followed by a colon, its second mark ends a string and that string is a key; a backslash
    before the first mark (a longer key) sends the line to the decoder, and so does a second occurrence of
    `"categories"`, which would leave open which one counts. One thing is taken for granted: no object names the
    key again in another spelling, `"c\u0061tegories"`; no JSON writer does. `taken` remembers what was decided.
    """
    find, starts, read, left_out = block.find, block.startswith, tally.read, 0
    start = number = 0
    size = len(block)
    key = find(_KEY) if categories.names is not None else -1
    while start < size:
        end = find(b"\n", start) + 1 or size
        number += 1
        if start < key < end:
            at = key + 12
            again = find(_KEY, at)
            if not start < again < end and block[key - 1] != 92:
                at += 2 if starts(b':"', at) else 3 if starts(b': "', at) else 0
                value = block[at : find(b'"', at)] if at > key + 12 else b""
                keep = taken.get(value)
                if keep is None:
                    keep = taken[value] = _may_accept(value, categories)
                    if not keep:
                        tally.other(value.split(b" ")[0].decode("ascii", "replace"), 0)
                if not keep:
                    left_out += 1
                    start, key = end, again
                    continue
            while start < again < end:
                again = find(_KEY, again + 12)
            key = again
        tally.read = read + number
        yield number, start, end
        start = end
    tally.read = read + number
    if left_out:
        tally.left_out[OTHER_CATEGORY] += left_out
    yield number, size, size


def _may_accept(value: bytes, categories: CategoryFilter) -> bool:
    """Whether a line may be wanted whose `categories` are spelled so; yes where that is not plain to see."""
    words = value.split(None, 1)
    if not words or not value.isascii() or b"\\" in value or not is_category(words[0].decode("ascii")):
        return True
    return categories.accepts(words[0].decode("ascii"))


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The file in blocks that end where a line ends. A line longer than _LONGEST_LINE is cut."""
    while block := file.read(_BLOCK):
        yield block if block.endswith(b"\n") else block + file.readline(_LONGEST_LINE)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The lines of the file, unpacked on the way where it is compressed; its first bytes are looked at."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the file in it (arxiv-metadata-oai-snapshot.json).")
    if not path.is_file():
        state = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"{path} {state}: give the path of the Kaggle file (arxiv-metadata-oai-snapshot.json).")
    with path.open("rb") as raw:
        start = raw.read(6)
        raw.seek(0)
        file: Any
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):  # the second: a zip without files
            file = _member(path)
        elif start[:2] == b"\x1f\x8b":
            file = gzip.GzipFile(fileobj=raw)
        elif start[:3] == b"BZh":
            file = bz2.BZ2File(raw)
        elif start == b"\xfd7zXZ\0":
            file = lzma.LZMAFile(raw)  # noqa: SIM115
        elif start[:4] == b"\x28\xb5\x2f\xfd":
            file = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        else:
            file = raw
        with io.BufferedReader(file, 1 << 16) as buffered:
            try:
                _check_start(path, buffered.peek(512)[:512])
            except _DAMAGE as e:
                raise UserError(f"{path} is damaged ({e}): fetch it again.") from e
            yield buffered


def _member(path: Path) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as e:
        raise UserError(f"{path} is damaged or cut short ({e}): fetch it again.") from e
    members = [
        m
        for m in archive.infolist()
        if m.filename.lower().endswith((".json", ".jsonl"))
        and not m.filename.startswith("__MACOSX/")
        and not PurePosixPath(m.filename).name.startswith("._")
    ]
    snapshots = [m for m in members if PurePosixPath(m.filename).name == "arxiv-metadata-oai-snapshot.json"]
    chosen = snapshots if len(snapshots) == 1 else members
    if len(chosen) != 1:
        names = [m.filename for m in chosen or archive.infolist() if not m.is_dir()]
        listed = ", ".join(names[:5]) + (" …" if len(names) > 5 else "") or "nothing"
        raise UserError(f"{path} must hold one .json or .jsonl file (it holds: {listed}): unpack it, name the file.")
    member = chosen[0]
    if member.flag_bits & 1:
        raise UserError(f"{path} is protected by a password: unpack it, and name the file in it.")
    try:
        return archive.open(member)
    except (NotImplementedError, RuntimeError) as e:  # Deflate64, which Windows takes for files over 2 GB, and others
        method = _METHODS.get(member.compress_type, f"method {member.compress_type}")
        raise UserError(
            f"{path} is packed by {method}, which cannot be read here: unpack it, and name the file."
        ) from e
    except zipfile.BadZipFile as e:
        raise UserError(f"{path} is damaged ({e}): fetch it again.") from e


def _check_start(path: Path, start: bytes) -> None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    lowered = text.lower()
    if not text:
        raise UserError(f"{path} is empty: fetch it again.")
    if text.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file it stands for: run `git lfs pull`.")
    if lowered.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is an HTML page, saved in place of the file: fetch it again, signed in to Kaggle.")
    if text.startswith(b"<"):
        raise UserError(f"{path} is XML, not JSON lines: for an Atom feed write atom:{path}.")
    if text.startswith(b"["):
        raise UserError(f"{path} is one JSON array, not one object a line: rewrite it with `jq -c '.[]'`.")
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or text[:2] in (b"{\0", b"\0{"):
        raise UserError(f"{path} is UTF-16: rewrite it as UTF-8.")
    if text.split(b"\n", 1)[0].strip() == b"{":
        raise UserError(f"{path} has objects over several lines, not one a line: rewrite it with `jq -c .`.")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it, and name the file in it.")
    if not text.startswith(b"{"):
        what = next((f"is {name}" for magic, name in _KINDS.items() if text.startswith(magic)), None)
        what = what or f"begins with {text[:20].decode(errors='replace')!r}"
        raise UserError(f"{path} {what}, not JSON lines, which begin with {{: give such a file.")


_KINDS = {
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF",
    b"SQLite format": "an SQLite database",
    b"\x1f\x8b": "compressed twice",
    b"PK\x03\x04": "a zip in a compressed file",
    b"\x80\x04": "a Python pickle",
}
