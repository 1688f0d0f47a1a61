"""Plausible but plainly synthetic records in the Kaggle format, for tests, benchmarks and the local run.

One small grammar, one lexicon and a few phrase habits for each domain. Every text keeps to a topic (a few
words of its lexicon that come back), so there is something for a language model to learn at each level: the
spelling of words, the phrases of a domain, the topic of a text. Nothing in it is true.
"""

import math
import textwrap
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from random import Random
from typing import Any

from feyntune.ingestion.synthetic.grammar import (
    Domain,
    Writer,
    everyday_domains,
    other_domains,
    science_domains,
    surname,
)

# Shares of the default corpus. hep-ph + gr-qc exceed hep-th, and q-bio + cs exceed hep-ph + gr-qc, so that
# every mixture of the method can be drawn to its full size even from a thousand records.
SHARES = {"hep-th": 0.21, "hep-ph": 0.16, "gr-qc": 0.13, "q-bio": 0.13, "cs": 0.33, "other": 0.04}


def synthetic_records(n: int, seed: int = 0, categories: tuple[str, ...] = tuple(SHARES)) -> Iterator[dict[str, Any]]:
    """`n` records with the 14 keys of the Kaggle snapshot; the same `seed` gives the same records.

    `categories` picks keys of SHARES (archives; "other" stands for everything else), whose shares are scaled
    to one. A shorter run is the beginning of a longer one. About one record in 100 is withdrawn, one in 100
    is the next part of a series (a near-duplicate) and one in 200 repeats an earlier text under another id.
    """
    rng = Random(f"records {seed}")
    domains = {**science_domains(), **{d.name: d for d in other_domains()}}
    bounds = list(accumulate(SHARES[c] for c in categories))
    offset = rng.random()
    numbers: Counter[str] = Counter()
    recent: deque[tuple[str, list[str], dict[str, Any]]] = deque(maxlen=40)
    for i in range(n):
        archive = categories[_stratum((offset + i * _GOLDEN) % 1 * bounds[-1], bounds)]
        domain = rng.choice(other_domains()) if archive == "other" else domains[archive]
        special = i % 200
        if special in (61, 161) and recent:  # the next part of a series
            archive, sentences, first = rng.choice(recent)
            domain = domains[archive]
            title = f"{first['title']} II" if rng.random() < 0.5 else f"{first['title']}, Part B"
            record = _record(rng, domain, numbers, title, _next_part(rng, sentences), first["categories"])
        elif special == 117 and recent:  # the same text under another id
            archive, sentences, first = rng.choice(recent)
            domain = domains[archive]
            record = _record(rng, domain, numbers, first["title"], sentences, first["categories"])
        else:
            writer = Writer(rng, domain)
            title = writer.title()
            sentences = writer.sentences(_length(rng))
            record = _record(rng, domain, numbers, title, sentences, _categories(rng, domain))
        if special in (29, 143):
            _withdraw(rng, record)
        else:
            recent.append((domain.name, sentences, record))
        yield record


def everyday_texts(n: int, seed: int = 0) -> Iterator[str]:
    """`n` texts of abstract length from outside science: cooking, gardens, travel, sport, crafts, weather."""
    rng = Random(f"everyday {seed}")
    for _ in range(n):
        yield " ".join(Writer(rng, rng.choice(everyday_domains())).sentences(_length(rng)))


# --- records ---------------------------------------------------------------------------------------------

_GOLDEN = (math.sqrt(5) - 1) / 2  # steps of it fill [0, 1) evenly: small corpora keep the shares
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_LICENSES = (
    "http://arxiv.org/licenses/nonexclusive-distrib/1.0/",
    "http://creativecommons.org/licenses/by/4.0/",
    "http://creativecommons.org/licenses/by-nc-sa/4.0/",
    None,
)
_WITHDRAWN = (
    "This paper has been withdrawn by the author due to a crucial sign error in equation <int>",
    "Withdrawn: superseded by a later paper",
    "This paper has been withdrawn",
)


def _stratum(point: float, bounds: list[float]) -> int:
    return next((k for k, bound in enumerate(bounds) if point < bound), len(bounds) - 1)


def _length(rng: Random) -> int:
    """Characters of one abstract: a gamma law with hep-th's mean 760 and standard deviation 354."""
    return round(rng.gammavariate(4.6, 165) + 30)


def _categories(rng: Random, domain: Domain) -> str:
    primary = rng.choices(domain.categories, cum_weights=domain.category_weights)[0]
    crossed = rng.choices((0, 1, 2, 3), (55, 28, 12, 5))[0]
    others = [c for c in rng.sample(domain.cross_lists, min(crossed, len(domain.cross_lists))) if c != primary]
    if "math-ph" in others:
        others.append("math.MP")
    return " ".join([primary, *others])


def _record(
    rng: Random,
    domain: Domain,
    numbers: Counter[str],
    title: str,
    sentences: list[str],
    categories: str,
) -> dict[str, Any]:
    first = datetime(domain.since, 8 if domain.since == 1991 else 1, 1, tzinfo=UTC)
    span = (datetime(domain.until, 12, 31, tzinfo=UTC) - first).total_seconds()
    posted = first + timedelta(seconds=int(span * rng.random() ** 0.6))  # more papers every year
    dates = [posted]
    while rng.random() < 0.35 and len(dates) < 6:
        dates.append(dates[-1] + timedelta(hours=rng.randint(20, 9000)))
    people = [_person(rng) for _ in range(rng.choices((1, 2, 3, 4, 6), (20, 30, 25, 15, 10))[0])]
    published = rng.random() < 0.6
    year = posted.year + 1
    abstract = " ".join(sentences)
    if len(sentences) > 3 and rng.random() < 0.03:
        abstract = f"{' '.join(sentences[:2])}\n{' '.join(sentences[2:])}"
    wrapped = "\n  ".join(_wrap(part, 80) for part in abstract.split("\n"))
    return {
        "id": _identifier(posted, categories.split()[0], numbers),
        "submitter": f"{people[0][1]} {people[0][0]}" if rng.random() < 0.95 else None,
        "authors": ", ".join(f"{fore} {_tex(key)}" for key, fore in people),
        "title": _wrap(title, 70).replace("\n", "\n  "),
        "comments": _comments(rng) if rng.random() < 0.8 else None,
        "journal-ref": f"{rng.choice(domain.journals)}{rng.randint(1, 900)}:{rng.randint(1, 9999)},{year}"
        if published
        else None,
        "doi": f"10.99999/synthetic.{year}.{rng.randint(1, 999999):06d}" if published else None,
        "report-no": f"SYN-{rng.choice(('TH', 'PH', 'GR', 'IT'))}-{year % 100:02d}/{rng.randint(1, 99)}"
        if rng.random() < 0.15
        else None,
        "categories": categories,
        "license": rng.choices(_LICENSES, (60, 15, 5, 20))[0],
        "abstract": f"  {wrapped}\n",
        "versions": [{"version": f"v{k}", "created": _rfc822(d)} for k, d in enumerate(dates, 1)],
        "update_date": (dates[-1] + timedelta(days=rng.choice((0, 1, 3, 400)))).date().isoformat(),
        "authors_parsed": [[key, fore, ""] for key, fore in people],
    }


def _identifier(posted: datetime, primary: str, numbers: Counter[str]) -> str:
    month = f"{posted.year % 100:02d}{posted.month:02d}"
    if (posted.year, posted.month) < (2007, 4):
        stem, digits = f"{primary.split('.')[0]}/{month}", 3
    else:
        stem, digits = f"{month}.", 4 if posted.year < 2015 else 5
    numbers[stem] += 1
    return f"{stem}{numbers[stem]:0{digits}d}"


def _rfc822(when: datetime) -> str:
    """As the snapshot prints it: English names, day not padded, whatever the locale."""
    return f"{_DAYS[when.weekday()]}, {when.day} {_MONTHS[when.month - 1]} {when:%Y %H:%M:%S} GMT"


def _comments(rng: Random) -> str:
    pages = f"{rng.randint(4, 70)} pages"
    return rng.choice(
        (
            pages,
            f"{pages}, {rng.randint(1, 20)} figures",
            f"{pages}, LaTeX; v2: references added",
            f"{pages}, accepted version,\n  typos corrected",
        )
    )


def _withdraw(rng: Random, record: dict[str, Any]) -> None:
    notice = rng.choice(_WITHDRAWN).replace("<int>", str(rng.randint(2, 40)))
    record["comments"] = notice
    if rng.random() < 0.5:
        record["abstract"] = f"  {notice}.\n"


def _next_part(rng: Random, sentences: list[str]) -> list[str]:
    """The same sentences with a word changed in one of them, and a remark in front."""
    changed = list(sentences)
    k = rng.randrange(len(changed))
    words = changed[k].split(" ")
    words[len(words) // 2] = "corresponding"
    changed[k] = " ".join(words)
    return ["This is the second part of a series.", *changed]


def _person(rng: Random) -> tuple[str, str]:
    fore = " ".join(f"{rng.choice('ABCDEFGHJKLMNPRSTVW')}." for _ in range(rng.choices((1, 2), (3, 1))[0]))
    return surname(rng), fore


def _tex(name: str) -> str:
    return name.replace("ö", r"\"o").replace("é", r"\'e").replace("ç", r"\c{c}").replace("ñ", r"\~n")


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
