"""Addresses of stores and names of the objects in them."""

from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from feyntune.errors import UserError


class StoreError(UserError):
    """The store refused, does not answer, or returned something damaged."""


class Missing(StoreError):
    """There is no object of that name."""


def parse_address(uri: str) -> tuple[Literal["s3", "file"], str, str]:
    """The parts of a store's address: ("s3", bucket, prefix) or ("file", "", absolute path).

    A plain path is taken as it is, but for a leading `~`; a `file://` address is percent-decoded, so that
    `Path.as_uri` is the inverse. Names in a bucket are taken as they are: `%`, `#` and `?` stand for themselves.

    Raises:
        UserError: another scheme, no bucket, a host in a file address, or nothing.
    """
    if uri.startswith("s3://"):
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"Store {uri!r} names no bucket: write s3://bucket/prefix.")
        return "s3", bucket, prefix.strip("/")
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(f"Store {uri!r}: a file address is file:///folder, with three slashes.")
        if parts.query or parts.fragment:
            raise UserError(f"Store {uri!r}: write # as %23 and ? as %3F in a file address, or give the plain path.")
        return "file", "", str(Path(unquote(parts.path)).resolve())
    scheme = uri.partition("://")[0]
    if "://" in uri and scheme.isalnum():
        raise UserError(f"Store {uri!r}: the address must start with s3:// or file://, or be a folder.")
    if not uri.strip() or "\0" in uri:
        raise UserError(f"Store {uri!r} is not an address: write s3://bucket/prefix or a folder.")
    return "file", "", str(expand(uri).resolve())


def format_address(kind: Literal["s3", "file"], bucket: str, path: str) -> str:
    """The address with these parts: the inverse of `parse_address`."""
    if kind == "file":
        return Path(path).as_uri()
    return f"s3://{bucket}" + (f"/{path}" if path else "")


def expand(path: str) -> Path:
    """A path as a shell would read it: `~` and `~user` are home folders where they exist, else plain names."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def local_file(text: str) -> Path:
    """The path of a file of this machine, given as a shell would read it.

    Raises:
        UserError: it is the address of a file elsewhere.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise UserError(f"{text} is an address, and a file of this machine is needed: copy it here, give its path.")
    return expand(text)


def split_pin(base: str) -> tuple[str, str | None]:
    """A base model, `LOCATION@DIGEST`, as (location, digest); digest is None where there is none.

    The name of a folder can hold an @ too.
    """
    if base.startswith("~"):
        base = str(expand(base))
    location, at, digest = base.rpartition("@")
    if not at or "/" in digest or Path(base).is_dir():
        return base, None
    return location, digest


def checked_name(name: str) -> str:
    """`name` if it is relative and stays inside the store.

    Raises:
        StoreError: it does not.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name.rstrip("/"):
        raise StoreError(f"{name!r} is not a name inside the store: use relative names without '..'.")
    return name
