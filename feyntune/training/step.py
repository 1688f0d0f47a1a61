"""The train step of a suite's branch: launch the training, keep its result or its failure."""

import sys
from pathlib import Path
from typing import Any

from feyntune.artifacts.artifact import is_artifact, read_manifest
from feyntune.artifacts.cache import capture_failure
from feyntune.artifacts.store import open_store
from feyntune.constants import TRAIN_RETRIES
from feyntune.errors import EXIT_INTERRUPTED, Interrupted
from feyntune.keys import last_attempt, variant_keys
from feyntune.names import split_seed
from feyntune.telemetry import setup
from feyntune.training.launch import launch


def train_branch(
    data: str,
    variant: str,
    base: str,
    recipe: dict[str, Any],
    devices: int,
    store: str,
    out: str,
) -> dict[str, float]:
    """Train `variant`, which may name a seed, into `out` (an `adapter`, or a `failure`); returns metrics for Kubeflow.

    Raises:
        SystemExit: with code 75 when the training was stopped and has saved; Kubeflow retries the task.
    """
    setup()
    name, seed = split_seed(variant)
    mixture, _, method = name.rpartition("/")
    config = {**recipe.get("train", {}), "devices": devices, **({} if seed is None else {"seed": seed})}
    training, branch = variant_keys(read_manifest(data).digest, base, recipe, variant)
    try:
        with capture_failure(open_store(store), branch, "train", variant, out, last_attempt(TRAIN_RETRIES)):
            launch(
                data=data,
                mixture=mixture,
                method=method,
                base=base,
                out=out,
                config=config,
                checkpoints=f"{store.rstrip('/')}/{training}",
            )
    except Interrupted:
        sys.exit(EXIT_INTERRUPTED)
    if not is_artifact(out) or not (Path(out) / "adapter_config.json").is_file():
        return {}
    stats = read_manifest(out).stats
    return {k: float(stats[k]) for k in ("seconds", "train_tokens", "tokens_per_second") if k in stats}
