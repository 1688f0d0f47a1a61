"""Names shared by steps, and slugs of variants for places where a slash or a plus cannot be written."""

import re

BASE = "base"  # the name of the base model among the systems measured and served


def slug(name: str) -> str:
    """A variant's name without `/` and `+`: `hep-ph+gr-qc/lora-all` -> `hep-ph_gr-qc.lora-all`."""
    return name.replace("/", ".").replace("+", "_")


def split_seed(name: str) -> tuple[str, int | None]:
    """`hep-th/lora-qkv/seed1` -> (`hep-th/lora-qkv`, 1); a variant's first training has no seed in its name (None)."""
    named = re.fullmatch(r"(.+)/seed(\d+)", name)
    return (named[1], int(named[2])) if named else (name, None)


def seed_names(variant: str, first: int, count: int) -> list[str]:
    """Names of `count` trainings of one variant, with the seeds `first`, `first` + 1, …"""
    return [variant, *(f"{variant}/seed{first + i}" for i in range(1, count))]
