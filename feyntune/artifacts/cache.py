"""Where a branch of the suite (one variant, or the base) keeps its results in the store.

The place is a function of everything that decides the result, so a branch that was finished by an earlier run is
found, one that was interrupted goes on, and a change of corpus, base, recipe or code starts afresh:

    branches/CAMPAIGN/SLUG/checkpoints/…   while training
                           adapter/        sealed adapter
                           evaluation/     sealed scores
                           failures/ID/    sealed failures, the newest counts until an evaluation is there
"""

import hashlib
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from feyntune.artifacts.artifact import MANIFEST, sha256_json, write_artifact
from feyntune.artifacts.store import Store, pull, push
from feyntune.errors import Interrupted, UserError
from feyntune.names import slug
from feyntune.telemetry import log

_DECIDES_RESULTS = ("artifacts", "model", "engine", "ingestion", "splitting", "training", "evaluation")


@cache
def code_digest() -> str:
    """Digest of the code that decides what a branch results in."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for room in _DECIDES_RESULTS:
        for path in sorted((root / room).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def place(split_digest: str, base: str, recipe: dict[str, Any], code: str, variant: str) -> str:
    """The branch's prefix in the store. `base` is pinned: only its digest counts, not where it lies."""
    campaign = sha256_json({"split": split_digest, "base": base.rpartition("@")[2], "recipe": recipe, "code": code})
    return f"branches/{campaign[:16]}/{slug(variant)}"


def finished(store: Store, branch: str) -> bool:
    return store.exists(f"{branch}/evaluation/{MANIFEST}")


@contextmanager
def failure_as_data(store: Store, branch: str, step: str, variant: str, out: str | Path) -> Iterator[None]:
    """Turn an error inside a branch into a sealed `failure` at `out` and in the store; the step then ends normally.

    On a cluster nothing is scheduled after the first failed task, so a branch that failed must not fail its task:
    the other branches would lose their evaluations. `compare` reports it and `verdict` fails the run by name.
    Being interrupted is no failure: the task ends with exit code 75 and is retried.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as e:
        message = str(e) or type(e).__name__
        log.error("%s of %s failed: %s", step, variant, message)
        outcome = {
            "variant": variant,
            "step": step,
            "error": message,
            "traceback": "" if isinstance(e, UserError) else traceback.format_exc(),
        }
        shutil.rmtree(out, ignore_errors=True)  # a result that came before the error must not hide it
        with write_artifact(out, kind="failure", config=outcome) as folder:
            (folder.path / "outcome.json").write_text(json.dumps(outcome, indent=1))
        push(store, out, f"{branch}/failures/{time.time_ns():020d}")


def newest_failure(store: Store, branch: str, folder: Path) -> Path | None:
    """Pull the branch's newest failure to `folder`; None where it has none."""
    found = [n for n in store.names(f"{branch}/failures/") if n.endswith(f"/{MANIFEST}")]
    if not found:
        return None
    pull(store, max(found).removesuffix(f"/{MANIFEST}"), folder, kind="failure")
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for what a step pulls and does not keep."""
    with tempfile.TemporaryDirectory(prefix="feyntune-") as name:
        yield Path(name)
