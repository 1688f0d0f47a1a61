r"""TeX formulas of an abstract as MathML, which browsers set, on paper too; what cannot be read stays as it is written.

A formula is what stands between dollars, as in arXiv's abstracts, or between `\(` and `\)`.
"""

import html
import re
from collections.abc import Iterable
from functools import lru_cache
from xml.etree import ElementTree

from markupsafe import Markup, escape

# A dollar that opens is not followed by white space, one that closes is not preceded by it or followed by a digit.
FORMULA = re.compile(
    r"(?<![\\$])\$\$(?P<display>[^$]+)\$\$|(?<![\\$])\$(?P<dollars>[^\s$](?:[^$]*[^\s$\\])?)\$(?!\d)|\\\((?P<round>.+?)\\\)",
    re.DOTALL,
)
_OPEN, _CLOSE = "\ue000", "\ue001"  # around marked words, of Unicode's private use; moved out of a formula
LONGEST = 2000  # characters of a formula; a longer one is no formula but two lost dollars


def set_formulas(text: str) -> Markup:
    """`text` as HTML, its formulas as MathML with the source in their title."""
    parts, end = [], 0
    for match in FORMULA.finditer(text):
        parts.append(escape(text[end : match.start()]))
        source = match["display"] or match["dollars"] or match["round"]
        marks = "".join(c for c in match[0] if c in (_OPEN, _CLOSE))
        formula = _mathml("".join(c for c in source if c not in (_OPEN, _CLOSE)))
        parts += [formula, escape(marks)] if formula else [escape(match[0])]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def mark_words(parts: Iterable[tuple[str, bool]]) -> Markup:
    """Words as HTML, formulas set across parts too; the words of a part with True stand in `<mark>`."""
    text = " ".join(f"{_OPEN}{words}{_CLOSE}" if marked else words for words, marked in parts)
    return Markup(set_formulas(text).replace(_OPEN, Markup("<mark>")).replace(_CLOSE, Markup("</mark>")))


@lru_cache(maxsize=4096)
def _mathml(source: str) -> Markup | None:
    try:
        from latex2mathml.converter import convert_to_element
    except ImportError:  # an image of an earlier version
        return None
    if len(source) > LONGEST or source.count("{") != source.count("}"):
        return None
    try:
        element = convert_to_element(source)
    except Exception:  # the library raises what it runs into: IndexError, KeyError, its own
        return None
    for node in element.iter():
        # The library writes characters as references (&#x003B1;), and a command it does not know as its name.
        node.text = html.unescape(node.text) if node.text else None
        if node.text and node.text.startswith("\\") and len(node.text) > 1:
            return None
    element.set("title", source)
    return Markup(ElementTree.tostring(element, encoding="unicode"))
