"""The variants of variants.yaml."""

import difflib
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from feyntune.errors import UserError
from feyntune.names import METHODS, variant_name


class Mixture(BaseModel):
    """A mixture that variants are trained on; its rule stands in feyntune/splitting/mixtures.yaml."""

    model_config = ConfigDict(extra="forbid")

    name: str
    paper: str | None = None
    numbering: str | None = None


class Variants(BaseModel):
    """The file variants.yaml."""

    model_config = ConfigDict(extra="forbid")

    methods: dict[str, str] = Field(min_length=1)
    mixtures: list[Mixture] = Field(min_length=1)

    def names(self) -> list[str]:
        return [variant_name(m.name, method) for m in self.mixtures for method in self.methods]


def load_variants() -> Variants:
    variants = Variants.model_validate(yaml.safe_load((Path(__file__).parent / "variants.yaml").read_text()))
    assert set(variants.methods) == set(METHODS)
    return variants


def select_variants(wanted: list[str]) -> list[str]:
    """`wanted` in the order of variants.yaml. The paper's short names (`s3/lora-all`) are understood.

    Raises:
        UserError: a name that is not a variant, with the nearest one that is.
    """
    variants = load_variants()
    theirs = [m for m in variants.mixtures if m.paper]
    aliases = {f"{m.paper}/{method}": f"{m.name}/{method}" for m in theirs for method in variants.methods}
    known = variants.names()
    found = []
    for name in wanted:
        full = aliases.get(name, name)
        if full not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise UserError(f"There is no variant {name!r}: {hint}")
        found.append(full)
    if not found:
        raise UserError("No variant is chosen: name at least one, such as hep-th/lora-all.")
    return [name for name in known if name in found]
