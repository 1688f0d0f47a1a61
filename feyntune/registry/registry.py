"""The registry: which adapters there are, how they measured, and which of them answers to which name.

It lives in any store and has no server of its own; nothing in it is ever changed or overwritten:

    adapters/SLUG/DIGEST/             an adapter, sealed
    cards/SLUG/DIGEST/COMPARISON/     its model card and figures from one comparison, sealed
    events/SEQ.json                   one decision: adapters added, promoted, rolled back, archived …
    events/SEQ-SHA256.json            the same, in a store without conditional writes

Stages and aliases are stored nowhere: they are what all events add up to (`replay`). A decision is one conditional
put of the next SEQ: of several writers one succeeds, the others read again and repeat. A store without conditional
writes has the protocol of `_decide_by_order` instead; README.md says what that can get wrong.
"""

import getpass
import hashlib
import json
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from feyntune.artifacts.artifact import Manifest, sha256_json
from feyntune.artifacts.names import Missing, StoreError
from feyntune.artifacts.store import Store, creates_atomically, open_store, pull, push, stored_manifest
from feyntune.errors import UserError
from feyntune.registry.models import (
    CHAMPION,
    KINDS,
    PREVIOUS,
    ConflictError,
    Deployment,
    Entry,
    Event,
    Move,
    State,
    Version,
)
from feyntune.registry.replay import replay
from feyntune.telemetry import log

CONFIRMATIONS = 2  # events a writer puts after a decision before it believes what it reads; see README.md
SETTLE = 0.2  # seconds it waits before that, at least; else four times what its own put took

_EVENT = re.compile(r"\d{10}(-[0-9a-f]{64})?")
_TRIES = 100  # of a conditional write that meets other writers
_DECISIONS = ("promote", "rollback", "archive", "restore")


class Registry:
    """A registry in a store. Every method reads the store anew; many may write at once."""

    def __init__(self, store: Store):
        self.store = store
        self._events: dict[str, Event] = {}  # read so far
        self._listing: set[str] = set()  # of the last snapshot
        self._conditional: bool | None = None  # whether the store has conditional writes; not tried yet

    @classmethod
    def open(cls, uri: str) -> "Registry":
        """The registry at `uri` (`s3://bucket/prefix`, `file:///folder` or a path); empty where nothing is."""
        return cls(open_store(uri))

    def revision(self) -> str:
        """Something that changes when the registry does, for one listing: equal to `snapshot().revision`."""
        return sha256_json(self._listed())

    def snapshot(self) -> State:
        """The state now: what the events in the store add up to. Each event is read once.

        Raises:
            StoreError: an event that others build on is missing, or one was changed (named).
        """
        names = self._listed()
        if lost := sorted(self._listing - set(names)):
            log.warning("%s: %d events disappeared since the last read (%s …)", self.store.uri, len(lost), lost[0])
        self._listing = set(names)
        self._read(n for n in names if n not in self._events)
        current = {n: self._events[n] for n in names}
        while missing := {p for e in current.values() for p in e.parents} - current.keys():
            self._read(missing)  # a listing over several pages can miss an event and show its successor
            current |= {n: self._events[n] for n in missing}
        return replay(current, sha256_json(names))

    def versions(self) -> list[Version]:
        """All versions, archived ones included, oldest first."""
        return list(self.snapshot().versions.values())

    def aliases(self) -> dict[str, str]:
        """Alias to version name."""
        return self.snapshot().aliases

    def history(self) -> list[Entry]:
        """What was decided, oldest first, rejected decisions included."""
        return [e for e in self.snapshot().history if e.event.kind != "confirm"]

    def resolve(self, name: str) -> Version:
        """See `State.resolve`."""
        return self.snapshot().resolve(name)

    def add(self, adapters: Iterable[tuple[Version, Path, Path]]) -> list[Version]:
        """Register adapters with their cards, in one event. Those that are there with the same card are skipped.

        Args:
            adapters: (version, sealed adapter folder, sealed card folder) of each; see `register.register`.

        Returns:
            The versions as they now stand, in the order given.
        """
        seen = self.snapshot()
        adapters = list(adapters)
        new = []
        for version, adapter, card in adapters:
            existing = seen.versions.get(version.name)
            if existing is None or (existing.card, existing.gate) != (version.card, version.gate):
                push(self.store, adapter, version.adapter)
                push(self.store, card, version.card)
                new.append(version)
        if new:
            seen = self._decide(seen, "add", add=new)
        return [seen.versions[version.name] for version, _, _ in adapters]

    def promote(self, name: str, alias: str = CHAMPION, seen: State | None = None) -> Version:
        """Put a version into production under `alias`; under `champion` also under its mixture's champion.

        Args:
            seen: the state on which it was decided; without it, the state now.

        Raises:
            UserError: the version did not pass the gate (with the clauses that failed), is archived or unknown.
            ConflictError: another writer moved the alias in between.
        """
        seen = seen or self.snapshot()
        version = seen.resolve(name)
        of_mixture = f"{CHAMPION}:{version.mixture}"
        if alias not in (CHAMPION, of_mixture):
            raise UserError(f"{alias!r} is not an alias for {version.variant}: use {CHAMPION} or {of_mixture}.")
        aliases = [a for a in dict.fromkeys((alias, of_mixture)) if seen.aliases.get(a) != version.name]
        if not aliases:
            return version
        after = self.decide_promotion(seen, [version], {a: version for a in aliases})
        return after.versions[version.name]

    def decide_promotion(self, seen: State, versions: list[Version], aliases: dict[str, Version]) -> State:
        """Put `versions` into production and point `aliases` at some of them, all in one event or not at all.

        Raises:
            UserError: one of them did not pass the gate.
            ConflictError: one of the aliases is no longer where it was in `seen`.
        """
        for version in versions:
            if not version.gate.passed:
                raise UserError(f"{version.name} did not pass the gate: {'; '.join(version.gate.reasons)}.")
        moves = {a: Move(old=seen.aliases.get(a), new=v.name) for a, v in aliases.items()}
        return self._decide(seen, "promote", versions=[v.name for v in versions], moves=moves)

    def rollback(self, alias: str = CHAMPION) -> Version | None:
        """Take back the version that `alias` names: it goes to staging and loses every alias it holds.

        Each alias goes to the version that held it before, so a second rollback goes one further back. A
        alias whose champion had none before is left without one: its name then answers 404, the base remains.

        Returns:
            The version that `alias` names now, or None.

        Raises:
            UserError: no version holds `alias`, or it is not a champion's alias.
            ConflictError: another writer decided in between.
        """
        if not alias.startswith(CHAMPION):
            raise UserError(f"{alias!r} cannot be rolled back: give {CHAMPION} or {CHAMPION}:MIXTURE.")
        seen = self.snapshot()
        if alias not in seen.aliases:
            raise UserError(f"Nothing to roll back: no version is {alias!r}.")
        bad = seen.aliases[alias]
        held = [a for a, v in seen.aliases.items() if v == bad and a.startswith(CHAMPION)]
        moves = {a: Move(old=bad, new=seen.aliases.get(a.replace(CHAMPION, PREVIOUS))) for a in held}
        after = self._decide(seen, "rollback", versions=[bad], moves=moves)
        return after.versions[after.aliases[alias]] if alias in after.aliases else None

    def archive(self, name: str) -> Version:
        """Stop serving a version; its files stay. A version that an alias names is refused.

        Raises:
            UserError: a champion (promote another or roll back first), or unknown.
        """
        seen = self.snapshot()
        version = seen.resolve(name)
        holds = [a for a, v in seen.aliases.items() if v == version.name and a.startswith(CHAMPION)]
        if holds:
            raise UserError(f"{version.name} is {holds[0]}: promote another or roll back before archiving it.")
        return self._decide(seen, "archive", versions=[version.name]).versions[version.name]

    def restore(self, name: str) -> Version:
        """Serve an archived version again, by its full name VARIANT@DIGEST."""
        seen = self.snapshot()
        matches = [v for v in seen.versions.values() if v.stage == "archived" and v.name.startswith(name)]
        if len(matches) != 1:
            raise UserError(f"{name!r} names {len(matches)} archived versions: give VARIANT@DIGEST of one.")
        if stored_manifest(self.store, matches[0].adapter) is None:
            raise UserError(f"The files of {matches[0].name} were removed (registry gc): register it again.")
        return self._decide(seen, "restore", versions=[matches[0].name]).versions[matches[0].name]

    def record_deployment(self, deployment: Deployment) -> None:
        """Write down that `deployment` answers, as the end of the lineage."""
        self._decide(self.snapshot(), "deploy", deployment=deployment)

    def fetch(self, version: Version, folder: str | Path) -> Manifest:
        """Copy a version's adapter to `folder`, every file checked on arrival.

        Raises:
            ArtifactError: a file in the store is damaged (named).
        """
        manifest = pull(self.store, version.adapter, folder, kind="adapter")
        if manifest.digest != version.digest:
            shutil.rmtree(folder)
            raise StoreError(f"{self.store.uri}/{version.adapter} is not {version.name}: it was replaced, restore it.")
        return manifest

    def export(self, name: str, folder: str | Path) -> Version:
        """Write a version as a folder that PEFT loads and the Hugging Face hub takes: card, weights, config.

        Raises:
            UserError: unknown version, or `folder` is not empty.
        """
        version = self.resolve(name)
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: choose another folder to export to.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as tmp:
            pull(self.store, version.card, Path(tmp) / "card", kind="card")
            self.fetch(version, Path(tmp) / "adapter")
            whole = Path(tmp) / "whole"
            whole.mkdir()
            for source in ("card/README.md", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
                shutil.copy(Path(tmp) / source, whole)
            os.replace(whole, folder)
        return version

    def card(self, name: str) -> str:
        """The model card of a version, as Markdown."""
        return self.store.get(f"{self.resolve(name).card}/README.md").decode()

    def _listed(self) -> list[str]:
        names = (n.removeprefix("events/").removesuffix(".json") for n in self.store.names("events/"))
        return sorted(n for n in names if _EVENT.fullmatch(n))

    def _read(self, names: Iterable[str]) -> None:
        new = list(names)
        if new:
            with ThreadPoolExecutor(min(16, len(new))) as pool:
                self._events.update(zip(new, pool.map(self._event, new), strict=True))

    def _event(self, name: str) -> Event:
        where = f"{self.store.uri}/events/{name}.json"
        try:
            raw = self.store.get(f"events/{name}.json")
        except Missing as e:
            raise StoreError(f"{where} was deleted, but later events depend on it: restore it.") from e
        try:
            return read_event(name, raw)
        except ValueError as e:
            raise StoreError(f"{where} {e}") from e

    def _decide(self, seen: State, kind: str, **fields: Any) -> State:
        """Write an event decided on `seen`; returns the state it led to.

        Raises:
            ConflictError: another writer decided in between, and what was decided here no longer applies.
        """
        if self._conditional is None:
            self._conditional = creates_atomically(self.store)
        return (self._decide_by_condition if self._conditional else self._decide_by_order)(seen, kind, **fields)

    def _decide_by_condition(self, seen: State, kind: str, **fields: Any) -> State:
        """The next SEQ is written by one writer only; who comes second looks whether its decision still applies."""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(random.uniform(0, 0.02 * min(attempt, 20)))
                seen = self.snapshot()
            event = self._make_event(seen, kind, **fields)
            content = event.model_dump(mode="json", exclude_defaults=True)
            raw = json.dumps({**content, "digest": sha256_json(content)}).encode()
            name = f"{event.seq:010d}"
            if self.store.create(f"events/{name}.json", raw):
                self._events[name] = event
                after = self.snapshot()
                # Decided on the newest state, so it can only be refused for what was wrong from the start.
                if rejected := next((e.rejected for e in after.history if e.name == name), None):
                    raise ConflictError(f"Nothing was changed: {rejected}. Read the registry again and retry.")
                return after
        raise StoreError(f"{self.store.uri}: {_TRIES} writes conflicted with other writers: try again later.")

    def _decide_by_order(self, seen: State, kind: str, **fields: Any) -> State:
        """Without conditional writes: write, let what others wrote meanwhile arrive, and see who came first."""
        began = time.monotonic()
        name = self._put(seen, kind, **fields)
        if kind in _DECISIONS:
            time.sleep(max(SETTLE, 4 * (time.monotonic() - began)))
        after = self.snapshot()
        # Until it is built on, an event of the same `seq` that is still on its way could come before it.
        for _ in range(CONFIRMATIONS if kind in _DECISIONS else 0):
            self._put(after, "confirm")
            after = self.snapshot()
        rejected = next(e.rejected for e in reversed(after.history) if e.name == name)
        if rejected is not None:
            raise ConflictError(f"Nothing was changed: {rejected}. Read the registry again and retry.")
        return after

    def _make_event(self, seen: State, kind: str, **fields: Any) -> Event:
        by = f"{_user()}@{socket.gethostname()}:{os.getpid()}"
        basics = {"format": 1, "seq": seen.seq + 1, "parents": seen.heads, "time": datetime.now(UTC).isoformat()}
        return Event.model_validate({**basics, "by": by, "kind": kind, **fields})

    def _put(self, seen: State, kind: str, **fields: Any) -> str:
        event = self._make_event(seen, kind, **fields)
        raw = event.model_dump_json(exclude_defaults=True).encode()
        name = f"{event.seq:010d}-{hashlib.sha256(raw).hexdigest()}"
        self.store.put(f"events/{name}.json", raw)
        self._events[name] = event
        return name


def read_event(name: str, raw: bytes) -> Event:
    """The event in `raw`, checked against the digest in its name or in itself.

    Raises:
        ValueError: it was changed, or is of a format of a newer version.
    """
    changed = "was changed after it was written (sha256): restore it."
    try:
        content = json.loads(raw)
        digest = content.pop("digest", "")
    except (ValueError, AttributeError):
        raise ValueError(changed) from None
    expected = name.partition("-")[2]
    if (expected or digest) != (hashlib.sha256(raw).hexdigest() if expected else sha256_json(content)):
        raise ValueError(changed)
    if content.get("format") == 1 and content.get("kind") not in KINDS:  # its other fields may mean anything
        content = {k: content.get(k) for k in ("format", "seq", "parents", "time", "by", "kind")}
    try:
        return Event.model_validate(content)
    except ValidationError as e:
        raise ValueError("was written by another version of feyntune: use that or a newer one.") from e


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a pod's numeric user has no name
        return str(os.getuid())
