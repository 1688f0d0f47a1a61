"""Where a base model lies, and pinning it: `LOCATION@DIGEST`, so that every step uses the same weights.

No heavy imports here: the preflight step runs in a second.
"""

import hashlib
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from feyntune.artifacts.artifact import MANIFEST, is_artifact, read_manifest, sha256_file, sha256_json, write_artifact
from feyntune.artifacts.store import Store, open_store, pull, push, stored_manifest
from feyntune.errors import UserError

_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")


def split_pin(base: str) -> tuple[str, str | None]:
    """`LOCATION@DIGEST` as (location, digest); digest is None where there is none."""
    location, at, digest = base.rpartition("@")
    return (location, digest) if at else (base, None)


def pin_base(base: str) -> str:
    """`base` with its digest: of a folder its content, of a hub model its commit.

    Raises:
        UserError: the model cannot be found, or is not what its pin says.
    """
    location, expected = split_pin(base)
    if location.startswith("s3://"):
        manifest = stored_manifest(*_stored(location))
        if manifest is None:
            raise UserError(f"Base model {location} is not an artifact: put it there with `feyntune push-base`.")
        digest = manifest.digest
    elif Path(location).is_dir():
        digest = folder_digest(location)
    elif _looks_like_hub_id(location):
        digest = _hub_commit(location, expected)
    else:
        raise UserError(f"Base model {location}: there is no such folder, and it is not a hub id like ORG/NAME.")
    if expected is not None and expected != digest:
        raise UserError(f"Base model {location} has digest {digest[:16]}, the run was pinned to {expected[:16]}.")
    return f"{location}@{digest}"


def folder_digest(folder: str | Path) -> str:
    """Digest of a model folder: its manifest's if it is an artifact, else of its files' contents."""
    folder = Path(folder)
    if is_artifact(folder):
        return read_manifest(folder).digest
    if not (folder / "config.json").is_file():
        raise UserError(f"Base model {folder}: there is no config.json in it; give the folder of a saved model.")
    names = _model_files(folder)
    return _folder_digest(tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in names), str(folder))


def push_base(folder: str | Path, address: str) -> str:
    """Copy the model in `folder` to `address` (s3://BUCKET/FOLDER) as an artifact; returns ADDRESS@DIGEST.

    Raises:
        UserError: no model is in `folder`, `address` is no address in a store, or the store refuses.
        ArtifactError: another model lies there; models are not replaced.
    """
    folder, address = Path(folder), address.rstrip("/")
    folder_digest(folder)  # says what is wrong with it
    if not re.fullmatch(r"s3://[^/]+/.+", address):
        raise UserError(f"{address} names no folder in a bucket: write s3://BUCKET/FOLDER.")
    store, name = _stored(address)
    with tempfile.TemporaryDirectory() as scratch:
        if not is_artifact(folder):
            with write_artifact(Path(scratch) / "base", "base") as writer:
                for file in _model_files(folder):
                    (writer.path / file.name).symlink_to(file.resolve())
            folder = Path(scratch) / "base"
        return f"{address}@{push(store, folder, name).digest}"


def _stored(location: str) -> tuple[Store, str]:
    """The store of an `s3://` base, and the base's name in it."""
    place, _, name = location.rpartition("/")
    return open_store(place), name


def _model_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.suffix in _MODEL_FILES]


@lru_cache(maxsize=8)
def _folder_digest(stamp: tuple[tuple[str, int, int], ...], folder: str) -> str:
    return sha256_json({name: sha256_file(Path(folder) / name) for name, _, _ in stamp})


def fetch_base(base: str) -> str:
    """A local folder with the base model, downloaded into the cache first where it lies elsewhere."""
    location, digest = split_pin(base)
    if Path(location).is_dir():
        return location
    if location.startswith("s3://"):
        cache = Path(os.environ.get("FEYNTUNE_CACHE", Path(tempfile.gettempdir()) / "feyntune-cache"))
        folder = cache / hashlib.sha256(base.encode()).hexdigest()[:16]
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # the processes of a training all come here at once
            if not (folder / MANIFEST).is_file():
                pull(*_stored(location), folder)
            if digest is not None and read_manifest(folder).digest != digest:
                raise UserError(
                    f"The cached copy {folder} of {location} is not the model pinned as {digest[:16]}: remove it."
                )
        return str(folder)
    if _looks_like_hub_id(location):
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(location, revision=digest, allow_patterns=[f"*{end}" for end in _MODEL_FILES])
        except Exception as e:  # the hub's client lets those of its HTTP library through
            raise UserError(
                f"Base model {location} cannot be downloaded ({type(e).__name__}): check the name, the network and, "
                "for a gated model such as Llama, that HF_TOKEN is set and its license accepted."
            ) from e
    raise UserError(f"Base model {location}: there is no such folder, and it is not a hub id like ORG/NAME.")


def _looks_like_hub_id(location: str) -> bool:
    return location.count("/") == 1 and not location.startswith((".", "/", "~"))


def _hub_commit(model: str, expected: str | None) -> str:
    if expected is not None and re.fullmatch(r"[0-9a-f]{40}", expected):
        return expected  # a commit is what it is; whoever needs its files asks for them
    from huggingface_hub import HfApi

    try:
        return str(HfApi().model_info(model, revision=expected).sha)
    except Exception as e:  # the hub's client lets those of its HTTP library through
        raise UserError(
            f"Base model {model} cannot be found on the hub ({type(e).__name__}): check the name, the network and, "
            "for a gated model such as Llama, that HF_TOKEN is set and its license accepted."
        ) from e
