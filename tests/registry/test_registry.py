"""The registry over a real store: what one writer does, and what several do at once."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feyntune.artifacts.artifact import ArtifactError, write_artifact
from feyntune.artifacts.store import FolderStore, StoreError, open_store
from feyntune.errors import UserError
from feyntune.registry.gate import Interval, Measured, Perplexity, Policy, check_gate
from feyntune.registry.models import ConflictError, Deployment, Version
from feyntune.registry.registry import Registry
from feyntune.registry.replay import diff
from tests.registry.factories import make_adapter


def entry(folder: Path, variant="hep-th/lora-qkv", seed=0, mean=-2.0, passes=True) -> tuple[Version, Path, Path]:
    """An adapter with its card, as `register` gives it to the registry."""
    from feyntune.artifacts.artifact import read_manifest
    from feyntune.names import slug

    where = folder / f"{slug(variant)}-{seed}"
    digest = read_manifest(make_adapter(where, variant, seed)).digest
    card = folder / f"{slug(variant)}-{seed}-card"
    with write_artifact(card, "card", inputs={"adapter": digest}) as tmp:
        (tmp.path / "README.md").write_text(f"# {variant} {seed}\n")
    measured = Measured(
        test="t",
        base="b" * 64,
        abstracts=100,
        base_perplexity=Perplexity(abstract_mean=40, token=38),
        perplexity=Perplexity(abstract_mean=40 + mean, token=38 + mean),
        delta=Interval(mean=mean, low=mean - 1, high=mean / 2 if passes else 1),
    )
    version = Version(
        variant=variant,
        digest=digest,
        adapter=f"adapters/{slug(variant)}/{digest[:16]}",
        card=f"cards/{slug(variant)}/{digest[:16]}/{read_manifest(card).digest[:16]}",
        rank=4,
        targets=["q_proj"],
        lineage={"corpus": "c" * 64, "adapter": digest},
        measured=measured,
        gate=check_gate(measured, Policy()),
    )
    return version, where, card


@pytest.fixture
def registry(store_uri) -> Registry:
    return Registry.open(store_uri)


@pytest.fixture
def three(registry, tmp_path) -> list[Version]:
    """Three versions that passed the gate: two of one variant, one of another mixture."""
    made = [("hep-th/lora-qkv", 0), ("hep-th/lora-qkv", 1), ("gr-qc/lora-all", 0)]
    return [registry.add([entry(tmp_path / "made", v, s)])[0] for v, s in made]


def test_an_empty_store_is_an_empty_registry(registry):
    assert registry.versions() == []
    assert registry.aliases() == {}
    assert registry.history() == []
    with pytest.raises(UserError, match="'champion' is not in the registry; it has: nothing yet"):
        registry.resolve("champion")
    with pytest.raises(UserError, match="Nothing to roll back"):
        registry.rollback()


def test_what_passed_the_gate_waits_in_staging_and_what_did_not_is_a_candidate(registry, tmp_path):
    good, bad = registry.add([entry(tmp_path), entry(tmp_path, "gr-qc/lora-all", passes=False)])
    assert (good.stage, bad.stage) == ("staging", "candidate")
    assert {v.name for v in registry.snapshot().served} == {good.name, bad.name}
    assert registry.aliases() == {}


def test_what_did_not_pass_the_gate_is_never_promoted(registry, tmp_path):
    (bad,) = registry.add([entry(tmp_path, passes=False)])
    before = registry.revision()
    with pytest.raises(UserError, match=r"did not pass the gate: variant minus base .* is 1 above"):
        registry.promote(bad.name)
    assert registry.revision() == before
    # nor by an event written past `promote`
    with pytest.raises(ConflictError, match="did not pass the gate"):
        registry._decide(registry.snapshot(), "promote", versions=[bad.name])
    assert registry.resolve(bad.name).stage == "candidate"


def test_adding_the_same_again_adds_nothing(registry, tmp_path):
    one = entry(tmp_path)
    registry.add([one])
    registry.promote(one[0].name)
    before = registry.revision()
    assert registry.add([one])[0].stage == "production"
    assert registry.revision() == before
    assert len(registry.history()) == 2


def test_promoting_moves_the_champion_and_its_mixtures(registry, three):
    first, second, other = three
    registry.promote(first.name)
    assert registry.aliases() == {"champion": first.name, "champion:hep-th": first.name}
    registry.promote(other.name)
    assert registry.aliases() == {
        "champion": other.name,
        "previous": first.name,
        "champion:hep-th": first.name,
        "champion:gr-qc": other.name,
    }
    registry.promote(second.name, alias="champion:hep-th")
    assert registry.aliases()["champion"] == other.name
    assert registry.aliases()["champion:hep-th"] == second.name
    assert registry.aliases()["previous:hep-th"] == first.name
    assert [v.stage for v in registry.versions()] == ["production"] * 3
    with pytest.raises(UserError, match="is not an alias for hep-th/lora-qkv"):
        registry.promote(second.name, alias="champion:gr-qc")


def test_promoting_the_champion_again_changes_nothing(registry, three):
    registry.promote(three[0].name)
    before = registry.revision()
    assert registry.promote(three[0].name).name == three[0].name
    assert registry.revision() == before


def test_a_rollback_is_one_event_and_takes_the_bad_version_from_every_alias(registry, three):
    first, second, _ = three
    registry.promote(first.name)
    registry.promote(second.name)
    events = len(registry.history())
    assert registry.rollback().name == first.name
    assert len(registry.history()) == events + 1
    assert registry.aliases() == {"champion": first.name, "champion:hep-th": first.name}
    assert registry.resolve(second.name).stage == "staging"
    assert registry.resolve("hep-th/lora-qkv").name == first.name  # the variant's own name follows


def test_rolling_back_twice_goes_two_back_and_no_further(registry, three):
    first, second, other = three
    for v in three:
        registry.promote(v.name)
    assert registry.aliases()["previous"] == second.name
    assert registry.rollback().name == second.name
    assert "champion:gr-qc" not in registry.aliases()  # it had no champion before
    assert registry.rollback().name == first.name
    assert registry.rollback() is None  # the first champion can be undone too
    assert registry.aliases() == {}
    assert registry.resolve(first.name).stage == "staging"
    with pytest.raises(UserError, match="Nothing to roll back"):
        registry.rollback()
    with pytest.raises(UserError, match="'previous' cannot be rolled back"):
        registry.rollback("previous")
    registry.promote(other.name)  # undoing a rollback is promoting again
    assert registry.aliases()["champion"] == other.name


def test_an_archived_version_is_not_served_and_may_be_restored(registry, three):
    first, second, other = three
    registry.promote(first.name)
    registry.promote(second.name)
    registry.promote(other.name)
    with pytest.raises(UserError, match="is champion: promote another"):
        registry.archive(other.name)
    registry.rollback()
    assert registry.archive(other.name).stage == "archived"
    assert other.name not in {v.name for v in registry.snapshot().served}
    with pytest.raises(UserError, match="is not in the registry"):
        registry.resolve("gr-qc/lora-all")
    assert registry.archive(first.name).stage == "archived"
    assert "previous" not in registry.aliases()  # a rollback must not lead to what is not served
    assert registry.restore(first.name).stage == "staging"
    assert registry.aliases()["previous"] == first.name


def test_names_resolve_to_what_they_say(registry, three):
    first, second, other = three
    assert registry.resolve("hep-th/lora-qkv").name == second.name  # newest while none is in production
    registry.promote(first.name)
    assert registry.resolve("hep-th/lora-qkv").name == first.name  # then the newest in production
    assert registry.resolve("hep-th.lora-qkv").name == first.name
    assert registry.resolve(f"hep-th/lora-qkv@{second.digest[:8]}").name == second.name
    assert registry.resolve(f"gr-qc.lora-all@{other.digest}").name == other.name
    assert registry.resolve("champion:hep-th").name == first.name
    for wrong in ("hep-ph/lora-qkv", "hep-th/lora-qkv@", "hep-th/lora-qkv@ffff0", "hep-th", "", "previous"):
        with pytest.raises(UserError, match="is not in the registry"):
            registry.resolve(wrong)


def test_the_marker_changes_exactly_when_something_was_decided(registry, three, store_uri):
    reader = Registry.open(store_uri)
    seen = reader.snapshot()
    assert reader.revision() == seen.revision == reader.snapshot().revision
    registry.promote(three[0].name)
    assert reader.revision() != seen.revision
    assert reader.revision() == reader.snapshot().revision == registry.revision()
    assert reader.aliases() == registry.aliases()


def test_a_reader_fetches_an_event_once(registry, three, store_uri, monkeypatch):
    reader = Registry.open(store_uri)
    reader.snapshot()
    got = []
    get = type(reader.store).get
    monkeypatch.setattr(type(reader.store), "get", lambda self, name: got.append(name) or get(self, name))
    reader.snapshot()
    assert got == []
    registry.archive(three[2].name)
    reader.snapshot()
    assert len(got) == 1


def test_history_says_who_did_what_in_order(registry, three):
    registry.promote(three[0].name)
    registry.archive(three[2].name)
    kinds = [e.event.kind for e in registry.history()]
    assert kinds == ["add", "add", "add", "promote", "archive"]
    assert all(e.event.by and e.event.time.endswith("+00:00") and e.rejected is None for e in registry.history())


def test_the_adapter_comes_back_as_it_was(registry, three, tmp_path):
    manifest = registry.fetch(three[0], tmp_path / "got")
    assert manifest.digest == three[0].digest
    weights = "adapter_model.safetensors"
    assert (tmp_path / "got" / weights).read_bytes() == (tmp_path / "made/hep-th.lora-qkv-0" / weights).read_bytes()


def test_a_damaged_adapter_is_refused_by_name(registry, three, tmp_path):
    registry.store.put(f"{three[0].adapter}/adapter_model.safetensors", b"damaged")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors does not match"):
        registry.fetch(three[0], tmp_path / "got")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors does not match"):
        registry.export(three[0].name, tmp_path / "exported")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "store") == ["made"]


def test_an_adapter_put_in_the_place_of_another_is_refused(registry, three, tmp_path):
    for file in list(registry.store.names(f"{three[0].adapter}/")):
        registry.store.delete(file)
    from feyntune.artifacts.store import push

    push(registry.store, tmp_path / "made/hep-th.lora-qkv-1", three[0].adapter)
    with pytest.raises(StoreError, match="it was replaced"):
        registry.fetch(three[0], tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_an_event_that_was_changed_or_deleted_is_named(registry, three, store_uri):
    registry.promote(three[0].name)
    name = registry.history()[1].name
    raw = registry.store.get(f"events/{name}.json")
    registry.store.put(f"events/{name}.json", raw.replace(b"q_proj", b"k_proj"))
    with pytest.raises(StoreError, match=f"{name}.json was changed after it was written"):
        Registry.open(store_uri).snapshot()
    registry.store.delete(f"events/{name}.json")
    with pytest.raises(StoreError, match=f"{name}.json was deleted"):
        Registry.open(store_uri).snapshot()
    registry.store.put(f"events/{name}.json", raw)
    assert Registry.open(store_uri).aliases() == registry.aliases()


def test_other_objects_among_the_events_are_not_read(registry, three):
    before = registry.revision()
    registry.store.put("events/README.txt", b"hello")
    registry.store.put("events/.DS_Store", b"")
    assert registry.revision() == before
    assert len(registry.versions()) == 3


def test_a_deployment_ends_the_lineage(registry, three):
    registry.promote(three[0].name)
    registry.record_deployment(Deployment(service="ns/abstracts", url="http://x", versions=[three[0].name]))
    assert registry.snapshot().deployments[-1].versions == [three[0].name]
    assert registry.aliases()["champion"] == three[0].name


def test_diff_shows_the_fields_that_differ(registry, three):
    differences = diff(three[0], three[1])
    assert differences["digest"] == (three[0].digest, three[1].digest)
    assert "rank" not in differences
    assert "measured.delta.mean" not in differences


# --- several writers


def test_a_promotion_decided_on_a_stale_view_is_void_and_its_writer_is_told(registry, three, store_uri):
    first, _, other = three
    slow = Registry.open(store_uri)
    stale = slow.snapshot()
    registry.promote(first.name)
    with pytest.raises(ConflictError, match=f"champion was {first.name} by then, not nobody"):
        slow.promote(other.name, seen=stale)
    assert registry.aliases()["champion"] == first.name
    assert registry.resolve(other.name).stage == "staging"
    assert [e.rejected is not None for e in registry.history()][-2:] in ([False, True], [True, False])
    slow.promote(other.name)
    assert slow.aliases()["champion"] == other.name


def test_a_write_that_arrives_late_undoes_nothing_decided_meanwhile(registry, three, store_uri):
    """A writer stalls between reading and writing, for as long as it likes."""
    first, second, other = three
    stale = Registry.open(store_uri).snapshot()
    for v in (first, second):
        registry.promote(v.name)
    registry.rollback()
    before = registry.aliases()
    for name in (second.name, other.name):  # whatever the hash of its event turns out to be
        with pytest.raises(ConflictError):
            Registry.open(store_uri).promote(name, seen=stale)
    assert registry.aliases() == Registry.open(store_uri).aliases() == before


def test_racing_rollbacks_are_told_what_they_did(registry, three, store_uri):
    for v in three:
        registry.promote(v.name)
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(Registry.open(store_uri).rollback) for _ in range(2)]
    done = [t for t in tasks if t.exception() is None]
    assert all(isinstance(t.exception(), ConflictError) for t in tasks if t not in done)
    before = [three[1].name, three[0].name]  # one after the other they are two rollbacks, at once they are one
    assert registry.aliases()["champion"] == before[len(done) - 1]


def _processes():
    """New processes, cheap to start: they come from one that has imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _s3_environment() -> dict[str, str]:
    """What the process that others are forked from cannot know: it started before the store did."""
    return {n: v for n, v in os.environ.items() if n.startswith(("S3_", "AWS_"))}


def _race(env, uri, name, barrier, results):
    os.environ.update(env)
    registry = Registry.open(uri)
    seen = registry.snapshot()
    barrier.wait()
    try:
        registry.promote(name, seen=seen)
        results.put((name, "done"))
    except ConflictError:
        results.put((name, "stale"))


def test_of_racing_processes_one_promotes_and_all_agree(registry, tmp_path, store_uri):
    names = [v.name for v in registry.add(entry(tmp_path, seed=s) for s in range(4))]
    context = _processes()
    barrier, results = context.Barrier(len(names)), context.Queue()
    processes = [context.Process(target=_race, args=(_s3_environment(), store_uri, n, barrier, results)) for n in names]
    for p in processes:
        p.start()
    outcomes = dict(results.get(timeout=60) for _ in names)
    for p in processes:
        p.join()
    states = [Registry.open(store_uri).snapshot() for _ in range(2)]
    assert states[0] == states[1]
    champion = states[0].aliases["champion"]
    assert [n for n in names if outcomes[n] == "done"] == [champion]
    promotions = [e for e in states[0].history if e.event.kind == "promote"]
    assert [e.event.versions for e in promotions if e.rejected is None] == [[champion]]
    assert "previous" not in states[0].aliases


class _Unsteady:
    """A store whose every request takes its own time."""

    def __init__(self, store, seed):
        self.store, self.uri, self.random = store, store.uri, random.Random(seed)

    def get(self, name):
        return self.store.get(name)

    def put(self, name, data):
        time.sleep(self.random.expovariate(300))
        self.store.put(name, data)
        time.sleep(self.random.expovariate(300))

    def create(self, name, data):
        time.sleep(self.random.expovariate(300))
        created = self.store.create(name, data)
        time.sleep(self.random.expovariate(300))
        return created

    def delete(self, name):
        self.store.delete(name)

    def names(self, prefix=""):
        time.sleep(self.random.expovariate(300))
        yield from self.store.names(prefix)


def test_what_racing_writers_are_told_is_what_stands(tmp_path):
    entries = [entry(tmp_path / "made", seed=s) for s in range(4)]
    for race in range(20):
        store = open_store(str(tmp_path / f"store-{race}"))
        Registry(store).add(entries)
        state = Registry(store).snapshot()

        def promote(i, store=store, state=state, race=race):
            try:
                Registry(_Unsteady(store, 10 * race + i)).promote(entries[i][0].name, seen=state)
                return True
            except ConflictError:
                return False

        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(promote, range(4)))
        champion = Registry(store).aliases()["champion"]
        assert [e[0].name for e, done in zip(entries, outcomes, strict=True) if done] == [champion]


def _add_many(env, uri, folder, variant, count, barrier):
    os.environ.update(env)
    registry = Registry.open(uri)
    entries = [entry(Path(folder), variant, seed=s) for s in range(count)]
    barrier.wait()
    for e in entries:
        registry.add([e])


def test_racing_processes_lose_no_version(store_uri, tmp_path):
    variants = [f"{m}/lora-{t}" for m in ("hep-th", "gr-qc") for t in ("qkv", "all")]
    context = _processes()
    barrier = context.Barrier(len(variants))
    processes = [
        context.Process(target=_add_many, args=(_s3_environment(), store_uri, tmp_path, v, 3, barrier))
        for v in variants
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0] * len(variants)
    state = Registry.open(store_uri).snapshot()
    assert len(state.versions) == 3 * len(variants)
    assert len(state.history) == 3 * len(variants)


def _add_and_promote_for_ever(env, uri, folder, started):
    os.environ.update(env)
    registry = Registry.open(uri)
    entries = [entry(Path(folder), seed=s) for s in range(40)]
    started.set()
    for e in entries:
        with contextlib.suppress(ConflictError):
            registry.add([e])
            registry.promote(e[0].name)


def test_writers_killed_anywhere_leave_a_registry_that_reads_and_goes_on(store_uri, tmp_path):
    context = _processes()
    for round_ in range(3):
        started = context.Event()
        process = context.Process(
            target=_add_and_promote_for_ever, args=(_s3_environment(), store_uri, tmp_path / str(round_), started)
        )
        process.start()
        assert started.wait(60)
        time.sleep(0.15 + 0.1 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = Registry.open(store_uri).snapshot()
        assert all(v.adapter and v.stage for v in state.versions.values())
    registry = Registry.open(store_uri)
    (version,) = registry.add([entry(tmp_path / "after", seed=99)])
    assert registry.promote(version.name).stage == "production"
    for v in registry.versions():  # what is registered is there, whole
        registry.fetch(v, tmp_path / "fetched" / v.digest)


def test_a_writer_that_died_before_its_event_left_nothing_to_be_seen(registry, tmp_path, monkeypatch):
    one = entry(tmp_path)
    with monkeypatch.context() as m:
        m.setattr(Registry, "_make_event", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            registry.add([one])
    assert registry.versions() == []
    assert any(n.startswith("adapters/") for n in registry.store.names())
    assert registry.add([one])[0].stage == "staging"


def test_a_listing_that_missed_an_event_is_completed(registry, three, store_uri, monkeypatch):
    """Over several pages a store may list an event and not the older one written just before it."""
    registry.promote(three[0].name)
    whole = Registry.open(store_uri).snapshot()
    names = FolderStore.names if isinstance(registry.store, FolderStore) else type(registry.store).names
    missed = f"events/{whole.history[-2].name}.json"
    monkeypatch.setattr(type(registry.store), "names", lambda s, p="": (n for n in names(s, p) if n != missed))
    partial = Registry.open(store_uri).snapshot()
    assert partial.aliases == whole.aliases
    assert partial.history == whole.history


def test_no_key_of_the_store_is_in_it(registry, three):
    registry.promote(three[0].name)
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
    for name in registry.store.names():
        data = registry.store.get(name)
        assert secret is None or secret.encode() not in data
        if name.startswith("events/"):
            assert json.loads(data)["format"] == 1


def test_opening_a_store_by_address_is_enough(three, store_uri):
    assert len(Registry(open_store(store_uri)).versions()) == 3
