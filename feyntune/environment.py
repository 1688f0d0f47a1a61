"""How values are read from environment variables."""

import os
import re


def variable(*names: str) -> str | None:
    """The first of these environment variables that is set, without what is no part of it; None where none is.

    A Secret made from a file often ends in a newline and may begin with a byte order mark, and `docker --env-file`
    leaves quotation marks around a value.
    """
    for name in names:
        value = os.environ.get(name, "").strip("\ufeff \t\r\n")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1].strip()
        if value:
            return value
    return None


def is_sendable(key: str) -> bool:
    """Whether a key or token can stand in a header: no line break, no space, nothing that is not ASCII."""
    return bool(re.fullmatch(r"[!-~]+", key))
