"""The rules for one record's fields, the same for every source: identifier, categories, dates, withdrawn."""

import re
from collections.abc import Iterable
from datetime import date
from typing import Any, NamedTuple

from feyntune.artifacts.records import Paper, normal_form
from feyntune.errors import UserError
from feyntune.variants import ARCHIVES

# Closed archives and the categories that replaced them (arXiv's category taxonomy).
SUCCESSORS = {
    "acc-phys": "physics.acc-ph",
    "adap-org": "nlin.AO",
    "alg-geom": "math.AG",
    "ao-sci": "physics.ao-ph",
    "atom-ph": "physics.atom-ph",
    "bayes-an": "physics.data-an",
    "chao-dyn": "nlin.CD",
    "chem-ph": "physics.chem-ph",
    "cmp-lg": "cs.CL",
    "comp-gas": "nlin.CG",
    "dg-ga": "math.DG",
    "funct-an": "math.FA",
    "mtrl-th": "cond-mat.mtrl-sci",
    "patt-sol": "nlin.PS",
    "plasm-ph": "physics.plasm-ph",
    "q-alg": "math.QA",
    "solv-int": "nlin.SI",
    "supr-con": "cond-mat.supr-con",
}


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason it is counted under."""


class Row(NamedTuple):
    """A paper on its way into the corpus."""

    paper: Paper
    updated: str  # ISO date of the last change of the metadata: of records with one id the newest stays
    left_out: str = ""  # why the paper is not kept (tally.DELETED, tally.OTHER_CATEGORY): only its id counts then


_CATEGORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9-]+)*", re.ASCII)


def is_category(name: str) -> bool:
    """Whether `name` has the form of an archive (hep-th) or a category (cs.LG)."""
    return bool(_CATEGORY.fullmatch(name))


class CategoryFilter:
    """Which primary categories to keep: every one, or those named.

    A name is a whole archive (`q-bio` takes q-bio, q-bio.NC, ...) or one category (`cs.LG`). Both are matched
    exactly, never as a part of a word, so `cs` does not take `physics.optics`.

    Raises:
        UserError: a name that cannot be an archive or a category, or a closed archive.
    """

    def __init__(self, names: Iterable[str] | None):
        self.names = None if names is None else frozenset(names)
        for name in sorted(self.names or ()):
            if not is_category(name):
                raise UserError(f"Category {name!r} is not an archive (hep-th, cs) or a category (cs.LG): correct it.")
            if name not in ARCHIVES and name.lower() in ARCHIVES:
                raise UserError(f"Category {name!r} is spelled {name.lower()!r} by arXiv: correct it.")
            if name in SUCCESSORS:
                raise UserError(f"Category {name!r} was closed: ask for {SUCCESSORS[name]}, which takes its papers.")
        if self.names is not None and not self.names:
            raise UserError("The list of categories is empty: name at least one, or leave the option out.")

    def accepts(self, primary: str) -> bool:
        """Whether papers of this primary category (dead archives mapped or not) are kept."""
        if self.names is None:
            return True
        primary = SUCCESSORS.get(primary, primary)
        return primary in self.names or primary.partition(".")[0] in self.names


def make_paper(
    *,
    source: str,
    id: Any,
    categories: Any,
    title: Any,
    abstract: Any,
    submitted: Any,
    comments: Any = None,
    license: Any = None,
    withdrawn: bool = False,
) -> Paper:
    """A record's fields, as the source spells them, as a `Paper`.

    `submitted` is the date of version 1, in any spelling `parse_date` reads.

    Raises:
        BadRecord: a field is missing or is not what it should be.
    """
    if isinstance(categories, list) and all(isinstance(c, str) for c in categories):
        categories = " ".join(categories)  # as copies of the snapshot elsewhere have it
    if not isinstance(categories, str) or not (listed := categories.split()):
        raise BadRecord("no categories")
    if not is_category(listed[0]):
        raise BadRecord(f"categories that are not words with spaces between ({categories[:40]})")
    if not isinstance(title, str) or not (title := normal_form(title)):
        raise BadRecord("no title")
    if not isinstance(abstract, str) or not (abstract := normal_form(abstract)):
        raise BadRecord("no abstract")
    return Paper(
        id=parse_id(id),
        primary=SUCCESSORS.get(listed[0], listed[0]),
        categories=listed,
        title=title,
        abstract=abstract,
        date=parse_date(submitted),
        license=license if isinstance(license, str) and license else None,
        withdrawn=withdrawn or is_withdrawn(comments, abstract),
        source=source,
    )


_NEW_ID = re.compile(r"\d{4}\.\d{4,5}", re.ASCII)
_OLD_ID = re.compile(r"([a-z]+(?:-[a-z]+)?)(?:\.[A-Z]{2})?(/\d{7})", re.ASCII)


def parse_id(text: Any) -> str:
    """An identifier in its one spelling: `math.GT/0309136` is `math/0309136`, the same paper.

    Raises:
        BadRecord: it is not an arXiv identifier (a number where leading zeros got lost, for instance).
    """
    if isinstance(text, str):
        if _NEW_ID.fullmatch(text):
            return text
        if old := _OLD_ID.fullmatch(text):
            return old[1] + old[2]
    if isinstance(text, int | float):
        raise BadRecord("an id that is a number, which has lost its zeros: keep ids as text")
    raise BadRecord("no id" if text in (None, "") else "not an arXiv id")


_RFC822 = re.compile(r"(?:[A-Z][a-z]{2}, )?(\d{1,2}) ([A-Z][a-z]{2}) (\d{4})\b", re.ASCII)
_ISO = re.compile(r"(\d{4})-(\d{2})-(\d{2})(?:[T ].*)?", re.ASCII)
_MONTHS = {
    m: i for i, m in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)
}


def parse_date(text: Any) -> date:
    """The day in `Mon, 2 Apr 2007 19:18:42 GMT`, `2007-04-02` `2007-04-02T19:18:42Z` or with a space for T.

    Raises:
        BadRecord: it is none of these, or no such day.
    """
    if isinstance(text, int | float):
        raise BadRecord("a date that is a number: write it as 2024-08-22")
    if not isinstance(text, str):
        raise BadRecord("no date of version 1")
    try:
        if match := _RFC822.match(text):
            return date(int(match[3]), _MONTHS[match[2]], int(match[1]))
        if match := _ISO.fullmatch(text):
            return date(int(match[1]), int(match[2]), int(match[3]))
    except (ValueError, KeyError):
        pass
    raise BadRecord("not a date such as 2024-08-22")


def parse_day(name: str, text: str | None) -> date | None:
    """The day in the setting `name`, `2024-08-22`; None where none is given.

    Raises:
        UserError: it is no day.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass
    raise UserError(f"{name} is {text!r}, not a day: write it as 2024-08-22.")


_DOCUMENT = r"(?:paper|article|submission|manuscript|preprint|e-?print|work|version|note|letter|report|thesis|document)"
_WITHDRAWN = r"(?:with(?:- ?)?drawn|retracted|removed)"
# Sentences of notices: what is withdrawn is the paper itself, or who withdrew it is named. "Withdrawn" alone is not
# enough in an abstract: drugs are withdrawn from markets, and needles from tissue.
_NOTICE = re.compile(
    rf"\b(?:this|the|present|our|my) (?:\w+ )?{_DOCUMENT} (?:(?!we |i )\w+ )?(?:has|have|had|was|were|is|are) "
    rf"(?:now |hereby )?(?:been |being )?"
    rf"(?:temporarily |formally |voluntarily )?{_WITHDRAWN}\b(?! from (?!arxiv|the arxiv|publication))"
    rf"|^\W*(?:{_DOCUMENT} )?(?:temporarily )?(?:is |has been )?(?:withdrawn|retracted)"
    r"(?:\W*$|\W*[.:;,\])-]|,? (?:due|because|since|as|for|see|in favou?r|pending|until)\b"
    r"|,? (?:by (?:the )?author|from (?:the )?arxiv)\b)"
    rf"|\bthis {_DOCUMENT} (?:has|is) .{{1,80}}? and (?:is|has been|was) (?:hereby |now )?{_WITHDRAWN}\b"
    rf"|(?:^|[.;:\])] ?|\b{_DOCUMENT}\b[^.]{{0,60}} ){_WITHDRAWN} by (?:the |its |all |both )?"
    r"(?:corresponding |first |submitting )?(?:author|submitter|arxiv)(?!s?['’])"
    r"|\b(?:author|authors|we|i) (?:has |have |are |am |hereby |wish to |would like to )*"
    rf"(?:withdraws?|withdrew|withdrawing|withdrawn|retracts?|retracting|retracted) (?:this|the|our|my) {_DOCUMENT}\b",
    re.IGNORECASE,
)
# In comments the bare word is a notice, unless it speaks of another paper ("replaces the withdrawn arXiv:…").
_COMMENT = re.compile(
    rf"(?<!\bthe )(?<!\ba )(?<!\bpreviously )(?<!\bnot )(?<!\bnever )\bwithdrawn\b"
    rf"(?!,? (?:arxiv:|and replaced|{_DOCUMENT}s? arxiv)| from (?!(?:the )?arxiv|publication))",
    re.IGNORECASE,
)
# What else than this paper a comment can call withdrawn, in the words of the same clause.
_PART = re.compile(
    r"\b(?:(?:earlier|previous|prior|old|first) (?:\w+ )?versions?|sec(?:tions?|\.)|theorems?|lemmas?|conjectures?"
    r"|claims?|statements?|propositions?|corollary|eq(?:uations?|s?\.)|fig(?:ures?|s?\.)|appendix|v\d+)(?!\w)",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[;,]|\.\s+(?=[A-Z])")
_MAY_BE_NOTICE = re.compile("with-? ?dr|retract|removed", re.IGNORECASE)


def is_withdrawn(comments: Any, abstract: str) -> bool:
    """arXiv's habit: withdrawn papers stay listed and say so in their comments or in place of the abstract."""
    if isinstance(comments, str) and _MAY_BE_NOTICE.search(comments):
        text = " ".join(comments.split())
        for notice in (*_COMMENT.finditer(text), *_NOTICE.finditer(text)):
            if not _PART.search(_CLAUSE.split(text[: notice.end()])[-1]):
                return True
    return bool(_MAY_BE_NOTICE.search(abstract) and _NOTICE.search(abstract))
