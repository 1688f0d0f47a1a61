"""The store: a local folder (`file://` or a plain path) or a bucket of any S3 server (`s3://bucket/prefix`).

Both speak the same few words. A sealed folder travels file by file with its manifest last, so that in the
store too a folder without a manifest does not exist, and none is ever overwritten.
"""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from feyntune.artifacts.artifact import MANIFEST, ArtifactError, Manifest, open_artifact, parse_manifest, sha256_file
from feyntune.errors import UserError
from feyntune.settings import S3Settings


class StoreError(UserError):
    """The store refused, is away, or returned something damaged."""


class Missing(StoreError):
    """There is no object of that name."""


class Store(Protocol):
    """Objects by name; names are relative, with `/`, and stay inside the store."""

    uri: str

    def get(self, name: str) -> bytes: ...
    def put(self, name: str, data: bytes) -> None: ...
    def get_file(self, name: str, path: Path) -> None: ...
    def put_file(self, name: str, path: Path) -> None: ...
    def exists(self, name: str) -> bool: ...
    def names(self, prefix: str = "") -> Iterator[str]: ...
    def delete(self, name: str) -> None: ...


def open_store(uri: str, tries: int = 6) -> Store:
    """The store at `uri`: `s3://bucket[/prefix]`, `file:///folder` or a path.

    Args:
        tries: how often an unanswered request is repeated, waiting 0.5, 1, 2, 4 … s; 6 is half a minute, 8 two.

    Raises:
        UserError: an unknown scheme, or an s3:// address without keys in the environment.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "s3":
        return S3Store(uri, S3Settings.from_env(), tries)
    if scheme in ("", "file"):
        return FolderStore(uri)
    raise UserError(f"Store {uri!r}: the address must start with s3:// or file://, or be a folder.")


def _checked(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name.rstrip("/"):
        raise StoreError(f"{name!r} is not a name inside the store: use relative names without '..'.")
    return name


class FolderStore:
    """A folder of this machine."""

    def __init__(self, uri: str):
        parts = urlsplit(uri)
        self.root = Path(parts.path if parts.scheme == "file" else uri).expanduser().resolve()
        self.uri = self.root.as_uri()

    def _path(self, name: str) -> Path:
        return self.root / _checked(name)

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

    def _put(self, name: str, data: BinaryIO) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".put.", delete=False) as f:
            try:
                shutil.copyfileobj(data, f)
                f.flush()
                os.fsync(f.fileno())
                os.chmod(f.name, 0o644)
                os.replace(f.name, path)
            except BaseException:
                Path(f.name).unlink(missing_ok=True)
                raise

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self, prefix: str = "") -> Iterator[str]:
        top = self.root / prefix.rpartition("/")[0]
        files = (p for p in top.rglob("*") if p.is_file() and not p.name.startswith(".put."))
        yield from sorted(n for p in files if (n := p.relative_to(self.root).as_posix()).startswith(prefix))

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


class S3Store:
    """A bucket, or a prefix of one, on any S3 server. Path-style addresses; keys never appear in messages."""

    def __init__(self, uri: str, settings: S3Settings, tries: int = 6):
        parts = urlsplit(uri)
        self.bucket, self.prefix = parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise UserError(f"Store {uri!r} names no bucket: write s3://bucket/prefix.")
        self.uri = f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.client = Minio(
            settings.host,
            access_key=settings.access_key.get_secret_value(),
            secret_key=settings.secret_key.get_secret_value(),
            secure=settings.secure,
            region=settings.region,
            http_client=urllib3.PoolManager(
                maxsize=16,
                timeout=urllib3.Timeout(connect=10, read=60),
                retries=urllib3.Retry(
                    total=tries,
                    backoff_factor=0.5,
                    status_forcelist=(500, 502, 503, 504),
                    allowed_methods=None,  # POST too, with which a large upload begins and ends
                ),
            ),
        )

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{_checked(name)}" if self.prefix else _checked(name)

    def _error(self, e: Exception, name: str) -> StoreError:
        where = f"{self.uri}/{name}"
        if isinstance(e, S3Error):
            if e.code in ("NoSuchKey", "NoSuchObject"):
                return Missing(f"{where} does not exist.")
            if e.code == "NoSuchBucket":
                return StoreError(f"Bucket {self.bucket} does not exist: create it, or correct the address.")
            return StoreError(f"{where}: the store answered {e.code} ({e.message}).")
        if isinstance(e, MinioException):  # a proxy's page, for one
            return StoreError(f"{where}: what answers is not an S3 store ({str(e)[:200]}): check S3_ENDPOINT.")
        return StoreError(f"{where}: the store does not answer ({type(e).__name__}): check S3_ENDPOINT.")

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Whatever goes wrong with the object `name` becomes a StoreError."""
        try:
            yield
        except (MinioException, urllib3.exceptions.HTTPError) as e:
            raise self._error(e, name) from e

    def get(self, name: str) -> bytes:
        with self._asking(name):
            response = self.client.get_object(self.bucket, self._key(name))
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

    def put(self, name: str, data: bytes) -> None:
        with self._asking(name):
            self.client.put_object(self.bucket, self._key(name), io.BytesIO(data), len(data))

    def get_file(self, name: str, path: Path) -> None:
        with self._asking(name):
            self.client.fget_object(self.bucket, self._key(name), str(path))

    def put_file(self, name: str, path: Path) -> None:
        with self._asking(name):
            try:
                self.client.fput_object(self.bucket, self._key(name), str(path))
            except S3Error as e:
                # The upload was ended, the answer got lost, and its end was asked for again: all is well.
                if e.code != "NoSuchUpload" or not self.exists(name):
                    raise

    def exists(self, name: str) -> bool:
        try:
            with self._asking(name):
                self.client.stat_object(self.bucket, self._key(name))
        except Missing:
            return False
        return True

    def names(self, prefix: str = "") -> Iterator[str]:
        start = f"{self.prefix}/" if self.prefix else ""
        with self._asking(prefix):
            for item in self.client.list_objects(self.bucket, prefix=start + prefix, recursive=True):
                yield str(item.object_name).removeprefix(start)

    def delete(self, name: str) -> None:
        with self._asking(name):
            self.client.remove_object(self.bucket, self._key(name))


def push(store: Store, folder: str | Path, name: str) -> Manifest:
    """Copy a sealed folder into the store under `name`, its manifest last.

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


def pull(store: Store, name: str, folder: str | Path, kind: str | None = None) -> Manifest:
    """Copy the folder sealed under `name` to `folder` and check every file on arrival.

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
            path = tmp / _checked(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{name}/{file}", path)
            if path.stat().st_size != expected.size or sha256_file(path) != expected.sha256:
                raise ArtifactError(f"{store.uri}/{name}/{file} does not match its manifest (sha256): it is damaged.")
        (tmp / MANIFEST).write_bytes(store.get(f"{name}/{MANIFEST}"))
        open_artifact(tmp, kind)
        tmp.chmod(0o755)
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return manifest
