"""How much a text repeats itself: figures over its words, so that they compare between tokenizers. No torch."""

import math
import re
import zlib
from collections import Counter

_WORDS = re.compile(r"\w+|[^\w\s]")

# Name -> definition, in the words of the report. All are of one text; a system's figure is the mean over its texts.
DEFINITIONS = {
    "words": "words and punctuation marks of the completion",
    "entropy_1": "Shannon entropy of the distribution of words, bits (Ent-n, arXiv 1809.05972); grows with length",
    "entropy_2": "the same of pairs of words",
    "distinct_1": "different words over all words (distinct-n, arXiv 1510.03055 §5); falls with length",
    "distinct_2": "the same of pairs of words",
    "repeated_4": "share of runs of four words that have occurred before (seq-rep-4, arXiv 1908.04319 §6)",
    "compression": "bytes over bytes after zlib -9 (compression ratio, arXiv 2403.00553); higher repeats more",
}


def repetition(text: str) -> dict[str, float | None]:
    """DEFINITIONS of `text`; None where it is too short to have any (case counts for nothing)."""
    words = _WORDS.findall(text.lower())
    raw = text.strip().encode()
    result: dict[str, float | None] = {"words": float(len(words))}
    for n in (1, 2):
        counts = _grams(words, n)
        result[f"entropy_{n}"] = _entropy(counts) if counts else None
    for n in (1, 2):
        counts = _grams(words, n)
        result[f"distinct_{n}"] = len(counts) / counts.total() if counts else None
    four = _grams(words, 4)
    result["repeated_4"] = 1 - len(four) / four.total() if four else None
    result["compression"] = len(raw) / len(zlib.compress(raw, 9)) if raw else None
    return result


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _entropy(counts: Counter[tuple[str, ...]]) -> float:
    total = counts.total()
    return math.log2(total) - sum(c * math.log2(c) for c in counts.values()) / total
