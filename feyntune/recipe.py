"""Recipes: the settings of training and evaluation as a person gives them, `{train: …, evaluate: …}`.

A recipe is a YAML file, inline JSON or the name of a file in recipes/, and single values (`train.epochs=2`). It is
merged over the default of its run, so that it needs only what differs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from feyntune.artifacts.names import split_pin
from feyntune.errors import UserError

if TYPE_CHECKING:
    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.training.config import TrainConfig

FOLDER = Path(__file__).with_name("recipes")
TINY_PARAMETERS = 10_000_000


def read_recipe(source: str | None = None, changes: Sequence[str] = (), default: str = "paper") -> dict[str, Any]:
    """The settings that differ from the models' defaults, which are the published recipe's.

    Args:
        source: a YAML or JSON file, inline JSON, or the name of a file in recipes/ (`tiny`).
        changes: single values, `train.learning_rate=1e-4`; they win over `source`.
        default: the recipe that `source` is merged over: "paper" or "tiny".

    Raises:
        UserError: no such file, not YAML, an unknown setting or an invalid value; names file and setting.
    """
    recipe = _file(FOLDER / f"{default}.yaml")
    if source:
        name = "--recipe" if source.lstrip().startswith("{") else source
        given = _parse(source, name) if name == "--recipe" else _file(_path(source))
        check_recipe(given, name)
        recipe = merge(recipe, given)
    for change in changes:
        recipe = merge(recipe, _change(change))
    train, evaluate = check_recipe(recipe, "--set" if changes else "recipe")
    differing = {
        "train": _difference(train.model_dump(mode="json"), type(train)().model_dump(mode="json")),
        "evaluate": _difference(evaluate.model_dump(mode="json"), type(evaluate)().model_dump(mode="json")),
    }
    return {part: values for part, values in differing.items() if values}


def changed_settings(recipe: dict[str, Any], default: str) -> list[str]:
    """What differs from a default recipe: `train.epochs 2 (tiny.yaml: 1)`, one entry a setting."""
    usual = dict(_flat(read_recipe(default=default)))
    flat = dict(_flat(recipe))
    published = dict(_flat(_file(FOLDER / "paper.yaml")))
    lines = []
    for name in [*flat, *(n for n in usual if n not in flat)]:
        value, before = flat.get(name, published.get(name)), usual.get(name, published.get(name))
        if value != before:
            lines.append(f"{name} {json.dumps(value)} ({default}.yaml: {json.dumps(before)})")
    return lines


def default_recipe(base: str | None) -> str:
    """The name of the default recipe of a run over `base`: "tiny" for a tiny model that `feyntune` made."""
    if base is None:
        return "tiny"
    try:
        manifest = json.loads((Path(split_pin(base)[0]) / "manifest.json").read_text(encoding="utf-8"))
        return "tiny" if manifest["stats"]["parameters"] < TINY_PARAMETERS else "paper"
    except (OSError, ValueError, KeyError, TypeError):
        return "paper"


def merge(default: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`default` with the values of `given`, section by section."""
    merged = dict(default)
    for key, value in given.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _path(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    if source in shipped:
        return FOLDER / f"{source}.yaml"
    raise UserError(f"--recipe {source}: no such file; named recipes are {', '.join(shipped)}.")


def _file(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--recipe {path} cannot be read ({e}): correct the path.") from e


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C if available
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{name} is not YAML ({' '.join(str(e).split())}): see recipes/paper.yaml.") from e
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} has no settings: write sections train and evaluate, as in recipes/paper.yaml.")
    return value or {}


def _change(text: str) -> dict[str, Any]:
    """`train.learning_rate=1e-4` as `{"train": {"learning_rate": …}}`."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UserError(f"--set {text}: write SECTION.SETTING=VALUE, such as train.learning_rate=1e-4.")
    try:
        parsed: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"--set {text}: {value} is not a YAML value ({' '.join(str(e).split())}).") from e
    for key in reversed(keys):
        parsed = {key: parsed}
    return dict(parsed)


def check_recipe(
    recipe: dict[str, Any], name: str = "recipe", devices: int | None = None
) -> tuple[TrainConfig, EvaluateConfig]:
    """Both sections as their models.

    Args:
        name: where the recipe comes from, for error messages.
        devices: a run's own parameter, which replaces `train.devices`.

    Raises:
        UserError: an unknown section or setting, or an invalid value.
    """
    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.training.config import TrainConfig, parse_config

    for key, part in recipe.items():
        if key not in ("train", "evaluate"):
            home = (
                "train" if key in TrainConfig.model_fields else "evaluate" if key in EvaluateConfig.model_fields else ""
            )
            hint = f"write it under {home}" if home else "its sections are train and evaluate"
            raise UserError(f"{name}: no section {key}: {hint}.")
        if not isinstance(part, dict) or not all(isinstance(setting, str) for setting in part):
            raise UserError(f"{name}: {key} must hold settings, such as {key}.precision.")
    try:
        train = parse_config(recipe.get("train", {}) | ({"devices": devices} if devices is not None else {}))
    except UserError as e:
        raise UserError(str(e).replace("Recipe:", f"{name}:", 1)) from e
    try:
        return train, EvaluateConfig.model_validate(recipe.get("evaluate", {}))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = [str(part) for part in first["loc"]]
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            paths = {path.rpartition(".")[2]: path for path in _names(EvaluateConfig)}
            near = difflib.get_close_matches(where[-1], paths, n=1)
            reason = "there is no such setting" + (f", perhaps evaluate.{paths[near[0]]}" if near else "")
        raise UserError(f"{name}: evaluate.{'.'.join(where)}: {reason.rstrip('.')}.") from e


def _names(model: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all settings, such as completions.papers."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.default, BaseModel):
            yield from _names(type(field.default), f"{prefix}{name}.")


def _difference(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The entries that are not the default; None, which Kubeflow cannot pass, is written as false."""
    differing: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults[key]
        if isinstance(value, dict) and isinstance(default, dict):
            if inner := _difference(value, default):
                differing[key] = inner
        elif value != default:
            differing[key] = False if value is None else value
    return differing


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
