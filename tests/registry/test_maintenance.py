"""Backup, restore, fsck and gc, also while others write."""

import threading

import pytest
from typer.testing import CliRunner

from feyntune.cli.main import app
from feyntune.errors import UserError
from feyntune.registry.maintenance import check_registry, copy_registry, remove_unused, restore_registry
from feyntune.registry.registry import Registry
from tests.registry.test_registry import entry


@pytest.fixture
def filled(store_uri, tmp_path):
    """A registry with a champion, a former one, and an archived version."""
    registry = Registry.open(store_uri)
    entries = [entry(tmp_path / "made", seed=s) for s in range(3)]
    registry.add(entries)
    for version, _, _ in entries[:2]:
        registry.promote(version.name)
    registry.archive(entries[2][0].name)
    return registry, [v for v, _, _ in entries]


def test_a_backup_is_the_same_registry_and_comes_back(filled, store_uri, tmp_path):
    registry, _ = filled
    backup = str(tmp_path / "backup")
    assert copy_registry(store_uri, backup) == len(registry.snapshot().history)
    assert copy_registry(store_uri, backup) == 0
    assert Registry.open(backup).snapshot() == registry.snapshot()
    assert check_registry(backup, files=True) == []
    restored = str(tmp_path / "restored")
    restore_registry(backup, restored)
    assert Registry.open(restored).snapshot() == registry.snapshot()


@pytest.mark.usefixtures("filled")
def test_a_backup_of_another_state_or_of_nothing_is_refused(store_uri, tmp_path):
    backup = str(tmp_path / "backup")
    copy_registry(store_uri, backup)
    Registry.open(backup).rollback()
    with pytest.raises(UserError, match="holds 1 events that"):
        copy_registry(store_uri, backup)
    with pytest.raises(UserError, match="holds no registry"):
        restore_registry(str(tmp_path / "nothing"), str(tmp_path / "restored"))


def test_a_backup_made_while_others_register_is_whole(tmp_path):
    uri = str(tmp_path / "r")
    entries = [entry(tmp_path / "made", seed=s) for s in range(12)]
    Registry.open(uri).add(entries[:1])

    def register():
        for e in entries[1:]:
            Registry.open(uri).add([e])
            Registry.open(uri).promote(e[0].name)

    writer = threading.Thread(target=register)
    writer.start()
    while True:
        alive = writer.is_alive()
        copy_registry(uri, str(tmp_path / "backup"))
        assert check_registry(str(tmp_path / "backup"), files=True) == []
        if not alive:
            break
    writer.join()
    assert Registry.open(str(tmp_path / "backup")).snapshot() == Registry.open(uri).snapshot()


def test_the_check_names_what_is_missing_changed_and_failing(filled, store_uri):
    registry, versions = filled
    assert check_registry(store_uri, files=True) == []
    registry.store.delete(f"{versions[0].adapter}/manifest.json")
    registry.store.put(f"{versions[1].adapter}/adapter_model.safetensors", b"x")
    assert [p.split(":")[0] for p in check_registry(store_uri)] == [versions[0].name]
    problems = check_registry(store_uri, files=True)
    assert "is missing" in problems[0]
    assert "does not match its manifest" in problems[1]


def test_the_files_of_what_was_archived_long_ago_are_removed_and_nothing_else(filled, store_uri, tmp_path):
    registry, versions = filled
    before = registry.snapshot()
    registry.store.put("adapters/orphan/0000/weights", b"x")
    assert remove_unused(store_uri) == []  # all are young
    gone = {versions[2].adapter, versions[2].card, "adapters/orphan/0000"}
    assert set(remove_unused(store_uri, older_than_days=-1, dry_run=True)) == gone
    assert check_registry(store_uri) == []
    assert set(remove_unused(store_uri, older_than_days=-1)) == gone
    assert Registry.open(store_uri).snapshot() == before
    assert check_registry(store_uri, files=True) == []
    with pytest.raises(UserError, match="were removed"):
        registry.restore(versions[2].name)
    copy_registry(store_uri, str(tmp_path / "backup"))


def test_the_commands_say_what_they_did(filled, store_uri, tmp_path):
    backup = str(tmp_path / "backup")
    run = CliRunner().invoke
    assert "events were copied" in run(app, ["registry", "backup", backup, "--registry", store_uri]).output
    restored = ["registry", "restore", backup, "--registry", str(tmp_path / "restored")]
    assert "events were copied" in run(app, restored).output
    assert "Nothing is wrong" in run(app, ["registry", "fsck", "--files", "--registry", store_uri]).output
    registry, versions = filled
    registry.store.delete(f"{versions[0].adapter}/manifest.json")
    broken = run(app, ["registry", "fsck", "--registry", store_uri])
    assert broken.exit_code == 1
    assert "is missing" in broken.output
    assert (
        versions[2].adapter in run(app, ["registry", "gc", "--days", "-1", "--dry-run", "--registry", store_uri]).output
    )
