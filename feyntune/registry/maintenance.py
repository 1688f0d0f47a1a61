"""Backing up, restoring, checking and cleaning a registry, while others may write to it."""

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from feyntune.artifacts.artifact import MANIFEST
from feyntune.artifacts.names import StoreError
from feyntune.artifacts.store import Store, open_store, pull, push, stored_manifest
from feyntune.errors import UserError
from feyntune.registry.registry import Registry
from feyntune.telemetry import log


def copy_registry(source: str, target: str) -> int:
    """Copy the registry at `source` to `target`: a backup, or, the other way round, its restoration.

    What is copied is the state at the moment of the call, however much is written meanwhile: the events are listed
    first, then every folder they name is copied and checked, then the events, oldest first. So the copy is a registry
    at every moment, and one that was interrupted is completed by copying again.

    Returns:
        How many events were copied; those that the target has already are not.

    Raises:
        UserError: `target` holds events that `source` does not: it is another registry, or a newer state.
        StoreError: a store does not answer, or something in `source` is damaged or missing.
    """
    origin, copy = Registry.open(source), Registry.open(target)
    state = origin.snapshot()
    names = [entry.name for entry in state.history]
    existing = {n.removeprefix("events/").removesuffix(".json") for n in copy.store.names("events/")}
    if extra := sorted(existing - set(names)):
        raise UserError(
            f"{target} holds {len(extra)} events that {source} does not ({extra[0]} …): copy to another place."
        )
    for version in state.versions.values():
        for folder in (version.adapter, version.card):
            if stored_manifest(origin.store, folder) is None and version.stage == "archived":
                continue  # removed by `remove_unused`
            _copy_folder(origin.store, copy.store, folder)
    missing = [n for n in names if n not in existing]
    for name in missing:
        copy.store.put(f"events/{name}.json", origin.store.get(f"events/{name}.json"))
    return len(missing)


def _copy_folder(source: Store, target: Store, name: str) -> None:
    if stored_manifest(target, name) is not None:
        return
    with tempfile.TemporaryDirectory(prefix="feyntune-copy-") as tmp:
        pull(source, name, Path(tmp) / "folder")
        push(target, Path(tmp) / "folder", name)


def check_registry(uri: str, files: bool = False) -> list[str]:
    """Everything that is wrong with a registry, one sentence each; an empty list where nothing is.

    Args:
        files: also read every adapter and card and compare it with its manifest.
    """
    registry = Registry.open(uri)
    try:
        state = registry.snapshot()
    except StoreError as e:
        return [str(e)]
    problems = [
        f"{alias} ({state.aliases[alias]}) failed the gate when measured again: {why}: promote another or roll back."
        for alias, why in state.failing.items()
    ]
    for version in state.versions.values():
        for folder in (version.adapter, version.card):
            try:
                manifest = stored_manifest(registry.store, folder)
                if manifest is None:
                    if version.stage != "archived":
                        problems.append(f"{version.name}: {folder} is missing: restore it from a backup.")
                    continue
                if folder == version.adapter and manifest.digest != version.digest:
                    problems.append(f"{version.name}: {folder} holds another adapter: restore it from a backup.")
                if files:
                    with tempfile.TemporaryDirectory(prefix="feyntune-check-") as tmp:
                        pull(registry.store, folder, Path(tmp) / "folder")
            except UserError as e:
                problems.append(f"{version.name}: {e}")
    return problems


def remove_unused(uri: str, older_than_days: float = 30, dry_run: bool = False) -> list[str]:
    """Delete the files of archived versions, and folders that no event names, where they are older than some days.

    Events stay, so the history does. A version whose files are gone can be registered again, not restored. A folder
    that no event names may be a registration under way, so young ones stay.

    Returns:
        The folders that were deleted, or with `dry_run` would be.
    """
    registry = Registry.open(uri)
    state = registry.snapshot()
    used = {f for v in state.versions.values() if v.stage != "archived" for f in (v.adapter, v.card)}
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    archived = {
        name: datetime.fromisoformat(e.event.time)
        for e in state.history
        if e.event.kind == "archive" and e.rejected is None
        for name in e.event.versions
    }
    young = {f for v in state.versions.values() if archived.get(v.name, before) > before for f in (v.adapter, v.card)}
    removed = []
    for folder, names in _folders(registry.store):
        if folder in used or folder in young or registry.store.modified(names[-1]) > before:
            continue
        removed.append(folder)
        if not dry_run:
            log.info("removing %s", folder)
            # The manifest first: a folder without one does not exist.
            for name in sorted(names, key=lambda n: not n.endswith(f"/{MANIFEST}")):
                registry.store.delete(name)
    return removed


def _folders(store: Store) -> Iterator[tuple[str, list[str]]]:
    """Folders of adapters and cards with the names of their files."""
    folders: dict[str, list[str]] = {}
    for top, depth in (("adapters/", 3), ("cards/", 4)):
        for name in store.names(top):
            folders.setdefault("/".join(name.split("/")[:depth]), []).append(name)
    yield from folders.items()


def restore_registry(source: str, target: str) -> int:
    """Copy a backup to an empty place; see `copy_registry`.

    Raises:
        UserError: there is no registry at `source`.
    """
    if next(iter(open_store(source).names("events/")), None) is None:
        raise UserError(f"{source} holds no registry: give the address of a backup.")
    return copy_registry(source, target)
