"""What the commands share: option types, and how they read input and print results. Imports nothing slow."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from feyntune.errors import UserError

DEFAULT_WORKDIR = Path("runs")
DEFAULT_REGISTRY = "runs/registry"

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object and nothing else.")]


def no_file(folder: Path) -> Path:
    """The value of an option that names a folder to write."""
    from feyntune.artifacts.artifact import require_no_file

    require_no_file(folder)
    return folder


Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.", callback=no_file)]
Data = Annotated[Path, typer.Option(help="Folder of a split.")]
Base = Annotated[str, typer.Option(help="Base model: a folder, s3://BUCKET/FOLDER, or a hub id such as ORG/NAME.")]
Adapters = Annotated[list[str], typer.Option("--adapter", help="Adapter as NAME=DIR; repeatable.")]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Recipe to merge over the default: a YAML file, inline JSON, or a name in recipes/ (tiny, paper).",
    ),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, such as train.learning_rate=1e-4; repeatable.")
]
MaxBad = Annotated[float, typer.Option(help="Fraction of unreadable records at which to stop.")]
ConvertedText = Annotated[
    bool,
    typer.Option("--converted-text", help="Accept formats that turn TeX into Unicode (never mix them with others)."),
]
RegistryUri = Annotated[str, typer.Option("--registry", help="Folder or s3:// address of the registry.")]
VersionName = Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")]
Alias = Annotated[str, typer.Option(help="champion, or champion:MIXTURE.")]


def setup_logging(quiet: bool = False) -> None:
    """Log to standard error; with `quiet` warnings only."""
    from feyntune.telemetry import setup

    setup(quiet=quiet)


def print_result(result: Any, as_json: bool, text: str) -> None:
    print(json.dumps(result) if as_json else text)


def print_table(rows: Iterable[Sequence[str]], head: Sequence[str], right: Sequence[int] = ()) -> None:
    """Print aligned columns without ever cutting a cell; `right` are the columns aligned to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


def print_wrapped(text: str) -> None:
    """Print a sentence in lines of the terminal's width, of 80 columns where there is none."""
    import shutil
    import textwrap

    width = shutil.get_terminal_size().columns - 1
    print(textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))


def names_of(text: str | None, option: str = "the list") -> list[str] | None:
    """`"a, b"` as a list; None where nothing is given.

    Raises:
        UserError: something is given that names nothing.
    """
    if text is None:
        return None
    names = [n.strip() for n in text.split(",") if n.strip()]
    if not names:
        raise UserError(f"{option} {text!r} names nothing: write names separated by commas, or leave it out.")
    return names


def pairs_of(items: Iterable[str], option: str = "--adapter NAME=DIR") -> dict[str, str]:
    """`NAME=DIR` items as a mapping, each folder of which exists."""
    pairs = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not equals:
            raise UserError(f"{item}: write {option}.")
        if "://" not in folder and not Path(folder).is_dir():
            raise UserError(f"{option.split()[0]} {item}: there is no folder {folder}.")
        pairs[name] = folder
    return pairs


def require_artifact(path: str | Path, kind: str, made_by: str) -> None:
    """Check that `path` is an artifact of `kind` without opening its files.

    Raises:
        UserError: no such folder, not an artifact, or of another kind; names a subfolder that is one.
    """
    folder = Path(path)
    if "://" in str(path):
        return
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}: make one with `feyntune {made_by}`.")
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        inner = next((p.parent for p in sorted(folder.glob("*/manifest.json")) if _kind(p) == kind), None)
        hint = f"did you mean {inner}?" if inner else f"`feyntune {made_by}` did not finish there, run it again."
        raise UserError(f"{folder} has no manifest.json: {hint}")
    if _kind(manifest) != kind:
        found, an = _kind(manifest), "an" if kind[0] in "aeo" else "a"
        raise UserError(f"{folder} is no {kind} but of kind {found}: give {an} {kind} that `feyntune {made_by}` wrote.")


def _kind(manifest: Path) -> str:
    from feyntune.artifacts.artifact import RENAMED_KINDS

    try:
        kind = str(json.loads(manifest.read_text(encoding="utf-8"))["kind"])
        return RENAMED_KINDS.get(kind, kind)
    except (ValueError, KeyError, TypeError, OSError):
        return "folder with an unreadable manifest.json"


def is_missing(registry: str) -> bool:
    """Whether a registry is the path of a folder that does not exist; of one in a store that is not looked up."""
    return "://" not in registry and not Path(registry).is_dir()


def adapters_of(items: Iterable[str]) -> dict[str, str]:
    """`NAME=DIR` items as a mapping, each folder an adapter."""
    adapters = pairs_of(items)
    for folder in adapters.values():
        require_artifact(folder, "adapter", "train")
    return adapters


def pinned_base(base: str) -> str:
    """`base` with its digest, after a look at its files that needs no torch."""
    from feyntune.model.base import check_base, pin_base

    pinned = pin_base(base)
    check_base(base)
    return pinned


def parse_object(text: str, option: str, example: str) -> dict[str, Any]:
    """A JSON object given on the command line."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise UserError(f"{option} is not JSON ({e}): write an object such as '{example}'.") from e
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object such as '{example}'.")
    return value


def recipe_of(source: str | None, changes: list[str] | None, base: str | None, quiet: bool = False) -> dict[str, Any]:
    """The recipe of a run over `base`, with what differs from its default on standard error."""
    from feyntune.recipe import changed_settings, default_recipe, read_recipe

    default = default_recipe(base)
    recipe = read_recipe(source, changes or (), default)
    differing = changed_settings(recipe, default)
    if differing and not quiet:
        print(f"recipe: {default}.yaml with {', '.join(differing)}", file=sys.stderr)
    return recipe


def validated(model: Any, values: dict[str, Any]) -> Any:
    """`values` as a pydantic model; the first error becomes one sentence."""
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}.") from e


def shown_path(path: Path) -> str:
    """`path` relative to the working directory where it lies below it."""
    import os

    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
