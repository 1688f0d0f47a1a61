"""Texts far from the mixtures, on which every system is scored: what a fine-tune forgot shows as a higher perplexity.

A set is any JSON lines file with a `text` (or `abstract`) a line. Two small sets of our own come with the package
(`feyntune.demo.make.retention_texts` makes them): everyday prose, and abstracts of other sciences.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pyarrow as pa

from feyntune.artifacts.names import expand
from feyntune.artifacts.records import normal_form
from feyntune.artifacts.store import open_store
from feyntune.errors import UserError

SPLIT = "retention"  # of these texts in a table of scores; their `primary` is the set's name


def retention_papers(sources: Mapping[str, str] | None, most: int) -> pa.Table:
    """Columns id, primary (the set's name), abstract and split of at most `most` texts of each set, sorted by id.

    An id holds a digest of its text. Of a larger set those with the smallest digests are taken.

    Raises:
        UserError: a set that is not there, is no JSON lines file, or has fewer than two texts.
    """
    rows = []
    for name, source in sorted((sources or {}).items()):
        texts = {hashlib.sha256(t.encode()).hexdigest(): t for t in _texts(name, source)}
        if len(texts) < 2:
            raise UserError(f"evaluate.retention.{name}: {source} holds fewer than two texts: give a larger file.")
        for digest in sorted(texts)[:most]:
            rows.append({"id": f"{name}:{digest[:16]}", "primary": name, "abstract": texts[digest], "split": SPLIT})
    schema = pa.schema([(c, pa.string()) for c in ("id", "primary", "abstract", "split")])
    return pa.Table.from_pylist(rows, schema)


def source_digest(name: str, source: str) -> str:
    """Of the content of a set's file: the same name does not mean the same texts.

    Raises:
        UserError: it cannot be read.
    """
    return hashlib.sha256(_read(source, f"evaluate.retention.{name}: {source}").encode()).hexdigest()


def _texts(name: str, source: str) -> list[str]:
    where = f"evaluate.retention.{name}: {source}"
    texts = []
    for number, line in enumerate(_read(source, where).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = normal_form(str(record.get("text") or record["abstract"]))
        except (ValueError, KeyError, AttributeError) as e:
            raise UserError(f"{where}, line {number}: write one JSON object a line, with a `text`.") from e
        if text:
            texts.append(text)
    return texts


def _read(source: str, where: str) -> str:
    """The file: `package:NAME/FILE` in an installed package, `s3://BUCKET/FILE`, or a path."""
    try:
        if source.startswith("package:"):
            package, _, file = source.removeprefix("package:").partition("/")
            return files(package).joinpath(file).read_text(encoding="utf-8")
        if source.startswith("s3://"):
            folder, _, file = source.rpartition("/")
            return open_store(folder).get(file).decode()
        return expand(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ModuleNotFoundError) as e:
        raise UserError(f"{where} cannot be read ({e}): correct the path.") from e


def absolute_sources(recipe: dict) -> dict:
    """`recipe` with its retention files by their whole paths: steps run in other folders."""
    evaluate = recipe.get("evaluate", {})
    sources = evaluate.get("retention")
    if not isinstance(sources, dict):
        return recipe
    whole = {n: s if re.match(r"\w+:", s) else str(Path(expand(s)).resolve()) for n, s in sources.items()}
    return {**recipe, "evaluate": {**evaluate, "retention": whole}}
