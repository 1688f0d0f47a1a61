import contextlib
import errno
import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import SecretStr

from feyntune.artifacts.artifact import MANIFEST, ArtifactError, File, Manifest, _digest, open_artifact, write_artifact
from feyntune.artifacts.names import Missing, StoreError
from feyntune.artifacts.s3 import S3Store
from feyntune.artifacts.store import FolderStore, open_store, pull, push, stored_manifest
from feyntune.errors import UserError
from feyntune.settings import S3Settings


def sealed(folder, content=b"one", **stats):
    with write_artifact(folder, "thing", config={"n": 1}) as tmp:
        (tmp.path / "sub").mkdir()
        (tmp.path / "sub" / "a.bin").write_bytes(content)
        (tmp.path / "b.txt").write_bytes(b"")
        tmp.stats.update(stats)
    return folder


def test_what_is_put_is_got(store):
    store.put("a/b.json", b"one")
    store.put("a/b.json", b"two")
    assert store.get("a/b.json") == b"two"
    assert store.exists("a/b.json")
    assert not store.exists("a")
    assert not store.exists("a/b")


def test_a_file_travels_whole(store, tmp_path):
    big = bytes(range(256)) * 40_000
    (tmp_path / "in").write_bytes(big)
    store.put_file("deep/er/x", tmp_path / "in")
    store.get_file("deep/er/x", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == big


def test_names_are_those_under_the_prefix(store):
    for name in ("a/1", "a/2", "ab/3", "b/4/5"):
        store.put(name, b"")
    assert list(store.names()) == ["a/1", "a/2", "ab/3", "b/4/5"]
    assert list(store.names("a/")) == ["a/1", "a/2"]
    assert list(store.names("a")) == ["a/1", "a/2", "ab/3"]
    assert list(store.names("b/4/")) == ["b/4/5"]
    assert list(store.names("nothing/")) == []


def test_deleted_is_gone_and_deleting_again_is_fine(store):
    store.put("a", b"")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")
    assert list(store.names()) == []


def test_a_missing_object_is_named(store, tmp_path):
    with pytest.raises(Missing, match="no/such does not exist"):
        store.get("no/such")
    with pytest.raises(Missing, match="no/such does not exist"):
        store.get_file("no/such", tmp_path / "x")


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../b", "", "a//b", "a\\b"])
def test_a_name_outside_the_store_is_refused(store, name):
    with pytest.raises(StoreError, match="is not a name inside the store"):
        store.put(name, b"")


def test_a_sealed_folder_comes_back_equal(store, tmp_path):
    sent = push(store, sealed(tmp_path / "f"), "things/1")
    got = pull(store, "things/1", tmp_path / "g", kind="thing")
    assert got == sent == open_artifact(tmp_path / "g")
    assert (tmp_path / "g/sub/a.bin").read_bytes() == b"one"
    assert stored_manifest(store, "things/1") == sent
    assert stored_manifest(store, "things/2") is None


def test_pushing_again_changes_nothing_and_another_folder_is_refused(store, tmp_path):
    first = push(store, sealed(tmp_path / "f", seconds=1), "t")
    assert push(store, sealed(tmp_path / "g", seconds=2), "t") == first  # same bytes, made in another time
    with pytest.raises(ArtifactError, match="already holds another"):
        push(store, sealed(tmp_path / "h", b"two"), "t")
    assert store.get("t/sub/a.bin") == b"one"


def test_a_push_that_died_before_its_manifest_does_not_exist_and_is_completed(store, tmp_path):
    folder = sealed(tmp_path / "f")
    store.put("t/sub/a.bin", b"on")  # half of it
    with pytest.raises(ArtifactError, match="not an artifact"):
        pull(store, "t", tmp_path / "g")
    push(store, folder, "t")
    pull(store, "t", tmp_path / "g")


def test_a_damaged_object_is_named_and_nothing_is_left(store, tmp_path):
    push(store, sealed(tmp_path / "f"), "t")
    store.put("t/sub/a.bin", b"eno")
    with pytest.raises(ArtifactError, match=r"t/sub/a\.bin does not match its manifest"):
        pull(store, "t", tmp_path / "g")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "store") == ["f"]


def test_a_folder_of_another_kind_is_refused(store, tmp_path):
    push(store, sealed(tmp_path / "f"), "t")
    with pytest.raises(ArtifactError, match="holds a thing, not a split"):
        pull(store, "t", tmp_path / "g", kind="split")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("name", ["../a.bin", "/tmp/a.bin"])
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(store, tmp_path, name):
    files = {name: File(sha256=hashlib.sha256(b"").hexdigest(), size=0)}
    manifest = Manifest(kind="thing", digest=_digest("thing", files, {}, {}), files=files)
    store.put(f"t/{MANIFEST}", manifest.model_dump_json().encode())
    with pytest.raises(StoreError, match="is not a name inside the store"):
        pull(store, "t", tmp_path / "g")


def test_threads_pushing_the_same_folder_all_succeed(store, tmp_path):
    folder = sealed(tmp_path / "f", bytes(100_000))
    with ThreadPoolExecutor(8) as pool:
        digests = {m.digest for m in pool.map(lambda _: push(store, folder, "t"), range(8))}
    assert len(digests) == 1
    assert [n for n in store.names() if n.startswith("t/")] == ["t/b.txt", f"t/{MANIFEST}", "t/sub/a.bin"]
    pull(store, "t", tmp_path / "g")


def test_a_reader_sees_one_whole_value_or_the_other(store):
    values = [bytes([i]) * 50_000 for i in (1, 2)]
    store.put("x", values[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for v in values:
                store.put("x", v)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            assert store.get("x") in values
    finally:
        stop.set()
        writer.join()


def test_two_prefixes_of_a_bucket_do_not_see_each_other(s3):
    a, b = open_store(f"{s3}/a"), open_store(f"{s3}/ab")
    a.put("x", b"a")
    b.put("x", b"b")
    assert list(a.names()) == ["x"]
    assert a.get("x") == b"a"
    assert list(open_store(s3).names()) == ["a/x", "ab/x"]


def test_more_objects_than_one_listing_page(s3):
    store = open_store(s3)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"e/{i:05d}", b""), range(1005)))
    assert len(list(store.names("e/"))) == 1005


def test_a_bucket_that_is_not_there_is_named(s3):
    with pytest.raises(StoreError, match="Bucket feyntune-none does not exist"):
        open_store("s3://feyntune-none").get("x")


def test_keys_come_from_the_environment_and_never_into_messages(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    store = open_store("s3://feyntune-none")
    with pytest.raises(StoreError) as e:
        store.get("x")
    assert "hush" not in str(e.value) + repr(vars(store))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY in the environment"):
        open_store("s3://x")


@pytest.mark.parametrize(("uri", "says"), [("gs://x", "must start with s3://"), ("s3:///x", "names no bucket")])
def test_addresses_that_are_none(uri, says, s3):
    with pytest.raises(UserError, match=says):
        open_store(uri)


def test_a_file_address_and_a_path_are_the_same_folder(tmp_path):
    open_store((tmp_path / "s").as_uri()).put("x", b"1")
    assert FolderStore(str(tmp_path / "s")).get("x") == b"1"


def test_a_write_that_died_leaves_nothing_that_is_listed(tmp_path):
    store = FolderStore(str(tmp_path))
    store.put("a/x", b"1")
    (tmp_path / "a" / ".put.dead").write_bytes(b"half")
    assert list(store.names()) == ["a/x"]


@contextlib.contextmanager
def _answering(*answers):
    """A store's address whose requests get these answers, (status, content type), in turn, then the last forever.

    Yields the store, which tries twice, and the list of methods asked.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, kind = answers[min(len(asked), len(answers) - 1)]
            asked.append(self.command)
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    settings = S3Settings(host=host, secure=False, access_key=SecretStr("a"), secret_key=SecretStr("b"), region="x")
    try:
        yield S3Store("s3://bucket", settings, tries=2), asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("size", [100, 6 << 20])
def test_a_busy_store_is_asked_again_for_small_and_large_uploads(tmp_path, size):
    (tmp_path / "file").write_bytes(bytes(size))
    with _answering((503, "application/xml")) as (store, asked):
        with pytest.raises(StoreError):
            store.put_file("x", tmp_path / "file")
        assert asked == (["PUT"] if size == 100 else ["POST"]) * 3


@pytest.mark.parametrize("call", [lambda s: s.get("x"), lambda s: s.put("x", b""), lambda s: list(s.names())])
def test_a_page_in_place_of_an_answer_is_one_sentence(call):
    with _answering((429, "text/html")) as (store, _), pytest.raises(StoreError, match="not an S3 store"):
        call(store)


def test_a_file_system_without_modes_of_files_will_do(tmp_path, monkeypatch):
    """SMB, exFAT and buckets mounted as folders refuse chmod."""

    def refuse(*args, **options):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "chmod", refuse)
    store = FolderStore(str(tmp_path / "store"))
    with write_artifact(tmp_path / "made", "thing") as folder:
        (folder.path / "a").write_text("1")
    push(store, tmp_path / "made", "x")
    pull(store, "x", tmp_path / "again")
    assert (tmp_path / "again/a").read_text() == "1"
