"""Names of variants, and their slugs for places where a slash or a plus cannot stand."""

import re

METHODS = ("lora-qkv", "lora-all")
BASE = "base"  # the name of the base model among the systems measured and served

_VARIANT = re.compile(r"[a-z0-9][a-z0-9.+-]*/lora-(qkv|all)")


def variant_name(mixture: str, method: str) -> str:
    """`hep-th`, `lora-qkv` -> `hep-th/lora-qkv`."""
    name = f"{mixture}/{method}"
    if not _VARIANT.fullmatch(name):
        raise ValueError(f"{name!r} is not a variant: write MIXTURE/METHOD with METHOD one of {', '.join(METHODS)}")
    return name


def slug(name: str) -> str:
    """A variant's name where `/` and `+` cannot stand: `hep-ph+gr-qc/lora-all` -> `hep-ph_gr-qc.lora-all`."""
    return name.replace("/", ".").replace("+", "_")
