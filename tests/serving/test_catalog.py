"""What names mean, version after version, and the canary. A source in memory, an engine that only keeps count."""

import asyncio
import contextlib
import math
import random

import pytest
from prometheus_client import REGISTRY

from feyntune.artifacts.artifact import File, Manifest
from feyntune.artifacts.store import StoreError
from feyntune.engine.api import InvalidAdapterError, NoFreeSlotError
from feyntune.registry.registry import Registry
from feyntune.serving.canary import Canary, p_value
from feyntune.serving.catalog import Catalog
from feyntune.serving.source import RegistrySnapshot, RegistrySource, ServedVersion
from tests.registry.factories import make_adapter
from tests.serving.factories import register_adapter

BASE = "b" * 64


def version(variant, number):
    digest = str(number) * 64
    return ServedVersion(f"{variant}@{digest[:16]}", variant, digest)


class AdapterSource:
    """A registry that tests change, and versions it cannot fetch."""

    def __init__(self):
        self.names, self.aliases, self.staging, self.broken, self.away = {}, frozenset(), None, {}, None
        self.fetched = []
        self.bases, self.files = {}, {}

    def revision(self):
        if self.away:
            raise StoreError(self.away)
        return repr((self.names, self.staging))

    def snapshot(self):
        return RegistrySnapshot(self.revision(), dict(self.names), self.aliases, self.staging)

    def manifest(self, version):
        inputs = {"base": self.bases.get(version.name, BASE)}
        files = self.files.get(version.name, {})
        return Manifest(kind="adapter", digest=version.digest, files=files, inputs=inputs)

    def fetch(self, version, folder):
        self.fetched.append(version.name)
        if version.name in self.broken:
            raise self.broken[version.name]
        return self.manifest(version)


class Engine:
    adapter_bytes = 1000

    def __init__(self, slots=10):
        self.loaded, self.slots = set(), slots

    async def load_adapter(self, key, folder):
        if len(self.loaded) >= self.slots:
            raise NoFreeSlotError("all taken")
        self.loaded.add(key)

    def unload_adapter(self, key):
        self.loaded.remove(key)

    def hold(self, adapter):
        return contextlib.nullcontext()


@pytest.fixture
def source():
    return AdapterSource()


def refreshed(catalog, times=1):
    async def go():
        for _ in range(times):
            await catalog.refresh()

    asyncio.run(go())
    return catalog


ONE, TWO, OTHER = version("hep-th/lora-all", 1), version("hep-th/lora-all", 2), version("a+b/lora-qkv", 3)


def test_a_name_means_the_new_version_once_it_is_loaded_and_the_old_one_is_unloaded(source):
    engine = Engine()
    catalog = Catalog(source, engine, BASE)
    source.names = {"hep-th.lora-all": ONE, "champion": ONE, "a_b.lora-qkv": OTHER}
    source.aliases = frozenset({"champion"})
    refreshed(catalog)
    assert catalog.resolve("hep-th/lora-all").version == ONE
    assert catalog.resolve("a+b/lora-qkv").label == "a_b.lora-qkv"
    assert catalog.resolve(ONE.name).version == ONE
    assert catalog.resolve("base").version is None
    assert catalog.resolve("nobody") is None
    source.names |= {"hep-th.lora-all": TWO, "champion": TWO}
    refreshed(catalog)
    assert catalog.resolve("champion").version == TWO
    assert catalog.resolve(ONE.name) is None
    assert engine.loaded == {TWO.digest, OTHER.digest}


def test_a_version_that_cannot_be_served_leaves_the_old_one_and_is_not_fetched_again_at_once(source):
    engine = Engine()
    catalog = Catalog(source, engine, BASE)
    source.names = {"champion": ONE}
    refreshed(catalog)
    source.names = {"champion": TWO}
    source.broken[TWO.name] = InvalidAdapterError("it is no LoRA")
    refreshed(catalog, times=3)
    assert catalog.resolve("champion").version == ONE
    assert "no LoRA" in catalog.refused[TWO.name]
    assert source.fetched.count(TWO.name) == 1
    assert engine.loaded == {ONE.digest}
    source.names = {"champion": ONE}
    refreshed(catalog)
    assert catalog.refused == {}


@pytest.mark.parametrize("trouble", [StoreError("the store does not answer"), OSError(28, "No space left on device")])
def test_a_store_or_disk_that_hiccups_is_asked_again_at_the_next_look(source, trouble):
    catalog = Catalog(source, Engine(), BASE)
    source.names = {"champion": ONE}
    source.broken[ONE.name] = trouble
    refreshed(catalog)
    assert catalog.resolve("champion") is None
    source.broken.clear()
    refreshed(catalog)
    assert catalog.resolve("champion").version == ONE


def test_a_registry_that_is_away_changes_nothing_and_says_so(source):
    catalog = Catalog(source, Engine(), BASE)
    source.names = {"champion": ONE}
    refreshed(catalog)
    source.away = "the store does not answer"
    refreshed(catalog)
    assert catalog.error == "the store does not answer"
    assert catalog.resolve("champion").version == ONE
    source.away = None
    refreshed(catalog)
    assert catalog.error is None


def test_more_versions_than_slots_are_refused_and_served_when_there_is_room(source):
    catalog = Catalog(source, Engine(slots=1), BASE)
    source.names = {"a": ONE, "b": OTHER}
    refreshed(catalog)
    assert catalog.refused == {OTHER.name: "all taken"}
    source.names = {"b": OTHER}
    refreshed(catalog, times=2)
    assert catalog.resolve("b").version == OTHER
    assert catalog.refused == {}


def test_a_second_family_is_served_where_both_do_not_fit_beside_each_other(source):
    catalog = Catalog(source, Engine(slots=3), BASE)
    source.names = {"a": version("a/lora-all", 1), "b": version("b/lora-all", 2)}
    refreshed(catalog)
    source.names = {"a": version("a/lora-all", 3), "b": version("b/lora-all", 4)}
    refreshed(catalog)
    assert catalog.refused == {}
    assert catalog.names == source.names


def test_a_version_without_a_place_is_not_fetched_at_every_look(source):
    catalog = Catalog(source, Engine(slots=1), BASE)
    source.names = {"a": ONE, "b": OTHER}
    refreshed(catalog, times=5)
    assert source.fetched.count(OTHER.name) == 1


def canary_catalog(source, share=0.25):
    catalog = Catalog(source, Engine(), BASE, Canary(share))
    source.names, source.staging = {"champion": ONE, "hep-th.lora-all": ONE}, TWO
    return refreshed(catalog)


def test_a_version_rolled_back_is_no_canary(tmp_path):
    registry = Registry.open(str(tmp_path / "registry"))
    made = [make_adapter(tmp_path / str(n), "hep-th/lora-all", seed=n) for n in range(3)]
    good, bad, new = [register_adapter(registry, "hep-th/lora-all", folder) for folder in made]
    registry.promote(good.name)
    registry.promote(bad.name)
    registry.archive(new.name)
    source = RegistrySource(registry.store.uri)
    assert source.snapshot().staging is None
    registry.rollback()
    assert source.snapshot().staging is None
    registry.restore(new.name)
    assert source.snapshot().staging.name == new.name


def sample(metric, **labels):
    return REGISTRY.get_sample_value(metric, labels)


def test_the_canary_gets_its_share_of_the_champions_requests_only(source):
    random.seed(1)
    catalog = canary_catalog(source)
    drawn = [catalog.resolve("champion") for _ in range(4000)]
    share = sum(t.version == TWO for t in drawn) / 4000
    assert share == pytest.approx(0.25, abs=0.03)
    assert {t.arm for t in drawn} == {"champion", "canary"}
    assert all(catalog.resolve("hep-th/lora-all").version == ONE for _ in range(100))


def test_without_a_share_or_a_candidate_there_is_no_canary(source):
    catalog = canary_catalog(source, share=0)
    assert catalog.resolve("champion").arm is None
    source.staging = None
    assert canary_catalog(AdapterSource()).resolve("champion").version in (ONE, TWO)


def test_a_failing_canary_loses_its_share_until_there_is_another(source):
    catalog = canary_catalog(source, share=1.0)
    assert catalog.resolve("champion").version == TWO
    for _ in range(100):
        catalog.canary.record("champion", ONE, failed=False)
    for i in range(32):
        catalog.canary.record("canary", TWO, failed=i % 2 == 0)
    assert catalog.resolve("champion").version == ONE
    assert sample("feyntune_canary_backed_off", version=TWO.name) == 1
    refreshed(catalog)
    source.names["x"] = OTHER
    refreshed(catalog)
    assert catalog.resolve("champion").version == ONE
    source.staging = version("hep-th/lora-all", 9)
    refreshed(catalog)
    assert catalog.resolve("champion").version == source.staging
    assert sample("feyntune_canary_backed_off", version=TWO.name) is None


def test_a_canary_that_fails_no_more_than_the_champion_stays(source):
    catalog = canary_catalog(source, share=1.0)
    for i in range(100):
        catalog.canary.record("champion", ONE, failed=i % 10 == 0)
        catalog.canary.record("canary", TWO, failed=i % 10 == 0)
    assert catalog.resolve("champion").version == TWO


def test_the_registry_counts_as_read_only_when_what_is_in_it_is_loaded(source):
    """`read` makes an endpoint ready: before, a pod that replaces another would not know the champion yet."""
    source.names = {"hep-th.lora-all": ONE, "champion": ONE}
    catalog = Catalog(source, Engine(), BASE)
    real, seen = source.fetch, []
    source.fetch = lambda *arguments: seen.append(catalog.read) or real(*arguments)
    refreshed(catalog)
    assert seen == [0.0]
    assert catalog.read > 0


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_an_equal_candidate_is_backed_off_no_more_often_than_promised(rate):
    draw = random.Random(7)
    backed_off = 0
    for _ in range(300):
        canary = Canary(0.5, candidate=TWO)
        for _ in range(1200):
            arm, version = ("canary", TWO) if draw.random() < 0.5 else ("champion", ONE)
            canary.record(arm, version, failed=draw.random() < rate)
        backed_off += canary.backed_off is not None
    assert backed_off / 300 <= 0.02  # 1 % is promised; the rest is the simulation's own error


def test_an_error_of_any_kind_refuses_one_adapter_and_serves_the_others(source):
    catalog = Catalog(source, Engine(), BASE)
    source.names = {"a": ONE, "b": OTHER}
    source.broken[ONE.name] = NotImplementedError('"isfinite" not implemented for Float8')
    refreshed(catalog)
    assert "NotImplementedError" in catalog.refused[ONE.name]
    assert catalog.resolve("b").version == OTHER


def test_an_endpoint_is_not_ready_before_its_champion_answers(source):
    catalog = Catalog(source, Engine(), BASE)
    source.names, source.aliases = {"a": OTHER, "champion": ONE}, frozenset({"champion"})
    source.broken[ONE.name] = StoreError("the store does not answer")
    refreshed(catalog)
    assert not catalog.settled
    assert catalog.missing == {"champion": ONE.name}
    assert sample("feyntune_name_missing", name="champion") == 1
    source.broken.clear()
    refreshed(catalog)
    assert catalog.settled
    assert catalog.missing == {}
    assert sample("feyntune_name_missing", name="champion") is None


def test_the_champion_gets_the_only_slot(source):
    catalog = Catalog(source, Engine(slots=1), BASE)
    source.names, source.aliases = {"a": OTHER, "champion": ONE}, frozenset({"champion"})
    refreshed(catalog)
    assert catalog.names == {"champion": ONE}


def test_a_quarantined_version_is_served_no_more_and_says_why(source):
    engine = Engine()
    catalog = Catalog(source, engine, BASE)
    source.names = {"a": ONE, "b": OTHER}
    refreshed(catalog)
    catalog.quarantine(ONE, "not finite")
    source.names["c"] = OTHER
    refreshed(catalog)
    assert catalog.resolve("a") is None
    assert "quarantined" in catalog.why_not("a")
    assert engine.loaded == {OTHER.digest}
    assert sample("feyntune_name_missing", name="a") == 1


@pytest.mark.parametrize("counts", [(32, 3, 100, 2), (32, 0, 10, 10), (5, 5, 5, 0), (128, 9, 3000, 20), (40, 1, 0, 0)])
def test_the_canarys_test_is_fishers(counts):
    n, failures, others, other_failures = counts
    failed, total = failures + other_failures, n + others
    ways = sum(math.comb(failed, k) * math.comb(total - failed, n - k) for k in range(failures, min(n, failed) + 1))
    assert p_value(*counts) == pytest.approx(ways / math.comb(total, n), rel=1e-9)


def test_the_canarys_test_ends_however_many_requests_there_were():
    """It runs on the event loop. Exact arithmetic would take hours here."""
    assert p_value(1 << 20, 53_000, 10_000_000, 500_000) == pytest.approx(0.0075786586, rel=1e-6)  # scipy's
    assert p_value(1 << 20, 60_000, 10_000_000, 500_000) < 1e-100


def test_what_its_manifest_rules_out_is_not_fetched(source):
    source.names = {"champion": ONE, "big": TWO, "code": OTHER}
    source.bases[ONE.name] = "c" * 64
    source.files = {TWO.name: {"x.bin.safetensors": File(sha256="0", size=10**12)}}
    source.files[OTHER.name] = {"x.pkl": File(sha256="0", size=1)}
    catalog = refreshed(Catalog(source, Engine(), BASE))
    assert source.fetched == []
    for version, reason in ((ONE, "trained on base cccc"), (TWO, "1000000000000 bytes"), (OTHER, "holds x.pkl")):
        assert reason in catalog.refused[version.name]
