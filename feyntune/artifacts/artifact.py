"""Artifacts: everything durable is a folder whose `manifest.json` is written last.

A folder without a manifest is not an artifact. A folder that does not match its manifest is refused, and the error
names the file. This gives atomic writes, corruption detection, lineage and cache keys.

    with write_artifact(out, kind="split", inputs={"corpus": corpus.digest}, config={...}) as tmp:
        write_files(tmp.path)
        tmp.stats["seconds"] = 3.1
    manifest = open_artifact(out, kind="split")
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from feyntune.errors import UserError

MANIFEST = "manifest.json"
RENAMED_KINDS = {"judgement": "judgment"}  # before 0.2
_PACKAGES = (
    "feyntune",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "pyarrow",
)


class ArtifactError(UserError):
    """A folder is not an artifact, or does not match its manifest."""


class File(BaseModel):
    sha256: str
    size: int


class Manifest(BaseModel):
    """The contents of an artifact and how it was made.

    `digest` covers kind, files, inputs and config: equal digests mean the same bytes made the same way.
    `stats` (seconds, hardware, rates) and `packages` describe one run of the step and are not covered.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    kind: str
    digest: str
    files: dict[str, File]
    inputs: dict[str, str] = {}
    config: dict[str, Any] = {}
    stats: dict[str, Any] = Field({}, validation_alias=AliasChoices("stats", "facts"))  # "facts" before 0.2
    packages: dict[str, str] = {}


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of a JSON value in one canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(kind: str, files: dict[str, File], inputs: dict[str, str], config: dict[str, Any]) -> str:
    return sha256_json(
        {"kind": kind, "files": {n: f.sha256 for n, f in files.items()}, "inputs": inputs, "config": config}
    )


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass
class ArtifactWriter:
    """An artifact being written: put files under `path`, and figures of the run into `stats`."""

    path: Path
    stats: dict[str, Any] = field(default_factory=dict)


def require_no_file(folder: str | Path) -> None:
    """Raise ArtifactError where `folder` is a file."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, where a folder is to be written: choose another name.")


def require_new(folder: str | Path) -> None:
    """Check that an artifact can be written to `folder`: before work that takes long.

    Raises:
        ArtifactError: it is a file, or exists and is not empty. Artifacts are never overwritten.
    """
    folder = Path(folder)
    require_no_file(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is not empty, and artifacts are never overwritten: choose another folder.")


@contextmanager
def write_artifact(
    folder: str | Path,
    kind: str,
    inputs: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
) -> Iterator[ArtifactWriter]:
    """Write a temporary folder and rename it when it is complete; on an error leave nothing behind.

    Raises:
        ArtifactError: see `require_new`.
    """
    folder = Path(folder)
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        writer = ArtifactWriter(tmp)
        yield writer
        write_manifest(tmp, kind, inputs, config, writer.stats)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def write_manifest(
    folder: Path,
    kind: str,
    inputs: dict[str, str] | None = None,
    config: dict[str, Any] | None = None,
    stats: dict[str, Any] | None = None,
) -> Manifest:
    """Hash the files of `folder`, flush them to disk, and write the manifest last."""
    config = json.loads(json.dumps(config or {}))  # what is compared is what is stored: plain JSON
    files = {}
    for name in _files(folder):
        path = folder / name
        make_readable(path, 0o644)
        with path.open("rb") as f:
            os.fsync(f.fileno())
        files[name] = File(sha256=sha256_file(path), size=path.stat().st_size)
    make_readable(folder, 0o755)
    manifest = Manifest(
        kind=kind,
        digest=_digest(kind, files, inputs or {}, config),
        files=files,
        inputs=inputs or {},
        config=config,
        stats=stats or {},
        packages=_package_versions(),
    )
    with (folder / MANIFEST).open("w", encoding="utf-8") as f:
        f.write(manifest.model_dump_json(indent=1))
        f.flush()
        os.fsync(f.fileno())
    return manifest


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def parse_manifest(raw: str | bytes, where: str) -> Manifest:
    """The manifest in `raw`; refused if its own digest does not match."""
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValueError as e:
        raise ArtifactError(f"{where} is not a manifest this version reads: {str(e).splitlines()[0]}.") from e
    expected = _digest(manifest.kind, manifest.files, manifest.inputs, manifest.config)
    if manifest.digest != expected:
        raise ArtifactError(
            f"{where} was changed after it was written (its digest does not match): restore the folder."
        )
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest alone, without looking at the files."""
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise ArtifactError(f"There is no folder {folder}: correct the path, or run the step that makes it first.")
    if not path.is_file():
        raise ArtifactError(f"{folder} is not an artifact (no {MANIFEST}): its step did not finish, run it again.")
    return parse_manifest(path.read_bytes(), str(path))


def open_artifact(folder: str | Path, kind: str | None = None) -> Manifest:
    """Check every file of `folder` against its manifest and return the manifest.

    Raises:
        ArtifactError: no manifest, another `kind`, or a file that is missing, unexpected or changed (named).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if kind is not None and kind not in (manifest.kind, RENAMED_KINDS.get(manifest.kind)):
        raise ArtifactError(f"{folder} holds a {manifest.kind}, not a {kind}: give the folder of the right step.")
    present = set(_files(folder)) - {MANIFEST}
    for name in sorted(present ^ set(manifest.files)):
        what = "is missing" if name in manifest.files else "is not in the manifest"
        raise ArtifactError(f"{folder / name} {what}: the artifact was changed after it was written, restore it.")
    for name, file in manifest.files.items():
        path = folder / name
        if path.stat().st_size != file.size or sha256_file(path) != file.sha256:
            raise ArtifactError(f"{path} does not match its manifest (sha256): the file is damaged, restore it.")
    return manifest


def make_readable(path: str | Path, mode: int) -> None:
    """Some writers leave 0600, which a pod under another user cannot read. SMB and exFAT have no such modes."""
    with suppress(OSError):
        os.chmod(path, mode)
