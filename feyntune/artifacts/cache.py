"""Where a run keeps the results of one variant (or of the base) in the store, and how a finished result is found again.

Two keys, one for each expensive step, so that nothing is computed again that is still valid:

    training/KEY/SLUG/     checkpoints/…   while training
                           adapter/        the trained adapter
    evaluations/KEY/SLUG/  evaluation/     scores and completions
                           failures/ID/    failures; the newest counts until there is an evaluation

The training key covers the split, the base model, the settings that decide the adapter, and TRAINING_VERSION. The
evaluation key covers the training key, the evaluation's settings, and EVALUATION_VERSION. A version is raised by hand
when the step's code changes what it computes; a test compares the files listed here with a frozen digest.
"""

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from feyntune.artifacts.artifact import MANIFEST, sha256_json, write_artifact
from feyntune.artifacts.store import Store, StoreError, pull, push
from feyntune.errors import Interrupted, UserError
from feyntune.names import slug
from feyntune.telemetry import log

DATA_VERSION = "feyntune-data-2"  # of ingest and split together
TRAINING_VERSION = "feyntune-training-1"
EVALUATION_VERSION = "feyntune-evaluation-3"

# The files whose code decides what a step computes, from the package's folder.
VERSIONED_FILES = {
    DATA_VERSION: ("artifacts/records.py", "ingestion/*.py", "splitting/*.py", "variants.yaml"),
    TRAINING_VERSION: (
        "model/load.py",
        "model/packed.py",
        "training/batches.py",
        "training/dropout.py",
        "training/lora.py",
        "training/loss.py",
        "training/runner.py",
        "training/train.py",
    ),
    EVALUATION_VERSION: (
        "model/load.py",
        "model/packed.py",
        "engine/attention.py",
        "engine/batching.py",
        "engine/lora.py",
        "engine/manager.py",
        "engine/sampling.py",
        "evaluation/completions.py",
        "evaluation/as_served.py",
        "evaluation/evaluate.py",
        "evaluation/extraction.py",
        "evaluation/prompts.py",
        "evaluation/retention.py",
        "evaluation/scoring.py",
    ),
}


def training_key(split_digest: str, base: str, metadata: dict[str, Any], version: str = TRAINING_VERSION) -> str:
    """Prefix in the store of one variant's checkpoints and adapter.

    Args:
        base: `LOCATION@DIGEST`; only the digest counts.
        metadata: `adapter_metadata` of the variant.
    """
    key = {"split": split_digest, "base": base.rpartition("@")[2], "adapter": metadata, "version": version}
    return f"training/{_short(key)}/{slug(metadata['variant'])}"


def evaluation_key(
    split_digest: str,
    base: str,
    training: str | None,
    settings: dict[str, Any],
    name: str,
    version: str = EVALUATION_VERSION,
) -> str:
    """Prefix in the store of one system's scores.

    Args:
        training: the variant's `training_key`; None for the base model itself.
        settings: the whole evaluation configuration, defaults included.
        name: the variant, or the base's name.
    """
    key = {"split": split_digest, "base": base.rpartition("@")[2], "training": training, "settings": settings}
    return f"evaluations/{_short(key | {'version': version})}/{slug(name)}"


def is_finished(store: Store, evaluation: str) -> bool:
    """Whether the scores under this evaluation key are in the store."""
    return store.exists(f"{evaluation}/evaluation/{MANIFEST}")


@contextmanager
def capture_failure(
    store: Store, evaluation: str, step: str, variant: str, out: str | Path, last_attempt: bool = True
) -> Iterator[None]:
    """Turn an error of one variant's step into a `failure` artifact at `out` and in the store; the step then succeeds.

    A failed task stops the whole pipeline, and the other variants would lose their results. So a variant's failure
    travels as data: `compare` reports it, and the last step fails the run by name. Invalid input (UserError) is
    captured at once, since another try would end the same way. Any other error, a store's too, fails the task, so
    that the cluster retries it, until `last_attempt`. An interruption is never captured.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as e:
        invalid = isinstance(e, UserError) and not isinstance(e, StoreError)
        if not invalid and not last_attempt:
            raise
        message = str(e) or type(e).__name__
        log.error("%s of %s failed: %s", step, variant, message)
        outcome = {
            "variant": variant,
            "step": step,
            "error": message,
            "traceback": "" if isinstance(e, UserError) else traceback.format_exc(),
        }
        shutil.rmtree(out, ignore_errors=True)  # a result written before the error must not hide it
        with write_artifact(out, kind="failure", config=outcome) as folder:
            (folder.path / "outcome.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
        push(store, out, f"{evaluation}/failures/{time.time_ns():020d}")


def newest_failure(store: Store, evaluation: str, folder: Path) -> Path | None:
    """Pull the newest failure under an evaluation key to `folder`; None if there is none."""
    failures = [n for n in store.names(f"{evaluation}/failures/") if n.endswith(f"/{MANIFEST}")]
    if not failures:
        return None
    pull(store, max(failures).removesuffix(f"/{MANIFEST}"), folder, kind="failure")
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for what a step pulls and does not keep."""
    with tempfile.TemporaryDirectory(prefix="feyntune-") as name:
        yield Path(name)


def _short(key: dict[str, Any]) -> str:
    return sha256_json(key)[:16]
