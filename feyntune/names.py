"""Names shared by steps, and slugs of variants for places where a slash or a plus cannot be written."""

BASE = "base"  # the name of the base model among the systems measured and served


def slug(name: str) -> str:
    """A variant's name without `/` and `+`: `hep-ph+gr-qc/lora-all` -> `hep-ph_gr-qc.lora-all`."""
    return name.replace("/", ".").replace("+", "_")
