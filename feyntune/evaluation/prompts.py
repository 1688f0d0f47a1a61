"""Where an abstract is cut into a prompt and the rest that a model is to write."""

import hashlib
import math
import re

import pyarrow as pa

# FeynTune's sentence boundary (its processing.py; arXiv 2508.03716).
_PAPER = re.compile(r"(?<=[.!?])\s+")

# The careful rule starts from the same boundary, closing quotes and brackets allowed, and then refuses some.
_CAREFUL = re.compile(r"(?<=[.!?])(?:''|[\"')\]}])*\s+")
_DOLLAR = re.compile(r"(?<!\\)\$")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[{~\"'])(?:[Ii]\.?e|[Ee]\.?g|a\.k\.a|w\.r\.t|[Cc]f|[Vv]iz|[Vv]s|resp|approx|et al|etc|loc|cit|op|"
    r"[Rr]efs?|[Ee]qs?|[Ff]igs?|[Ss]ecs?|[Ss]ect|[Tt]ab|[Aa]pp|Thm|Prop|Ch|Nos?|[Vv]ol|pp?|Drs?|Prof|Mrs?|Ms|St|Jr|"
    r"Comm|Commun|Phys|Math|Rev|Lett|Nucl|Proc|Soc|Ann|Nat|Sci|Astron|Astrophys|Mod|Int|Theor|Adv|Eur|Acta|Dept|eds?)\.$"
)
_ENDS_SENTENCES_TOO = ("etc.", "al.")
_INITIAL = re.compile(r"(?:^|[\s(\[{~.\-\"])[A-Z]\.$")
# After "the lattice L." a sentence may begin; after "by G." a surname follows. These words begin sentences.
_OPENERS = frozenset(
    """
    A After Also Although Among An And As At Based Because Both But By Each Finally First Firstly Following For From
    Furthermore Given Hence Here How However If In It Its Moreover Motivated Next No Not On One Only Our Second
    Secondly Several Since So Some Such That The Their Then There Therefore These They This Those Thus To Two Under
    Unlike Using Various Via We What When Where Which While With Without
    """.split()  # noqa: SIM905
)


def sentences(text: str, rule: str) -> list[str]:
    """`text` (in the normal form) cut at its sentence boundaries; joined by a space they give it back.

    "paper" cuts after every `.`, `!` or `?` before white space. "careful" does not cut inside `$…$` or braces, before
    a lower-case letter, after an abbreviation (i.e., et al., Phys.), or after an initial (G. Kane) unless the next
    word is one that begins sentences (the lattice L. The …).
    """
    if rule == "paper":
        return _PAPER.split(text)
    result, start = [], 0
    for boundary in _CAREFUL.finditer(text):
        if _ends(text[start : boundary.start()], text[: boundary.start()], text[boundary.end() :]):
            result.append(text[start : boundary.end()].rstrip())
            start = boundary.end()
    return [*result, text[start:]] if start < len(text) else result


def _ends(sentence: str, before: str, after: str) -> bool:
    if not after or after[0].islower():
        return False
    if len(_DOLLAR.findall(before)) % 2 or sentence.count("{") > sentence.count("}"):
        return False
    opens = after.split(None, 1)[0].strip("(\"'[,") in _OPENERS
    if _ABBREVIATION.search(sentence):
        return opens and sentence.endswith(_ENDS_SENTENCES_TOO)
    return opens or not _INITIAL.search(sentence)


def cut(text: str, rule: str) -> tuple[str, str]:
    """The prompt and the rest: the first ceil(n/2) sentences; of a single sentence, the first ceil(n/2) words.

    Both without the space between them. The rest of a text of one word is empty.
    """
    parts = sentences(text, rule)
    if len(parts) < 2:
        parts = text.split()
    prompt = " ".join(parts[: math.ceil(len(parts) / 2)])
    return prompt, text[len(prompt) :].strip()


def sample_papers(papers: pa.Table, most: int) -> pa.Table:
    """At most `most` of `papers`, by the hash of their ids: a corpus that grows moves few of them. Sorted by id."""
    ids = papers["id"].to_pylist()
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())[:most]
    return papers.take(pa.array(sorted(order, key=ids.__getitem__), pa.int64()))
