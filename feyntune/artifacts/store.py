"""The store: a local folder (`file://` or a plain path) or a bucket of any S3 server (`s3://bucket/prefix`).

Both have the same few operations. An artifact is copied file by file, its manifest last, so that in the
store too a folder without a manifest does not exist, and none is ever overwritten.
"""

import io
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from feyntune.artifacts.artifact import (
    MANIFEST,
    ArtifactError,
    Manifest,
    make_readable,
    open_artifact,
    parse_manifest,
    sha256_file,
)
from feyntune.artifacts.names import Missing, StoreError, checked_name, parse_address
from feyntune.errors import WRITE_FIXES


class Store(Protocol):
    """Objects by name; names are relative, with `/`, and stay inside the store."""

    uri: str

    def get(self, name: str) -> bytes: ...
    def put(self, name: str, data: bytes) -> None: ...
    def get_file(self, name: str, path: Path) -> None: ...
    def put_file(self, name: str, path: Path) -> None: ...
    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless one of that name exists; whether this call wrote it. See `creates_atomically`."""
        ...

    def exists(self, name: str) -> bool: ...
    def modified(self, name: str) -> datetime: ...
    def names(self, prefix: str = "") -> Iterator[str]: ...
    def delete(self, name: str) -> None: ...


def open_store(uri: str, tries: int = 6) -> Store:
    """The store at `uri`: `s3://bucket[/prefix]`, `file:///folder` or a path.

    Args:
        tries: how often an unanswered request is repeated, waiting 0.5, 1, 2, 4 … s; 6 is half a minute, 8 two.

    Raises:
        UserError: an unknown scheme, or an s3:// address without keys in the environment.
    """
    kind, _, _ = parse_address(uri)
    if kind == "s3":
        from feyntune.artifacts.s3 import S3Store
        from feyntune.settings import S3Settings

        return S3Store(uri, S3Settings.from_env(), tries)
    return FolderStore(uri)


class FolderStore:
    """A folder of this machine."""

    def __init__(self, uri: str):
        self.root = Path(parse_address(uri)[2])
        self.uri = self.root.as_uri()

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def get(self, name: str) -> bytes:
        try:
            return self._path(name).read_bytes()
        except (FileNotFoundError, IsADirectoryError) as e:
            raise Missing(f"{self.uri}/{name} does not exist.") from e

    def put(self, name: str, data: bytes) -> None:
        self._put(name, io.BytesIO(data))

    def get_file(self, name: str, path: Path) -> None:
        try:
            shutil.copyfile(self._path(name), path)
        except FileNotFoundError as e:
            raise Missing(f"{self.uri}/{name} does not exist.") from e

    def put_file(self, name: str, path: Path) -> None:
        with path.open("rb") as f:
            self._put(name, f)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._put(name, io.BytesIO(data), os.link)
        except FileExistsError:
            return False
        return True

    def _put(self, name: str, data: BinaryIO, publish: Callable[[str, Path], None] = os.replace) -> None:
        """Write a file aside and give it its name when it is whole."""
        path = self._path(name)
        with self._writing(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".put.", delete=False) as f:
                try:
                    shutil.copyfileobj(data, f)
                    f.flush()
                    os.fsync(f.fileno())
                    make_readable(f.name, 0o644)
                    publish(f.name, path)
                finally:
                    Path(f.name).unlink(missing_ok=True)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as e:
            fix = WRITE_FIXES.get(e.errno or 0, "check the folder")
            raise StoreError(f"{self.root / name} cannot be written ({e.strerror}): {fix}.") from e

    def modified(self, name: str) -> datetime:
        try:
            return datetime.fromtimestamp(self._path(name).stat().st_mtime, UTC)
        except FileNotFoundError as e:
            raise Missing(f"{self.uri}/{name} does not exist.") from e

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self, prefix: str = "") -> Iterator[str]:
        top = self.root / prefix.rpartition("/")[0]
        files = (p for p in top.rglob("*") if p.is_file() and not p.name.startswith(".put."))
        yield from sorted(n for p in files if (n := p.relative_to(self.root).as_posix()).startswith(prefix))

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


_ROUNDS = 3  # of the probe: a server that looks first and writes then passes one round in seven by luck


def creates_atomically(store: Store) -> bool:
    """Whether, of several concurrent `create`s of one object, exactly one succeeds: tried with four, three times.

    S3 servers without conditional writes ignore the condition (all succeed) or refuse it; some file systems have no
    hard links. Needs the right to write; the object is deleted afterwards where that is allowed.
    """
    with ThreadPoolExecutor(4) as pool:
        return all(_one_succeeds(store, pool) for _ in range(_ROUNDS))


def _one_succeeds(store: Store, pool: ThreadPoolExecutor) -> bool:
    name = f"probe/{uuid.uuid4()}"
    start = threading.Barrier(4)

    def create(number: int) -> bool:
        start.wait()
        return store.create(name, b"%d" % number)

    try:
        won = sum(pool.map(create, range(4)))
    except StoreError:
        won = 0
    with suppress(StoreError):
        store.delete(name)
    return won == 1


def push(store: Store, folder: str | Path, name: str) -> Manifest:
    """Copy an artifact into the store under `name`, its manifest last.

    The same folder pushed again is a no-op; a half-pushed one is completed.

    Raises:
        ArtifactError: `folder` is damaged, or another folder already lies sealed under `name`.
    """
    folder = Path(folder)
    manifest = open_artifact(folder)
    existing = stored_manifest(store, name)
    if existing is not None:
        if existing.digest != manifest.digest:
            raise ArtifactError(
                f"{store.uri}/{name} already holds another {existing.kind}: artifacts are never replaced."
            )
        return existing
    for file in manifest.files:
        store.put_file(f"{name}/{file}", folder / file)
    store.put_file(f"{name}/{MANIFEST}", folder / MANIFEST)
    return manifest


def stored_manifest(store: Store, name: str) -> Manifest | None:
    """The manifest of the folder sealed under `name`, or None where there is none."""
    try:
        raw = store.get(f"{name}/{MANIFEST}")
    except Missing:
        return None
    return parse_manifest(raw, f"{store.uri}/{name}/{MANIFEST}")


def pull(
    store: Store, name: str, folder: str | Path, kind: str | None = None, only: Callable[[str], bool] | None = None
) -> Manifest:
    """Copy the folder sealed under `name` to `folder` and check every file on arrival.

    Args:
        only: which files; the folder is then no artifact, and has no manifest.

    Raises:
        ArtifactError: nothing is sealed there, it is of another kind, or a file arrived damaged (named).
    """
    folder = Path(folder)
    manifest = stored_manifest(store, name)
    if manifest is None:
        raise ArtifactError(f"{store.uri}/{name} is not an artifact: its step did not finish, or the name is wrong.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file, expected in manifest.files.items():
            if only is not None and not only(file):
                continue
            path = tmp / checked_name(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{name}/{file}", path)
            if path.stat().st_size != expected.size or sha256_file(path) != expected.sha256:
                raise ArtifactError(f"{store.uri}/{name}/{file} does not match its manifest (sha256): it is damaged.")
        if only is None:
            (tmp / MANIFEST).write_bytes(store.get(f"{name}/{MANIFEST}"))
            open_artifact(tmp, kind)
        make_readable(tmp, 0o755)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return manifest
