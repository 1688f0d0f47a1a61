"""What the glue components do: checks before the first expensive step, and the verdict after the last."""

import hashlib
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from feyntune.artifacts.cache import DATA_VERSION, EVALUATION_VERSION, TRAINING_VERSION, is_finished
from feyntune.artifacts.names import expand
from feyntune.artifacts.store import open_store
from feyntune.errors import UserError
from feyntune.keys import variant_keys
from feyntune.model.base import pin_base
from feyntune.telemetry import log, setup
from feyntune.variants import select_variants


class BranchesFailed(Exception):
    """Some branches of the run failed; their results are missing from the report, which names them."""


class Pinned(NamedTuple):
    variants: list[str]  # full names, in the order of variants.yaml
    base: str  # LOCATION@DIGEST
    fingerprint: str  # changes when the source or the code that reads it does
    code: str  # versions of the training and evaluation steps, for the run's page


def preflight(
    source: str,
    variants: list[str],
    base: str,
    recipe: dict[str, Any],
    devices: int,
    store: str,
    registry: str,
    serving: dict[str, Any] | None = None,
    days: dict[str, str] | None = None,
    categories: list[str] | None = None,
) -> Pinned:
    """Check everything a run needs, in seconds.

    Args:
        days: parameters that are days, by name; "" where none is given.
        categories: what is ingested, by primary category; None is all.

    Raises:
        UserError: an unknown variant or setting, a day that is none, test categories that are not ingested, a source
            that is not there, a base that cannot be found, a store that cannot be written, a serving description that
            no endpoint can have.
    """
    setup()
    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.ingestion.fields import CategoryFilter, parse_day
    from feyntune.training.config import parse_config

    names = select_variants(variants)
    unknown = set(recipe) - {"train", "evaluate"}
    if unknown:
        raise UserError(f"recipe holds {', '.join(sorted(unknown))}; it has two parts, train and evaluate.")
    parse_config({**recipe.get("train", {}), "devices": devices})
    try:
        scored = EvaluateConfig.model_validate(recipe.get("evaluate", {})).categories
    except ValidationError as e:
        first = e.errors()[0]
        raise UserError(f"recipe.evaluate.{'.'.join(map(str, first['loc']))}: {first['msg']}.") from e
    for name, day in (days or {}).items():
        parse_day(name, day or None)
    read = CategoryFilter(categories)
    for category in scored:
        if not read.accepts(category) and not any(c.startswith(f"{category}.") for c in read.names or ()):
            raise UserError(
                f"recipe.evaluate.categories: {category} is not among what is ingested "
                f"(categories: {', '.join(sorted(read.names or ()))})."
            )
    if serving:
        from feyntune.deployment.deploy import serving_of_run

        serving_of_run(serving, base, registry)
    for address in dict.fromkeys((store, registry)):
        writable(address)
    pinned = Pinned(names, pin_base(base), source_fingerprint(source), f"{TRAINING_VERSION} {EVALUATION_VERSION}")
    log.info("base %s, store %s: ready", pinned.base, store)
    return pinned


def refuse_null(value: Any, name: str) -> None:
    """Raises UserError where a parameter holds null, which Kubeflow's own library cannot pass on."""
    if value is None:
        raise UserError(f"{name} is null, which Kubeflow cannot pass: leave it out, or write false to switch it off.")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        refuse_null(inner, f"{name}.{key}")


def writable(address: str) -> None:
    """Write, read and delete one small object."""
    store, name, data = open_store(address), f"preflight/{uuid.uuid4()}", b"feyntune"
    store.put(name, data)
    if store.get(name) != data:
        raise UserError(f"{store.uri}/{name} was read back changed: the store is not to be trusted, check it.")
    store.delete(name)


def source_fingerprint(source: str) -> str:
    """A string that changes when the source may have changed.

    A file counts by its size and time of change; a harvest of a live archive by the day, since archives change
    nightly; the generator by its number of papers.
    """
    kind, _, rest = source.partition(":")
    if kind in ("kaggle", "atom", "jsonl"):
        path = expand(rest)
        if not path.is_file():
            raise UserError(f"Source {source}: there is no file {rest}.")
        stat = path.stat()
        version = f"{stat.st_size} {stat.st_mtime_ns}"
    elif kind == "oai":
        version = datetime.now(UTC).date().isoformat()
    elif kind == "synthetic":
        version = ""
    else:
        raise UserError(f"Source {source!r}: write kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.")
    return hashlib.sha256(f"{source} {version} {DATA_VERSION}".encode()).hexdigest()[:16]


def todo(variant: str, split: str, base: str, recipe: dict[str, Any], code: str, store: str) -> str:
    """The evaluation key of `variant`, or "" when its scores are in the store."""
    training, evaluation = variant_keys(split, base, recipe, variant)
    done = is_finished(open_store(store), evaluation)
    print(f"{variant}: {'finished earlier' if done else 'to do'}, {evaluation}, adapter: {training or 'none'}")
    return "" if done else evaluation


def verdict(comparison: str) -> None:
    """Raise, naming the branches that failed and why, if any did."""
    failures = json.loads((Path(comparison) / "summary.json").read_text())["failures"]
    if failures:
        why = "; ".join(f"{f['variant']} ({f['step']}): {' '.join(f['error'].split())}" for f in failures)
        raise BranchesFailed(f"{len(failures)} of the run's branches failed, the others stand in the report: {why}")
