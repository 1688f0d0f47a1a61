"""The catalog of variants: mixtures and LoRA methods, read from variants.yaml."""

import difflib
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from feyntune.errors import UserError

CATALOG = Path(__file__).with_name("variants.yaml")
ARCHIVES = {
    *("astro-ph", "cond-mat", "cs", "econ", "eess", "gr-qc", "hep-ex", "hep-lat", "hep-ph", "hep-th", "math"),
    *("math-ph", "nlin", "nucl-ex", "nucl-th", "physics", "q-bio", "q-fin", "quant-ph", "stat"),
}

Amount = Literal["all", "fill"] | Annotated[str, Field(pattern=r"^[1-9][0-9]?%$")]

_MIXTURE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_CATEGORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9-]+)*")  # of arXiv, or of a corpus of another field
_METHOD = re.compile(r"[a-z0-9][a-z0-9-]*")


class Mixture(BaseModel):
    """One training mixture; variants.yaml describes the fields."""

    model_config = ConfigDict(extra="forbid")

    name: str
    parts: dict[str, Amount] = Field(min_length=1)
    size: str | None = None
    rule: str = ""
    source: str = ""
    paper: str | None = None
    numbering: Literal["documented", "inferred"] | None = None
    paper_training_papers: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Mixture":
        if not _MIXTURE.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is not the name of a mixture: use a-z, 0-9, '.', '+' and '-'")
        for part in self.parts:
            archive = part.split(".")[0]
            if not _CATEGORY.fullmatch(part):
                raise ValueError(f"{part!r} is not a category: use letters, digits, '-' and '.'")
            if archive not in ARCHIVES and (near := difflib.get_close_matches(archive.lower(), ARCHIVES, 1, 0.8)):
                raise ValueError(f"{part!r} is no arXiv archive or category: did you mean {near[0]}?")
            if part.split(".")[0] != part and part.split(".")[0] in self.parts:
                raise ValueError(f"{part} lies in {part.split('.')[0]}, its papers would count twice: keep one")
        if self.percents():
            if len(self.percents()) < len(self.parts):
                raise ValueError("percentages do not mix with `all` and `fill`: use one or the other")
            if sum(self.percents()) != 100:
                raise ValueError(f"the percentages add up to {sum(self.percents())}: make them 100")
        needs_size = bool(self.percents()) or "fill" in self.parts.values()
        if needs_size and self.size is None:
            raise ValueError("percentages and `fill` need `size`: name the mixture whose size this one takes")
        if self.size is not None and not needs_size:
            raise ValueError("`size` has no effect when every part is `all`: use `fill` or percentages, or drop it")
        return self

    def percents(self) -> list[int]:
        return [int(a[:-1]) for a in self.parts.values() if a.endswith("%")]


class Mixtures(BaseModel):
    """A file of mixtures (`feyntune split --mixtures FILE`)."""

    model_config = ConfigDict(extra="forbid")

    mixtures: list[Mixture] = Field(min_length=1)

    @model_validator(mode="after")
    def _sizes_are_defined(self) -> "Mixtures":
        by_name = {m.name: m for m in self.mixtures}
        if len(by_name) < len(self.mixtures):
            names = [m.name for m in self.mixtures]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is defined twice: rename one")
        for m in self.mixtures:
            if m.size is not None and m.size not in by_name:
                raise ValueError(f"{m.name} takes the size of {m.size}, which the file does not define: add it")
            if m.size is not None and by_name[m.size].size is not None:
                raise ValueError(f"{m.name} takes the size of {m.size}, which has a `size` itself: name an `all` one")
        return self


class Method(BaseModel):
    """A LoRA method: which projections of every layer get LoRA matrices."""

    model_config = ConfigDict(extra="forbid")

    description: str
    target_modules: list[str] = Field(min_length=1)


class Catalog(Mixtures):
    """variants.yaml: every mixture is trained by every method."""

    methods: dict[Annotated[str, Field(pattern=f"^{_METHOD.pattern}$")], Method] = Field(min_length=1)

    def names(self) -> list[str]:
        return [f"{m.name}/{method}" for m in self.mixtures for method in self.methods]


_File = TypeVar("_File", bound=Mixtures)


def _load(path: str | Path, model: type[_File]) -> _File:
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the safe loader, in C where there is one
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as a mixtures file ({e}): correct the path.") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path} is not YAML ({' '.join(str(e).split())}): correct it.") from e
    return _validate(raw, model, str(path))


def _validate(raw: Any, model: type[_File], name: str) -> _File:
    try:
        return model.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = list(first["loc"])
        if len(where) > 1 and isinstance(where[1], int):  # a mixture by its name rather than its number
            entry = raw["mixtures"][where[1]]
            where[1] = entry.get("name", where[1]) if isinstance(entry, dict) else where[1]
        field = " ".join(str(w) for w in where[1:]) or str(where[0] if where else "mixtures")
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "model_type":  # the whole file is something else
            reason = "write a list under `mixtures:`, as docs/your-own.md shows"
        raise UserError(f"{name}: {field}: {reason.rstrip('?.')}{'?' if reason.endswith('?') else '.'}") from e


@cache
def load_variants() -> Catalog:
    """The catalog."""
    return _load(CATALOG, Catalog)


def load_mixtures(source: str | Path | list[dict[str, Any]] | None = None) -> list[Mixture]:
    """The mixtures of a YAML file, or of its list as a value, in its order; without one, those of the catalog.

    Raises:
        UserError: the file does not exist, is not YAML, or a mixture in it is inconsistent (named).
    """
    if isinstance(source, list):
        return _validate({"mixtures": source}, Mixtures, "mixtures").mixtures
    return _load(source, Mixtures).mixtures if source is not None else load_variants().mixtures


METHODS = tuple(load_variants().methods)


def variant_name(mixture: str, method: str) -> str:
    """`hep-th`, `lora-qkv` -> `hep-th/lora-qkv`.

    Raises:
        ValueError: not the name of a mixture, or not a method of the catalog.
    """
    if not _MIXTURE.fullmatch(mixture) or method not in METHODS:
        name = f"{mixture}/{method}"
        raise ValueError(f"{name!r} is not a variant: write MIXTURE/METHOD with METHOD one of {', '.join(METHODS)}")
    return f"{mixture}/{method}"


def select_variants(requested: list[str], mixtures: list[Mixture] | None = None) -> list[str]:
    """`requested` in the order of variants.yaml. The paper's short names (`s3/lora-all`) are understood.

    Args:
        mixtures: in place of those of the catalog.

    Raises:
        UserError: a name that is not a variant, with the nearest one that is.
    """
    own = mixtures is not None
    mixtures = load_variants().mixtures if mixtures is None else mixtures
    aliases = {f"{m.paper}/{method}": f"{m.name}/{method}" for m in mixtures for method in METHODS if m.paper}
    known = [f"{m.name}/{method}" for m in mixtures for method in METHODS]
    selected = []
    for name in requested:
        full = aliases.get(name, name)
        if full not in known:
            near = [n for n in known if n.startswith(f"{name}/")] or difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {' or '.join(near)}?" if near else "docs/reference/variants.md lists all of them."
            if own:
                hint = f"your mixtures give {', '.join(known)}."
            raise UserError(f"There is no variant {name!r}: {hint}")
        selected.append(full)
    if not selected:
        raise UserError("No variant is selected: name at least one, such as hep-th/lora-all.")
    return [name for name in known if name in selected]
