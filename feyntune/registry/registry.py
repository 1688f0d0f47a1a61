"""The registry: which adapters there are, how they measured, and which of them answers to which name.

It lives in any store and has no server of its own; nothing in it is ever changed or overwritten:

    adapters/SLUG/DIGEST/             an adapter, sealed
    cards/SLUG/DIGEST/COMPARISON/     its model card and figures from one comparison, sealed
    events/SEQ-SHA256.json            one decision: adapters added, promoted, rolled back, archived …

Stages and aliases are written nowhere: they are what all events add up to (`fold`). An event is one put under
the sha256 of its own bytes, so a writer that dies leaves the whole event or none, two writers never write the
same object, and no store needs conditional writes. See README.md for what happens when writers race.
"""

import getpass
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from feyntune.artifacts.artifact import Manifest, sha256_json
from feyntune.artifacts.store import Missing, Store, StoreError, open_store, pull, push
from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.registry.gate import Measured, Verdict

CHAMPION = "champion"
PREVIOUS = "previous"
SHORT = 16  # hex digits of a digest in names
CONFIRMATIONS = 2  # events a writer puts after a decision before it believes what it reads; see README.md
SETTLE = 0.2  # seconds it waits before that, at least; else four times what its own put took

Stage = Literal["candidate", "staging", "production", "archived"]

_EVENT = re.compile(r"\d{10}-[0-9a-f]{64}")
_VOIDABLE = ("promote", "rollback", "archive", "restore")


class Stale(UserError):
    """A decision was void: another writer had decided in between. Look again and repeat it."""


class Version(BaseModel):
    """An adapter as registered. Everything but the stage is fixed by the event that added it.

    Attributes:
        digest: of the adapter's manifest. `adapter` and `card` are folders in the store.
        rank, targets: of the LoRA, so that a server can size itself without opening the adapter.
        lineage: digests of what it came from and what measured it (corpus, split, base, comparison …).
        stage: candidate (did not pass the gate), staging (passed, waiting), production (promoted), archived
            (no longer served).
        added, promoted: when it was registered, and first promoted ("" if never); UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    variant: str
    digest: str
    adapter: str
    card: str
    rank: int
    targets: list[str]
    lineage: dict[str, str]
    measured: Measured
    verdict: Verdict
    stage: Stage = "candidate"
    added: str = ""
    promoted: str = ""

    @property
    def name(self) -> str:
        return f"{self.variant}@{self.digest[:SHORT]}"

    @property
    def mixture(self) -> str:
        return self.variant.rpartition("/")[0]


class Move(BaseModel):
    """An alias goes from one version's name to another's (None: nobody)."""

    model_config = ConfigDict(frozen=True)

    old: str | None
    new: str | None


class Deployment(BaseModel):
    """Where and when which versions were brought to answer."""

    model_config = ConfigDict(frozen=True)

    service: str  # NAMESPACE/NAME
    url: str
    versions: list[str]


class Event(BaseModel):
    """One decision, and what its writer had seen when deciding.

    `seq` is one more than the highest its writer had seen; `parents` are the events nobody had built on then.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    seq: int
    parents: list[str]
    time: str
    by: str
    kind: Literal["add", "promote", "rollback", "archive", "restore", "deploy", "confirm"]
    add: list[Version] = []
    versions: list[str] = []
    moves: dict[str, Move] = {}
    deployment: Deployment | None = None


class Entry(BaseModel):
    """An event in its place in the order; `void` says why it has no effect."""

    name: str
    event: Event
    void: str | None = None


@dataclass(frozen=True)
class State:
    """What all events add up to.

    Attributes:
        versions: by name, oldest first, archived ones included.
        aliases: name to version name: `champion`, `previous`, and for each mixture `champion:hep-th` and
            `previous:hep-th`.
        history: all events in order, void ones included.
        marker: changes when, and only when, there are new events.
    """

    versions: dict[str, Version]
    aliases: dict[str, str]
    history: list[Entry]
    marker: str
    seq: int = 0
    heads: list[str] = field(default_factory=list)

    @property
    def served(self) -> list[Version]:
        """The versions an endpoint offers: all that are not archived, oldest first."""
        return [v for v in self.versions.values() if v.stage != "archived"]

    @property
    def deployments(self) -> list[Deployment]:
        """Deployments, oldest first."""
        return [e.event.deployment for e in self.history if e.event.deployment is not None]

    def resolve(self, name: str) -> Version:
        """The served version that `name` means now.

        Args:
            name: an alias (`champion`, `previous:hep-th`), a variant or its slug (its newest version in
                production, else its newest), or VARIANT@DIGEST with at least four digits of the digest.

        Raises:
            UserError: nothing served has that name, or more than one version has.
        """
        if name in self.aliases:
            return self.versions[self.aliases[name]]
        variant, _, prefix = name.partition("@")
        found = [v for v in self.served if variant in (v.variant, slug(v.variant))]
        if "@" in name:
            found = [v for v in found if len(prefix) >= 4 and v.digest.startswith(prefix)]
            if len(found) > 1:
                raise UserError(f"{name} means {len(found)} versions: give more digits of the digest.")
        if not found:
            known = [*self.aliases, *dict.fromkeys(v.variant for v in self.served)]
            raise UserError(f"{name!r} is not in the registry; it has: {', '.join(known) or 'nothing yet'}.")
        return ([v for v in found if v.stage == "production"] or found)[-1]


class Registry:
    """A registry in a store. Every method reads the store anew; many may write at once."""

    def __init__(self, store: Store):
        self.store = store
        self._events: dict[str, Event] = {}

    @classmethod
    def open(cls, uri: str) -> "Registry":
        """The registry at `uri` (`s3://bucket/prefix`, `file:///folder` or a path); empty where nothing is."""
        return cls(open_store(uri))

    def marker(self) -> str:
        """Something that changes when the registry does, for one listing: equal to `snapshot().marker`."""
        return sha256_json(self._listed())

    def snapshot(self) -> State:
        """The state now. Events once read are kept, so a later call reads only what is new."""
        names = self._listed()
        self._read(names)
        while missing := {p for n in self._events for p in self._events[n].parents} - self._events.keys():
            self._read(sorted(missing))  # a listing over several pages can miss an event and show its successor
        return fold(self._events, sha256_json(names))

    def versions(self) -> list[Version]:
        """All versions, archived ones included, oldest first."""
        return list(self.snapshot().versions.values())

    def aliases(self) -> dict[str, str]:
        """Alias to version name."""
        return self.snapshot().aliases

    def history(self) -> list[Entry]:
        """What was decided, oldest first, void decisions included."""
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
            there = seen.versions.get(version.name)
            if there is None or (there.card, there.verdict) != (version.card, version.verdict):
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
            Stale: another writer moved the alias in between.
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
            Stale: one of the aliases is no longer where it was in `seen`.
        """
        for version in versions:
            if not version.verdict.passed:
                raise UserError(f"{version.name} did not pass the gate: {'; '.join(version.verdict.reasons)}.")
        moves = {a: Move(old=seen.aliases.get(a), new=v.name) for a, v in aliases.items()}
        return self._decide(seen, "promote", versions=[v.name for v in versions], moves=moves)

    def rollback(self, alias: str = CHAMPION) -> Version:
        """Take back the version that `alias` names: it goes to staging and loses every alias it holds.

        Each alias goes to the version that held it before, so a second rollback goes one further back. A
        mixture whose champion had none before is left without one.

        Returns:
            The version that `alias` names now.

        Raises:
            UserError: nobody holds `alias`, or nobody did before.
            Stale: another writer decided in between.
        """
        seen = self.snapshot()
        if alias not in seen.aliases:
            raise UserError(f"Nothing to roll back: no version is {alias!r}.")
        bad = seen.aliases[alias]
        held = [a for a, v in seen.aliases.items() if v == bad and a.startswith(CHAMPION)]
        moves = {a: Move(old=bad, new=seen.aliases.get(a.replace(CHAMPION, PREVIOUS))) for a in held}
        for a in (CHAMPION, alias):
            if a in moves and moves[a].new is None:
                raise UserError(f"{bad} cannot be rolled back: no version was {a!r} before it.")
        after = self._decide(seen, "rollback", versions=[bad], moves=moves)
        return after.versions[after.aliases[alias]]

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
        found = [v for v in seen.versions.values() if v.stage == "archived" and v.name.startswith(name)]
        if len(found) != 1:
            raise UserError(f"{name!r} names {len(found)} archived versions: give VARIANT@DIGEST of one.")
        return self._decide(seen, "restore", versions=[found[0].name]).versions[found[0].name]

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

    def _read(self, names: list[str]) -> None:
        new = [n for n in names if n not in self._events]
        if new:
            with ThreadPoolExecutor(min(16, len(new))) as pool:
                self._events.update(zip(new, pool.map(self._event, new), strict=True))

    def _event(self, name: str) -> Event:
        where = f"{self.store.uri}/events/{name}.json"
        try:
            raw = self.store.get(f"events/{name}.json")
        except Missing as e:
            raise StoreError(f"{where} was deleted, though later events build on it: restore it.") from e
        if hashlib.sha256(raw).hexdigest() != name.rpartition("-")[2]:
            raise StoreError(f"{where} was changed after it was written (sha256): restore it.")
        try:
            return Event.model_validate_json(raw)
        except ValidationError as e:
            raise StoreError(f"{where} was written by another version of feyntune: use that or a newer one.") from e

    def _decide(self, seen: State, kind: str, **fields: Any) -> State:
        """Write an event decided on `seen`; returns the state it led to.

        Raises:
            Stale: the event is void, since another writer was first.
        """
        began = time.monotonic()
        name = self._put(seen, kind, **fields)
        if kind in _VOIDABLE:
            time.sleep(max(SETTLE, 4 * (time.monotonic() - began)))
        after = self.snapshot()
        # Until it is built on, an event of the same `seq` that is still on its way could come before it.
        for _ in range(CONFIRMATIONS if kind in _VOIDABLE else 0):
            self._put(after, "confirm")
            after = self.snapshot()
        void = next(e.void for e in reversed(after.history) if e.name == name)
        if void is not None:
            raise Stale(f"Nothing was changed: {void}. Look again and repeat it.")
        return after

    def _put(self, seen: State, kind: str, **fields: Any) -> str:
        event = Event.model_validate(
            {
                "format": 1,
                "seq": seen.seq + 1,
                "parents": seen.heads,
                "time": datetime.now(UTC).isoformat(),
                "by": f"{_user()}@{socket.gethostname()}:{os.getpid()}",
                "kind": kind,
                **fields,
            }
        )
        raw = event.model_dump_json(exclude_defaults=True).encode()
        name = f"{event.seq:010d}-{hashlib.sha256(raw).hexdigest()}"
        self.store.put(f"events/{name}.json", raw)
        self._events[name] = event
        return name


def fold(events: dict[str, Event], marker: str = "") -> State:
    """The state that `events` add up to: the same for everybody who has read the same events.

    They take effect in the order of `ordered`. A decision whose grounds no longer hold is void: a promotion or
    rollback of an alias that is not where its writer saw it, a promotion of a version that failed the gate or
    is archived, an archiving of a champion.
    """
    versions: dict[str, Version] = {}
    stacks: dict[str, list[str]] = {}  # alias -> versions that held it, the holder last
    history = []
    for name in ordered(events):
        event = events[name]
        void = _void(event, versions, stacks)
        history.append(Entry(name=name, event=event, void=void))
        if void is None:
            _apply(event, versions, stacks)
    aliases = {}
    for alias in sorted(stacks):
        if stacks[alias]:
            aliases[alias] = stacks[alias][-1]
            before = _before(stacks[alias], versions)
            if before is not None:
                aliases[alias.replace(CHAMPION, PREVIOUS)] = before
    return State(
        versions=versions,
        aliases=aliases,
        history=history,
        marker=marker,
        seq=max((e.seq for e in events.values()), default=0),
        heads=sorted(events.keys() - {p for e in events.values() for p in e.parents}),
    )


def ordered(events: dict[str, Event]) -> list[str]:
    """Names of `events`, each after all it had seen; among unconnected ones the higher `seq` goes first, then
    the smaller name.

    So an event that arrives late (decided long ago, `seq` behind the others) takes its place after everything
    decided meanwhile and can undo none of it.
    """
    order: dict[str, None] = {}
    first = lambda names: sorted(names, key=lambda n: (-events[n].seq, n), reverse=True)  # taken from the end
    waiting = first(events)
    while waiting:
        name = waiting.pop()
        unseen = [p for p in events[name].parents if p not in order]
        if unseen and name not in order:
            waiting += [name, *first(unseen)]
        else:
            order[name] = None
    return list(order)


def diff(a: Version, b: Version) -> dict[str, tuple[Any, Any]]:
    """The fields in which two versions differ, as `lineage.corpus: (value of a, value of b)`."""
    left, right = _flat(a.model_dump()), _flat(b.model_dump())
    return {k: (left.get(k), right.get(k)) for k in left | right if left.get(k) != right.get(k)}


def _void(event: Event, versions: dict[str, Version], stacks: dict[str, list[str]]) -> str | None:
    """Why `event` has no effect, or None."""
    for name in event.versions:
        if name not in versions:
            return f"{name} is not registered"
        version = versions[name]
        if event.kind == "promote" and version.stage == "archived":
            return f"{name} is archived"
        if event.kind == "promote" and not version.verdict.passed:
            return f"{name} did not pass the gate"
        held = [alias for alias, stack in stacks.items() if stack[-1:] == [name]]
        if event.kind == "archive" and held:
            return f"{name} is {held[0]}"
        if event.kind == "rollback" and not event.moves.keys() >= set(held):
            return f"{name} had become {' and '.join(sorted(set(held) - event.moves.keys()))} by then"
    for alias, move in event.moves.items():
        stack = stacks.get(alias, [])
        holder = stack[-1] if stack else None
        if holder != move.old:
            return f"{alias} was {holder or 'nobody'} by then, not {move.old or 'nobody'}"
        if event.kind == "promote" and move.new not in event.versions:
            return f"{alias} would go to a version that is not promoted"
        if event.kind == "rollback" and move.new != _before(stack, versions):
            return f"the version before {holder} was no longer {move.new or 'nobody'}"
    return None


def _apply(event: Event, versions: dict[str, Version], stacks: dict[str, list[str]]) -> None:
    def update(name: str, **fields: Any) -> None:
        versions[name] = versions[name].model_copy(update=fields)

    for new in event.add:
        there = versions.get(new.name)
        keep = {"stage": "candidate", "added": event.time, "promoted": ""}
        if there:
            keep = {"stage": there.stage, "added": there.added, "promoted": there.promoted}
        versions[new.name] = new.model_copy(update=keep)
        if versions[new.name].stage in ("candidate", "staging"):
            update(new.name, stage="staging" if new.verdict.passed else "candidate")
    for name in event.versions:
        version = versions[name]
        if event.kind == "promote":
            update(name, stage="production", promoted=version.promoted or event.time)
        elif event.kind == "archive":
            update(name, stage="archived")
        elif event.kind == "rollback" or (event.kind == "restore" and version.stage == "archived"):
            update(name, stage="staging" if version.verdict.passed else "candidate")
    for alias, move in event.moves.items():
        stack = stacks.setdefault(alias, [])
        if event.kind == "promote" and move.new is not None:
            stack.append(move.new)
        elif event.kind == "rollback":
            while stack and stack[-1] != move.new:
                stack.pop()
            if move.new is not None:
                update(move.new, stage="production")


def _before(stack: list[str], versions: dict[str, Version]) -> str | None:
    """Who held an alias before its holder: the last one that is another version and not archived."""
    for name in reversed(stack[:-1]):
        if name != stack[-1] and versions[name].stage != "archived":
            return name
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a pod's numeric user has no name
        return str(os.getuid())
