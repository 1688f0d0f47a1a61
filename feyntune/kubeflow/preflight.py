"""Checks before the first expensive step, what is still to be done, and whether any variant failed."""

import hashlib
import json
import os
import re
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from feyntune.artifacts.artifact import read_manifest
from feyntune.artifacts.cache import DATA_VERSION, is_finished
from feyntune.artifacts.names import local_file, split_pin
from feyntune.artifacts.store import open_store
from feyntune.constants import CPUS_PER_GPU, MEMORY_LIMIT_PER_GPU, MEMORY_PER_GPU
from feyntune.errors import UserError, VariantsFailed
from feyntune.keys import variant_keys
from feyntune.model.base import pin_base
from feyntune.names import seed_names
from feyntune.recipe import check_recipe
from feyntune.telemetry import log, setup
from feyntune.training.config import parse_config
from feyntune.variants import METHODS, load_mixtures, select_variants, variant_name


class Pinned(NamedTuple):
    variants: list[str]  # full names, in the order of variants.yaml; with several seeds one for each training
    base: str  # LOCATION@DIGEST
    fingerprint: str  # changes when the source or the code that reads it does
    gpus: str  # what a training pod asks for, as Kubernetes writes it: Kubeflow takes only texts for it
    cpus: str
    memory: str
    memory_limit: str


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
    mixtures: list[dict[str, Any]] | None = None,
    max_bad: float = 0.001,
) -> Pinned:
    """Check everything a run needs, in seconds.

    Args:
        days: parameters that are days, by name; "" where none is given.
        categories: what is ingested, by primary category; None is all.
        mixtures: mixtures in place of the catalog's; without `variants`, all variants of them.
        max_bad: share of unusable records above which the corpus is refused.

    Raises:
        UserError: what `check_input` refuses, a base that cannot be found, a store that cannot be written.
    """
    setup()
    names = check_input(source, variants, base, recipe, devices, registry, serving, days, categories, mixtures, max_bad)
    for address in dict.fromkeys((store, registry)):
        writable(address)
    train = parse_config(recipe.get("train", {}))
    trainings = [training for name in names for training in seed_names(name, train.seed, train.seeds)]
    pinned = Pinned(trainings, pin_base(base), source_fingerprint(source), *pod_resources(devices))
    log.info("base model %s, store %s: ready", split_pin(pinned.base)[0], store)
    return pinned


def check_input(
    source: str,
    variants: list[str],
    base: str,
    recipe: dict[str, Any],
    devices: int,
    registry: str,
    serving: dict[str, Any] | None = None,
    days: dict[str, str] | None = None,
    categories: list[str] | None = None,
    mixtures: list[dict[str, Any]] | None = None,
    max_bad: float = 0.001,
) -> list[str]:
    """The checks of `preflight` that need no store and no network; returns the full names of the variants.

    Raises:
        UserError: an unknown variant or setting, a day that is none, a mixture or test category that is not ingested,
            a source that is not there, a serving description that no endpoint can have.
    """
    from feyntune.evaluation.retention import retention_papers
    from feyntune.ingestion.fields import CategoryFilter, parse_day

    names = choose_variants(variants, mixtures)
    _, evaluate = check_recipe(recipe, devices=devices)
    for name, day in (days or {}).items():
        parse_day(name, day or None)
    if not 0 <= max_bad <= 1:
        raise UserError(f"max_bad is {max_bad}, not a share: give a number between 0 and 1, such as 0.001.")
    ingested = CategoryFilter(categories)
    needed = dict.fromkeys(evaluate.categories, "recipe: evaluate.categories")
    drawn = {name.rpartition("/")[0] for name in names}
    for m in load_mixtures(mixtures or None):
        if m.name in drawn:
            needed |= dict.fromkeys(m.parts, f"mixture {m.name}")
    for category, what in needed.items():
        if not ingested.accepts(category) and not any(c.startswith(f"{category}.") for c in ingested.names or ()):
            raise UserError(
                f"{what}: {category} is not among what is ingested "
                f"(categories: {', '.join(sorted(ingested.names or ()))})."
            )
    source_fingerprint(source)
    retention_papers(evaluate.retention, evaluate.retention_texts)  # a set that cannot be read is found here
    if serving:
        from feyntune.deployment.deploy import serving_of_run

        serving_of_run(serving, base, registry)
    return names


def pod_resources(gpus: int) -> tuple[str, str, str, str]:
    """GPUs, cores, requested memory and its limit of a training pod; `adapt` writes a cluster's own share of a GPU."""
    cpus = float(os.environ.get("FEYNTUNE_CPUS_PER_GPU", CPUS_PER_GPU))
    memory = int(os.environ.get("FEYNTUNE_MEMORY_PER_GPU", MEMORY_PER_GPU))
    limit = max(memory, MEMORY_LIMIT_PER_GPU)
    return str(gpus), f"{cpus * gpus:g}", f"{memory * gpus}Gi", f"{limit * gpus}Gi"


def choose_variants(variants: list[str], mixtures: list[dict[str, Any]] | None = None) -> list[str]:
    """The full names of `variants`; of mixtures of your own (not an empty list) an empty list takes them all.

    Raises:
        UserError: a mixture that does not hold together, or a name that is no variant of them.
    """
    own = load_mixtures(mixtures) if mixtures else None
    every = [variant_name(m.name, method) for m in own or () for method in METHODS]
    return select_variants(variants or every, own)


def refuse_null(value: Any, name: str) -> None:
    """Raises UserError where a parameter holds null, which Kubeflow's own library cannot pass on."""
    if value is None:
        raise UserError(f"{name} is null, which Kubeflow cannot pass: leave it out, or write false to disable it.")
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        refuse_null(inner, f"{name}.{key}")


def writable(address: str) -> None:
    """Write, read and delete one small object."""
    store, name, data = open_store(address), f"preflight/{uuid.uuid4()}", b"feyntune"
    store.put(name, data)
    if store.get(name) != data:
        raise UserError(f"{store.uri}/{name} was read back changed: check the store's consistency.")
    store.delete(name)


def source_fingerprint(source: str) -> str:
    """A string that changes when the source may have changed.

    A file counts by its size and time of change; a harvest of a live archive by the day, since archives change
    nightly; the generator by its number of papers.
    """
    kind, _, rest = source.partition(":")
    if kind in ("kaggle", "atom", "jsonl"):
        path = local_file(rest)
        if not path.is_file():
            raise UserError(f"Source {source}: there is no file {rest}.")
        stat = path.stat()
        version = f"{stat.st_size} {stat.st_mtime_ns}"
    elif kind == "oai":
        if not re.match(r"https?://[^/]", rest):
            raise UserError(f"Source {source}: write oai:URL, such as oai:https://oaipmh.arxiv.org/oai.")
        version = datetime.now(UTC).date().isoformat()
    elif kind == "synthetic":
        if not re.fullmatch(r"\d+(:\d+)?", rest):
            raise UserError(f"Source {source}: write synthetic:N, or synthetic:N:SEED, with whole numbers.")
        version = ""
    else:
        raise UserError(f"Source {source!r}: write kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.")
    return hashlib.sha256(f"{source} {version} {DATA_VERSION}".encode()).hexdigest()[:16]


def check_cache(data: str, systems: list[str], base: str, recipe: dict[str, Any], store: str) -> list[str]:
    """Those of `systems` (variants, or the base) without scores in the store for this split, base model and recipe."""
    setup()
    split, artifacts = read_manifest(data).digest, open_store(store)
    pending = []
    for name in systems:
        _, evaluation = variant_keys(split, base, recipe, name)
        done = is_finished(artifacts, evaluation)
        log.info("%s: %s, %s", name, "finished earlier" if done else "to do", evaluation)
        if not done:
            pending.append(name)
    return pending


def plan_table(systems: list[str], pending: list[str]) -> str:
    """Markdown for the Kubeflow UI, whose graph shows the iterations of a loop by number only."""
    lines = ["| iteration | variant |", "|---:|---|"]
    lines += [f"| {i} | {name} |" for i, name in enumerate(pending)]
    lines += [f"| finished earlier | {name} |" for name in systems if name not in pending]
    return "\n".join(lines) + "\n"


def fail_if_any_failed(comparison: str) -> None:
    """Raise, naming the variants that failed and why, if any did.

    Raises:
        VariantsFailed: at least one failed.
    """
    failures = json.loads((Path(comparison) / "summary.json").read_text(encoding="utf-8"))["failures"]
    if failures:
        why = "; ".join(f"{f['variant']} ({f['step']}): {' '.join(f['error'].split())}" for f in failures)
        count = "1 variant" if len(failures) == 1 else f"{len(failures)} variants"
        raise VariantsFailed(f"{count} failed, the others are in the report: {why}")
