"""Plausible but plainly synthetic records in the Kaggle format, for tests, benchmarks and the local run.

One small grammar, one lexicon and a few phrase habits for each domain. Every text keeps to a topic (a few
words of its lexicon that come back), so there is something for a language model to learn at each level: the
spelling of words, the phrases of a domain, the topic of a text. Nothing in it is true.
"""

import math
import re
import textwrap
from collections import Counter, deque
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Any

from feyntune.ingestion.lexicon import CS, EVERYDAY, GR_QC, HEP_PH, HEP_TH, OTHER, Q_BIO, Domain, Zipf

# Shares of the default corpus. hep-ph + gr-qc exceed hep-th, and q-bio + cs exceed hep-ph + gr-qc, so that
# every mixture of the method can be drawn to its full size even from a thousand records.
SHARES = {"hep-th": 0.21, "hep-ph": 0.16, "gr-qc": 0.13, "q-bio": 0.13, "cs": 0.33, "other": 0.04}


_ALL = {d.name: d for d in (HEP_TH, HEP_PH, GR_QC, Q_BIO, CS, *OTHER)}


def synthetic_records(n: int, seed: int = 0, categories: tuple[str, ...] = tuple(SHARES)) -> Iterator[dict[str, Any]]:
    """`n` records with the 14 keys of the Kaggle snapshot; the same `seed` gives the same records.

    `categories` picks keys of SHARES (archives; "other" stands for everything else), whose shares are scaled
    to one. A shorter run is the beginning of a longer one. About one record in 100 is withdrawn, one in 100
    is the next part of a series (a near-duplicate) and one in 200 repeats an earlier text under another id.
    """
    rng = Random(f"records {seed}")
    bounds = list(accumulate(SHARES[c] for c in categories))
    offset = rng.random()
    numbers: Counter[str] = Counter()
    recent: deque[tuple[str, list[str], dict[str, Any]]] = deque(maxlen=40)
    for i in range(n):
        archive = categories[_stratum((offset + i * _GOLDEN) % 1 * bounds[-1], bounds)]
        domain = rng.choice(OTHER) if archive == "other" else _ALL[archive]
        special = i % 200
        if special in (61, 161) and recent:  # the next part of a series
            archive, sentences, first = rng.choice(recent)
            domain = _ALL[archive]
            title = f"{first['title']} II" if rng.random() < 0.5 else f"{first['title']}, Part B"
            record = _record(rng, domain, numbers, title, _next_part(rng, sentences), first["categories"])
        elif special == 117 and recent:  # the same text under another id
            archive, sentences, first = rng.choice(recent)
            domain = _ALL[archive]
            record = _record(rng, domain, numbers, first["title"], sentences, first["categories"])
        else:
            writer = _Writer(rng, domain)
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
        yield " ".join(_Writer(rng, rng.choice(EVERYDAY)).sentences(_length(rng)))


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
    return _surname(rng), fore


def _tex(name: str) -> str:
    return name.replace("ö", r"\"o").replace("é", r"\'e").replace("ç", r"\c{c}").replace("ñ", r"\~n")


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


# --- grammar ---------------------------------------------------------------------------------------------

_SLOT = re.compile(r"<(\w+)>")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO])")


@lru_cache(maxsize=4096)
def _parts(template: str) -> list[str]:
    """Literal, slot, literal, slot, ... literal."""
    return _SLOT.split(template)


class _Writer:
    """Writes one text: a domain's words and phrases, narrowed to a topic."""

    def __init__(self, rng: Random, domain: Domain):
        self.rng, self.domain = rng, domain
        self.nouns = [self._pick(domain.nouns) for _ in range(5)] + [self._pick(domain.compounds) for _ in range(3)]
        self.adjectives = [self._pick(domain.adjectives) for _ in range(4)]
        self.names = [self._name() for _ in range(2)]
        self.formulas = [self.fill(rng.choice(domain.formulas)) for _ in range(3)] if domain.formulas else []

    def title(self) -> str:
        return _capital(self.fill(self.rng.choice(self.domain.titles)))

    def sentences(self, length: int) -> list[str]:
        """An opening, then as many sentences as bring the text to about `length` characters."""
        domain, rng = self.domain, self.rng
        habits, shared = _Shuffled(rng, domain.habits), _Shuffled(rng, domain.shared)
        written = [_capital(self.fill(rng.choice(domain.openings)))]
        so_far = len(written[0])
        while so_far + 60 < length:
            if so_far + 170 > length and domain.closings and rng.random() < 0.6:
                sentence = self.fill(rng.choice(domain.closings))
            else:
                sentence = self._dressed(self.fill(next(habits if rng.random() < 0.6 else shared)))
            written.append(_capital(sentence))
            so_far += len(written[-1]) + 1
        return written

    def _dressed(self, sentence: str) -> str:
        """The sentence, now and then with something in front or behind, so that few are met twice."""
        if self.rng.random() < 0.35:
            lead = self.fill(self.rng.choice(self.domain.leads))
            proper = sentence[1:2].isupper() or sentence.split(maxsplit=1)[0].rstrip(",") in _PROPER
            sentence = f"{lead} {sentence if proper else sentence[0].lower() + sentence[1:]}"
        if self.rng.random() < 0.4 and sentence.endswith("."):
            sentence = f"{sentence[:-1]} {self.fill(self.rng.choice(self.domain.tails))}."
        return sentence

    def fill(self, template: str) -> str:
        parts = list(_parts(template))
        for k in range(1, len(parts), 2):
            parts[k] = getattr(self, f"_{parts[k]}")()
        return _ARTICLE.sub(r"\1n ", "".join(parts))

    def _pick(self, words: Zipf) -> str:
        return self.rng.choices(words.words, cum_weights=words.cumulated)[0]

    # One method for each slot.

    def _n(self) -> str:
        draw = self.rng.random()
        if draw < 0.55:
            return self.rng.choice(self.nouns)
        return self._pick(self.domain.nouns if draw < 0.8 else self.domain.compounds)

    def _ns(self) -> str:
        return _plural(self._n())

    def _a(self) -> str:
        return self.rng.choice(self.adjectives) if self.rng.random() < 0.5 else self._pick(self.domain.adjectives)

    def _np(self) -> str:
        draw = self.rng.random()
        if draw < 0.25:
            return f"the {self._n()}"
        if draw < 0.5:
            return f"the {self._a()} {self._n()}"
        if draw < 0.7:
            return f"a {self._a()} {self._n()}"
        if draw < 0.85:
            return f"the {self._n()} of the {self._a()} {self._n()}"
        return f"the {self._who()} {self._n()}"

    def _who(self) -> str:
        return self.rng.choice(self.names) if self.rng.random() < 0.7 else self._name()

    def _name(self) -> str:
        one = _surname(self.rng)
        return one if self.rng.random() < 0.6 or not self.domain.formulas else f"{one}-{_surname(self.rng)}"

    def _place(self) -> str:
        return _surname(self.rng)

    def _f(self) -> str:
        if self.rng.random() < 0.6:
            return self.rng.choice(self.formulas)
        return self.fill(self.rng.choice(self.domain.formulas))

    def _v(self) -> str:
        return self._pick(self.domain.verbs)

    def _vs(self) -> str:
        return _plural(self._v())

    def _ved(self) -> str:
        return _past(self._v())

    def _ving(self) -> str:
        return _gerund(self._v())

    def _adv(self) -> str:
        return self._pick(self.domain.adverbs)

    def _g(self) -> str:
        return self.rng.choice(_GREEK)

    def _x(self) -> str:
        return self.rng.choice("abcdfghijkmnpqrstuvwxyz")

    def _X(self) -> str:
        return self.rng.choice("ABCDEFGHKLMNOPQRSTUVWXZ")

    def _d(self) -> str:
        return str(self.rng.randint(2, 9))

    def _int(self) -> str:
        return str(self.rng.choice((self.rng.randint(2, 30), self.rng.randint(31, 999))))

    def _num(self) -> str:
        return f"{self.rng.uniform(0, 40):.{self.rng.randint(1, 3)}f}"


class _Shuffled:
    """Goes through the templates in random order, again and again: none comes back before all were used."""

    def __init__(self, rng: Random, templates: tuple[str, ...]):
        self.rng, self.templates, self.left = rng, templates, list[str]()

    def __next__(self) -> str:
        if not self.left:
            self.left = self.rng.sample(self.templates, len(self.templates))
        return self.left.pop()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_PROPER = {"Hawking"}  # keeps its capital in mid-sentence


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def _past(verb: str) -> str:
    if verb.endswith("e"):
        return f"{verb}d"
    return f"{verb[:-1]}ied" if verb.endswith("y") and verb[-2] not in "aeou" else f"{verb}ed"


def _gerund(verb: str) -> str:
    return f"{verb[:-1]}ing" if verb.endswith("e") else f"{verb}ing"


_HEADS = [
    "Bar",
    "Bel",
    "Bor",
    "Cal",
    "Cor",
    "Dal",
    "Del",
    "Dor",
    "Fal",
    "Fen",
    "Gal",
    "Gor",
    "Hal",
    "Har",
    "Jor",
    "Kal",
    "Kel",
    "Kor",
    "Lam",
    "Lor",
    "Mal",
    "Mar",
    "Mor",
    "Nar",
    "Nel",
]
_HEADS += [
    "Ol",
    "Or",
    "Pal",
    "Per",
    "Quel",
    "Ral",
    "Ros",
    "Sal",
    "Sel",
    "Sor",
    "Tal",
    "Tem",
    "Tor",
    "Ul",
    "Val",
    "Ver",
    "Vor",
    "Wal",
    "Wen",
    "Yal",
    "Zan",
    "Zor",
    "Bröd",
    "Cér",
    "Nuñ",
]
_MIDDLES = [
    "a",
    "a",
    "an",
    "e",
    "en",
    "i",
    "in",
    "o",
    "on",
    "u",
    "ar",
    "er",
    "or",
    "al",
    "el",
    "il",
    "ab",
    "ad",
    "id",
    "im",
    "ov",
]
_TAILS = [
    "berg",
    "dal",
    "dano",
    "feld",
    "gard",
    "ghi",
    "kov",
    "lin",
    "lund",
    "man",
    "mann",
    "mura",
    "ner",
    "nik",
    "ov",
    "puri",
    "quist",
    "rath",
    "rell",
    "ri",
    "sen",
    "shi",
]
_TAILS += "ski son stein tani ta tov vić wara well wick witz yama zadeh zuki".replace("vić", "vich").split()


def _surname(rng: Random) -> str:
    return f"{rng.choice(_HEADS)}{rng.choice(_MIDDLES)}{rng.choice(_TAILS)}"


_GREEK = [
    rf"\{name}"
    for name in [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "chi",
        "psi",
        "omega",
        "Gamma",
        "Delta",
        "Lambda",
        "Sigma",
        "Phi",
        "Psi",
        "Omega",
    ]
]
