"""The grammar of the synthetic corpus: templates with slots, filled from one domain's lexicon.

The lexicons are the YAML files beside this module. Slots in their templates: <n> <ns> noun, plural; <np> noun
phrase; <a> adjective; <v> <vs> <ved> <ving> verb and its forms; <adv> adverb; <who> the name of somebody or of a
result; <place> a place; <f> a formula; <g> a Greek letter in TeX; <x> <X> a letter; <d> a digit; <int> <num> a
number.
"""

import re
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

_FOLDER = Path(__file__).parent
_SCIENCES = ("hep-th", "hep-ph", "gr-qc", "q-bio", "cs")


class Lexicon(BaseModel):
    """The words (separated by spaces) and templates of one domain, as a YAML file spells them."""

    model_config = ConfigDict(extra="forbid")

    nouns: str
    adjectives: str
    verbs: str
    adverbs: str
    prefixes: str  # of compounds: prefix + stem + ending
    stems: str
    endings: str
    openings: list[str]
    habits: list[str]
    titles: list[str]
    shared: list[str]
    leads: list[str]
    tails: list[str]
    closings: list[str] = []
    formulas: list[str] = []
    categories: dict[str, int] = {}  # with their weights
    cross_lists: str = ""
    journals: list[str] = []
    since: int = 1991
    until: int = 2025


@dataclass
class Zipf:
    """Words in the order of falling frequency, for `random.choices`."""

    words: list[str]
    cumulated: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.cumulated = list(accumulate(1 / (rank + 12) for rank in range(len(self.words))))


class Domain:
    """One domain's lexicon. Compounds (prefix, stem, ending) make its vocabulary as open as a real one."""

    def __init__(self, name: str, lexicon: Lexicon):
        self.name = name
        self.nouns = Zipf(lexicon.nouns.split())
        self.adjectives = Zipf(lexicon.adjectives.split())
        self.verbs = Zipf(lexicon.verbs.split())
        self.adverbs = Zipf(lexicon.adverbs.split())
        self.compounds = Zipf(_compounds(name, lexicon))
        self.openings, self.habits, self.closings = lexicon.openings, lexicon.habits, lexicon.closings
        self.leads, self.tails = lexicon.leads, lexicon.tails
        self.titles, self.formulas, self.shared = lexicon.titles, lexicon.formulas, lexicon.shared
        categories = lexicon.categories or {name: 1}
        self.categories, self.category_weights = list(categories), list(accumulate(categories.values()))
        self.cross_lists, self.journals = lexicon.cross_lists.split(), lexicon.journals
        self.since, self.until = lexicon.since, lexicon.until  # years


def _compounds(name: str, lexicon: Lexicon) -> list[str]:
    rng = Random(f"compounds {name}")
    prefixes, stems, endings = lexicon.prefixes.split(), lexicon.stems.split(), lexicon.endings.split()
    return list({rng.choice(prefixes) + rng.choice(stems) + rng.choice(endings): None for _ in range(3000)})


def _read(name: str) -> dict[str, Any]:
    text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the safe loader, in C if available


def _group(file: str, defaults: dict[str, Any]) -> list[Domain]:
    """The domains of a file that holds several, with what they have in common."""
    raw = _read(file)
    return [
        Domain(name, Lexicon.model_validate({**defaults, **raw["common"], **own}))
        for name, own in raw["domains"].items()
    ]


@cache
def science_domains() -> dict[str, Domain]:
    """The archives of the mixtures, by name."""
    common = _read("science")
    return {name: Domain(name, Lexicon.model_validate({**common, **_read(name)})) for name in _SCIENCES}


@cache
def other_domains() -> list[Domain]:
    """Archives outside the mixtures."""
    return _group("other", _read("science"))


@cache
def everyday_domains() -> list[Domain]:
    """Prose from outside science."""
    return _group("everyday", {})


_NAMES = {key: words.split() for key, words in _read("names").items()}


_SLOT = re.compile(r"<(\w+)>")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeioAEIO])")


@lru_cache(maxsize=4096)
def _parts(template: str) -> list[str]:
    """Literal, slot, literal, slot, ... literal."""
    return _SLOT.split(template)


class Writer:
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
        one = surname(self.rng)
        return one if self.rng.random() < 0.6 or not self.domain.formulas else f"{one}-{surname(self.rng)}"

    def _place(self) -> str:
        return surname(self.rng)

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
        return self.rng.choice(_NAMES["greek"])

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

    def __init__(self, rng: Random, templates: list[str]):
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


def surname(rng: Random) -> str:
    return f"{rng.choice(_NAMES['heads'])}{rng.choice(_NAMES['middles'])}{rng.choice(_NAMES['tails'])}"
