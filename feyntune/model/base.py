"""Where a base model lies, and pinning it: `LOCATION@DIGEST`, so that every step uses the same weights.

No heavy imports here: the preflight step runs in a second.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

from feyntune.artifacts.artifact import (
    MANIFEST,
    Manifest,
    is_artifact,
    read_manifest,
    sha256_file,
    sha256_json,
    write_artifact,
)
from feyntune.artifacts.names import split_pin
from feyntune.artifacts.store import Store, open_store, pull, push, stored_manifest
from feyntune.errors import UserError
from feyntune.telemetry import log
from feyntune.variants import load_variants

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
QUANTIZED = "-nf4"  # a quantized copy lies beside its original, under the original's name with this ending


def pin_base(base: str) -> str:
    """`base` with its digest: of a folder its content, of a hub model its commit.

    Raises:
        UserError: the model cannot be found, or is not what its pin says.
    """
    location, expected = split_pin(base)
    if location.startswith("s3://"):
        manifest = stored_manifest(*stored_at(location))
        if manifest is None:
            raise UserError(f"Base model {location} is not an artifact: copy it there with `feyntune push-base`.")
        digest = manifest.digest
    elif Path(location).is_dir():
        digest = folder_digest(location)
    elif _looks_like_hub_id(location):
        digest = _hub_commit(location, expected)
    else:
        raise UserError(f"Base model {location}: no such folder, and not a hub ID such as ORG/NAME.")
    if expected is not None and expected != digest:
        raise UserError(f"Base model {location} has digest {digest[:16]}, the run was pinned to {expected[:16]}.")
    return f"{location}@{digest}"


def check_base(base: str) -> None:
    """Look at a base's files before anything is computed: of a folder; elsewhere they are seen when they are fetched.

    Raises:
        UserError: no configuration of a model, no tokenizer, no weights, or none of the modules that adapters change.
    """
    folder = Path(split_pin(base)[0])
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"Base model {folder}: its config.json cannot be read ({e}); save the model again.") from e
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"Base model {folder}: its config.json names no model_type; give the folder of a saved model.")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(f"Base model {folder} has no tokenizer ({', '.join(_TOKENIZERS)}): save its tokenizer there.")
    weights = [name for file in sorted(folder.glob("*.safetensors")) for name in _tensors(file)]
    if not weights:
        raise UserError(f"Base model {folder} has no weights (*.safetensors): save them there.")
    modules = {part for name in weights for part in name.split(".")}
    adapted = {module for method in load_variants().methods.values() for module in method.target_modules}
    if not adapted <= modules or "hidden_size" not in config:
        raise UserError(
            f"Base model {folder} is a {config['model_type']} model: give one of Llama's architecture, with the "
            f"modules that adapters change ({', '.join(sorted(adapted))})."
        )


def _tensors(file: Path) -> list[str]:
    """The names in a safetensors file, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as e:
        raise UserError(f"Base model {file}: it is no safetensors file ({type(e).__name__}); copy it again.") from e


def folder_digest(folder: str | Path) -> str:
    """Digest of a model folder: its manifest's if it is an artifact, else of its files' contents."""
    folder = Path(folder)
    if is_artifact(folder):
        return read_manifest(folder).digest
    if not folder.is_dir():
        raise UserError(f"Base model {folder}: there is no such folder.")
    if not (folder / "config.json").is_file():
        raise UserError(f"Base model {folder}: it has no config.json; give the folder of a saved model.")
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
    store, name = stored_at(address)
    with tempfile.TemporaryDirectory() as scratch:
        if not is_artifact(folder):
            with write_artifact(Path(scratch) / "base", "base") as writer:
                for file in _model_files(folder):
                    (writer.path / file.name).symlink_to(file.resolve())
            folder = Path(scratch) / "base"
        return f"{address}@{push(store, folder, name).digest}"


def quantized_copy(location: str, source: str) -> Manifest | None:
    """The manifest of the copy of the model `source` beside `location`; None where there is no such copy."""
    manifest = stored_manifest(*stored_at(location + QUANTIZED))
    if manifest is None:
        return None
    if manifest.inputs.get("source") != source:
        log.warning("%s is not a copy of %s@%s and is not used", location + QUANTIZED, location, source[:16])
        return None
    return manifest


def stored_at(location: str) -> tuple[Store, str]:
    """The store of an `s3://` base, and the base's name in it."""
    place, _, name = location.rpartition("/")
    return open_store(place), name


def _model_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.suffix in _MODEL_FILES]


@lru_cache(maxsize=8)
def _folder_digest(stamp: tuple[tuple[str, int, int], ...], folder: str) -> str:
    return sha256_json({name: sha256_file(Path(folder) / name) for name, _, _ in stamp})


def fetch_base(base: str, precision: str | None = None) -> str:
    """A local folder with the base model, downloaded into the cache first where it lies elsewhere.

    FEYNTUNE_CACHE names the cache's folder: a volume that the pods of a node share, or one of the temporary folder.

    Args:
        precision: with "nf4" a quantized copy beside a stored base is taken in its place (see `push_quantized`).
    """
    location, digest = split_pin(base)
    if Path(location).is_dir():
        return location
    if location.startswith("s3://"):
        if precision == "nf4":
            copy = _fetch_quantized(location, digest or split_pin(pin_base(location))[1] or "")
            if copy is not None:
                return copy
        folder = _cache_folder(base)
        with FileLock(folder.with_suffix(".lock")):  # the processes of a training all come here at once
            if not (folder / MANIFEST).is_file():
                log.info("copying the base model %s into %s", location, folder.parent)
                pull(*stored_at(location), folder)
            if digest is not None and read_manifest(folder).digest != digest:
                raise UserError(
                    f"The cached copy {folder} of {location} is not the model pinned as {digest[:16]}: remove it."
                )
        return str(folder)
    return _hub_files(location, digest, _MODEL_FILES)


def fetch_tokenizer(base: str) -> str:
    """A local folder with everything of the base model but its weights."""
    location, digest = split_pin(base)
    if location.startswith("s3://"):
        folder = _cache_folder(f"{base} tokenizer")
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                manifest = pull(*stored_at(location), folder, only=lambda file: not file.endswith(".safetensors"))
                if digest is not None and manifest.digest != digest:
                    shutil.rmtree(folder)
                    raise UserError(
                        f"{location} is not the model pinned as {digest[:16]}: it was replaced, restore it."
                    )
        return str(folder)
    if not Path(location).is_dir() and _looks_like_hub_id(location):
        return _hub_files(location, digest, tuple(end for end in _MODEL_FILES if end != ".safetensors"))
    return fetch_base(base)


def _fetch_quantized(location: str, source: str) -> str | None:
    folder = _cache_folder(f"{location}{QUANTIZED} of {source}")
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / MANIFEST).is_file():
            if quantized_copy(location, source) is None:
                return None
            log.info("copying the quantized base model %s into %s", location + QUANTIZED, folder.parent)
            pull(*stored_at(location + QUANTIZED), folder)
        if read_manifest(folder).inputs.get("source") != source:
            raise UserError(f"The cached copy {folder} is not one of {location}@{source[:16]}: remove it.")
    return str(folder)


def _cache_folder(key: str) -> Path:
    return _cache() / hashlib.sha256(key.encode()).hexdigest()[:16]


def _cache() -> Path:
    given = os.environ.get("FEYNTUNE_CACHE")
    if given:
        try:
            Path(given).mkdir(parents=True, exist_ok=True)
            if os.access(given, os.W_OK):
                return Path(given)
        except OSError:
            pass
        log.warning("the cache %s cannot be written: base models are copied to the temporary folder", given)
    cache = Path(tempfile.gettempdir()) / f"feyntune-cache-{os.getuid()}"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    if cache.lstat().st_uid != os.getuid():  # everybody may make folders there
        raise UserError(f"{cache} belongs to another user: name a cache of your own in FEYNTUNE_CACHE.")
    return cache


def _hub_files(location: str, revision: str | None, endings: tuple[str, ...]) -> str:
    if _looks_like_hub_id(location):
        from huggingface_hub import snapshot_download

        cache = _cache() / "hub" if os.environ.get("FEYNTUNE_CACHE") else None
        patterns = [f"*{end}" for end in endings]
        try:
            return snapshot_download(location, revision=revision, allow_patterns=patterns, cache_dir=cache)
        except Exception as e:  # the hub's client lets those of its HTTP library through
            raise UserError(
                f"Base model {location} cannot be downloaded ({type(e).__name__}): check the name, the network and, "
                "for a gated model such as Llama, that HF_TOKEN is set and its license accepted."
            ) from e
    raise UserError(f"Base model {location}: no such folder, and not a hub ID such as ORG/NAME.")


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
