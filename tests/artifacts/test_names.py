"""Addresses of stores: one parser, with its inverse."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.artifacts.names import StoreError, format_address, parse_address
from feyntune.artifacts.store import FolderStore, open_store
from feyntune.errors import UserError

PARTS = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=20)
FOLDERS = st.lists(PARTS.filter(lambda p: p not in (".", "..")), min_size=1, max_size=4)
BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9.-]{1,20}[a-z0-9]", fullmatch=True)


@given(FOLDERS)
def test_a_folders_address_is_parsed_back(parts):
    path = "/" + "/".join(["feyntune-none", *parts])
    assert parse_address(format_address("file", "", path)) == ("file", "", path)
    assert parse_address(path) == ("file", "", path)


@given(BUCKETS, st.lists(PARTS, max_size=3))
def test_a_buckets_address_is_parsed_back(bucket, parts):
    prefix = "/".join(parts)
    assert parse_address(format_address("s3", bucket, prefix)) == ("s3", bucket, prefix)


@pytest.mark.parametrize("name", ["My Projekt für Jörg", "a#b", "100%", "%20", "a@b", "~", "a?b", "a:b", "日本"])
def test_a_path_and_its_address_are_the_same_folder(tmp_path, name):
    folder = tmp_path / name / "store"
    open_store(folder.as_uri()).put("a/b.txt", b"x")
    assert (folder / "a/b.txt").read_bytes() == b"x"
    assert open_store(str(folder)).get("a/b.txt") == b"x"
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FolderStore("~/runs").root == tmp_path / "runs"


@pytest.mark.parametrize("uri", ["gs://b", "file://host/x", "file:///a#b", "s3://", "", "http://h/x", "a\0b"])
def test_what_is_no_address_is_refused(uri):
    with pytest.raises(UserError, match="Store "):
        parse_address(uri)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "read-only, choose another"),
        (errno.EACCES, "no right to write"),
        (errno.EDQUOT, "quota"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_sentence_and_what_was_there_stays(tmp_path, monkeypatch, code, message):
    store = FolderStore(str(tmp_path))
    store.put("x", b"old")

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StoreError, match=message):
        store.put("x", b"new")
    assert store.get("x") == b"old"
    assert list(Path(tmp_path).iterdir()) == [tmp_path / "x"]
