"""Prints the entries of a hashed list whose packages this Python does not have: `python missing.py predictor.txt`.

For an image that adds our packages to those of another: what is there already stays as it is.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path


def missing(lock: str, present: set[str]) -> str:
    """The entries of `lock` (a name, then its hashes on lines of their own) that name none of `present`."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    return "".join(e for e in entries if e[:1].isalnum() and normalized(re.split(r"[=\[ ;]", e)[0]) not in present)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    here = {normalized(d.metadata["Name"]) for d in distributions()}
    sys.stdout.write(missing(Path(sys.argv[1]).read_text(), here))
