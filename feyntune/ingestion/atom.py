"""A saved answer of arXiv's Atom API (`export.arxiv.org/api/query`)."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lxml import etree

from feyntune.artifacts.names import local_file
from feyntune.artifacts.records import SOURCES
from feyntune.errors import UserError
from feyntune.ingestion.fields import BadRecord, CategoryFilter, Row, make_paper
from feyntune.ingestion.tally import REPLACEMENT, Tally

_ID = re.compile(r"(?:https?://arxiv\.org/abs/|oai:arXiv\.org:)(.+?)(?:v\d+)?")
_ARXIV_CATEGORY = re.compile(r"[a-z]+(-[a-z]+)?(\.[A-Za-z-]+)?")  # <category> can be an ACM or MSC term too
_RSS_LEAD = re.compile(r"\s*arXiv:\S+\s+Announce Type: \S+\s+Abstract:\s*")


def read_atom(
    path: str | Path, categories: CategoryFilter, tally: Tally, *, converted_text: bool = False
) -> Iterator[Row]:
    """The papers of a saved answer of the Atom API, or of a daily feed (rss.arxiv.org/atom/hep-th), entry by entry.

    The API gives text in which arXiv has turned TeX into Unicode; feeds give the author's. Of a feed, replacements
    are left out: their date is not that of version 1.

    Raises:
        UserError: the file is not there, is no Atom feed, is cut short, or holds the server's error message.
    """
    path = local_file(str(path))
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of a saved Atom answer.")
    last = 0
    try:
        events = etree.iterparse(
            str(path), events=("start", "end"), resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
        )
        _, root = next(iter(events))
        if etree.QName(root).localname != "feed":
            if etree.QName(root).localname == "rss":
                raise UserError(f"{path} is an RSS feed: save the Atom feed, https://rss.arxiv.org/atom/ARCHIVE.")
            raise UserError(f"{path} is a page of <{etree.QName(root).localname}>, not an Atom <feed>: fetch it again.")
        for event, entry in events:
            if event != "end" or etree.QName(entry).localname != "entry":
                continue
            tally.read += 1
            last = entry.sourceline
            try:
                source = "atom-feed" if _is_of_feed(entry) else "atom-api"
                if not SOURCES[source] and not converted_text:
                    _refuse_error(entry)
                    raise UserError(
                        f"{path} is an answer of arXiv's API, whose server turns TeX into Unicode ($\\alpha$ becomes "
                        "α), which must not be mixed with TeX or compared with it: save a feed "
                        "(https://rss.arxiv.org/atom/ARCHIVE), or accept it with --converted-text."
                    )
                if (entry.findtext("{*}announce_type") or "").startswith("replace"):
                    tally.left_out[REPLACEMENT] += 1
                    root.remove(entry)
                    continue
                row = _row(entry, source)
            except BadRecord as e:
                tally.bad(f"{path.name}:{last}", str(e))
            else:
                if categories.accepts(row.paper.primary):
                    yield row
                else:
                    tally.other(row.paper.primary)
            root.remove(entry)
    except etree.XMLSyntaxError as e:
        raise UserError(f"{path} is not whole XML after line {last} ({e}): fetch it again.") from e


def _is_of_feed(entry: Any) -> bool:
    return (entry.findtext("{*}id") or "").startswith("oai:") or bool(
        entry.find("{*}announce_type") is not None or _RSS_LEAD.match(entry.findtext("{*}summary") or "")
    )


def _refuse_error(entry: Any) -> None:
    address = entry.findtext("{*}id") or ""
    if "/api/errors" in address:
        message = " ".join((entry.findtext("{*}summary") or "").split())
        raise UserError(f"The Atom file holds arXiv's error message ({message}): correct the query, fetch it again.")


def _row(entry: Any, source: str) -> Row:
    _refuse_error(entry)
    address = entry.findtext("{*}id") or ""
    match = _ID.fullmatch(address.strip())
    primary = entry.find("{*}primary_category")
    terms = [c.get("term", "") for c in entry.iterfind("{*}category")]
    categories = [t for t in terms if _ARXIV_CATEGORY.fullmatch(t)]
    if primary is not None:
        first = primary.get("term", "")
        categories = [first, *(c for c in categories if c != first)]
    paper = make_paper(
        source=source,
        id=match[1] if match else address,
        categories=" ".join(categories),
        title=entry.findtext("{*}title"),
        abstract=_RSS_LEAD.sub("", entry.findtext("{*}summary") or "", count=1),
        submitted=entry.findtext("{*}published"),
        comments=entry.findtext("{*}comment"),
    )
    return Row(paper, (entry.findtext("{*}updated") or "")[:10])
