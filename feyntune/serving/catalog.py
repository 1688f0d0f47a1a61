"""Which adapters answer to which names now, following the registry while requests run.

A version is fetched, checked and loaded before any name means it; until then, and for good where it is refused,
the name keeps its meaning. A version that no name means any longer is unloaded once its last request
has ended.
"""

import asyncio
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from feyntune.artifacts.artifact import Manifest
from feyntune.artifacts.store import StoreError
from feyntune.engine.api import (
    Engine,
    EngineDeadError,
    EngineError,
    EngineUnavailableError,
    InvalidAdapterError,
    NoFreeSlotError,
)
from feyntune.errors import UserError
from feyntune.names import BASE, slug
from feyntune.serving import metrics
from feyntune.serving.canary import Canary
from feyntune.serving.source import AdapterSource, RegistrySnapshot, ServedVersion
from feyntune.telemetry import log

RETRY_SECONDS = 60.0  # a refused version is looked at again: its files may have been restored
_RUNS_CODE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py")


@dataclass(frozen=True)
class Target:
    """What a request runs on: the label of its metrics, and the version (None: the base)."""

    label: str
    version: ServedVersion | None = None
    arm: str | None = None  # "champion" or "canary" while there is a canary

    @property
    def key(self) -> str | None:
        """What the engine knows the adapter by."""
        return self.version.digest if self.version else None


class Catalog:
    """The names a client may use. `refresh` is called now and then; the rest reads what it left."""

    def __init__(self, source: AdapterSource, engine: Engine, base_digest: str, canary: Canary | None = None):
        self.source, self.engine, self.base_digest = source, engine, base_digest
        self.canary = canary or Canary(0)
        self.names: dict[str, ServedVersion] = {}
        self.aliases: frozenset[str] = frozenset()
        self.refused: dict[str, str] = {}  # version name -> why
        self.error: str | None = None  # why the registry could not be read last time
        self.read = 0.0  # when it was, time.time()
        self.settled = False  # whether the champion and the aliases of a first reading answer; true from then on
        self._loaded: dict[str, ServedVersion] = {}  # digest -> version, in the engine
        self._revision: str | None = None
        self._quarantined: dict[str, str] = {}  # digest -> why; until the process ends
        self._invalid: dict[str, str] = {}  # digest -> why; files that match their manifest will not change
        self._unserved: dict[str, ServedVersion] = {}  # name -> the version it should mean, which is not served
        self._retrying = False  # whether a version that an alias means was not served for a passing reason
        self._again = 0.0  # when to try what was refused once more, monotonic

    def resolve(self, model: str) -> Target | None:
        """What `model` means: a variant, its slug, VARIANT@DIGEST, an alias, or the base."""
        name = slug(model)
        if name == BASE:
            return Target(BASE)
        version = self.names.get(name)
        if version is None:
            version = next((v for v in self._loaded.values() if slug(v.name) == name), None)
        if version is None:
            return None
        if name == "champion" and self.canary.candidate is not None:
            arm, version = self.canary.route(version)
            return Target(slug(version.variant), version, arm)
        return Target(slug(version.variant), version)

    @property
    def missing(self) -> dict[str, str]:
        """Registered names that answer nothing, and the version each should mean."""
        return {name: v.name for name, v in self._unserved.items() if name not in self.names}

    def why_not(self, model: str) -> str | None:
        """Why the version that a registered name means is not served; None where there is no such name."""
        version = self._unserved.get(slug(model))
        return None if version is None else self.refused.get(version.name)

    def quarantine(self, version: ServedVersion, reason: str) -> None:
        """Serve a version no more: it gave numbers that are not finite."""
        if version.digest in self._quarantined:
            return
        log.error("adapter %s is quarantined: %s", version.name, reason)
        self._quarantined[version.digest] = reason
        names = {name: v for name, v in self.names.items() if v != version}
        refused = self.refused | {version.name: f"quarantined: {reason}"}
        self._unserved |= {name: v for name, v in self.names.items() if v == version}
        self._publish_metrics(names, refused)
        self.names, self.refused = names, refused
        self._publish_missing()
        if self.canary.candidate == version:
            self.canary.set_candidate(None)
        if version.digest in self._loaded:
            del self._loaded[version.digest]
            self.engine.unload_adapter(version.digest)
        metrics.LOADS.labels(slug(version.variant), "quarantined").inc()

    async def refresh(self) -> None:
        """Bring names and loaded adapters in line with the registry; never raises for what is wrong there."""
        try:
            if await self._unchanged():
                return
            snapshot = await asyncio.to_thread(self.source.snapshot)
        except Exception as e:
            self.error = str(e)
            metrics.REGISTRY_ERRORS.inc()
            log.warning("registry: %s (serving what is loaded)", e)
            return
        await self._follow(snapshot)
        self._was_read()
        # A pod that replaces another must know the champion, and try again where the store hiccuped.
        self.settled = self.settled or not ("champion" in self.missing or self._retrying)

    async def _unchanged(self) -> bool:
        """Whether the registry is as it was and there is nothing to try again; one listing."""
        revision = await asyncio.to_thread(self.source.revision)
        if revision != self._revision or (self.refused and time.monotonic() >= self._again):
            return False
        self._was_read()
        return True

    def _was_read(self) -> None:
        """Only now: an endpoint is ready once it has read the registry and loaded what is in it."""
        self.error, self.read = None, time.time()
        metrics.REGISTRY_READ.set(self.read)

    async def _follow(self, snapshot: RegistrySnapshot) -> None:
        order = sorted(
            snapshot.names, key=lambda n: (n != "champion", n != "previous", n not in snapshot.aliases)
        )  # the champion gets a slot whatever else is registered
        targets = {name: snapshot.names[name] for name in order}
        candidate = snapshot.staging if self.canary.share > 0 else None
        versions = {v.digest: v for v in [*targets.values(), *([candidate] if candidate else [])]}
        self._again = time.monotonic() + RETRY_SECONDS
        refused: dict[str, str] = {}
        transient = crowded = self._retrying = False
        aliased = {targets[name].digest for name in snapshot.aliases}
        freed = self._unload_all_but(versions.keys() | {v.digest for v in self.names.values()})
        for version in versions.values():
            if version.digest in self._loaded:
                continue
            if version.digest in self._quarantined:
                refused[version.name] = f"quarantined: {self._quarantined[version.digest]}"
                continue
            if version.digest in self._invalid:
                refused[version.name] = self._invalid[version.digest]
                continue
            try:
                await self._load(version)
                # What it replaces makes room for the next at once: not all old and all new fit beside each other.
                names = self._moved(targets)
                self._publish_metrics(names, self.refused)
                self.names = names
                freed += self._unload_all_but(versions.keys() | {v.digest for v in self.names.values()})
            except EngineDeadError:
                raise
            except Exception as e:  # whatever is wrong with one adapter, the others are served
                expected = isinstance(e, EngineError | UserError | OSError)
                reason = str(e) if expected else f"{type(e).__name__}: {str(e)[:300]}"
                refused[version.name] = reason
                passing = isinstance(e, StoreError | OSError | EngineUnavailableError)
                transient |= passing
                self._retrying |= passing and version.digest in aliased
                crowded |= isinstance(e, NoFreeSlotError)
                if isinstance(e, InvalidAdapterError) and not isinstance(e, NoFreeSlotError):
                    self._invalid[version.digest] = reason
                if self.refused.get(version.name) != reason:
                    log.error("adapter %s is refused: %s", version.name, reason)
                metrics.LOADS.labels(slug(version.variant), "refused").inc()

        moved = self._moved(targets)
        names = {name: moved[name] for name in targets if name in moved}  # without what is no longer offered
        self._unserved = {name: v for name, v in targets.items() if v.digest not in self._loaded}
        self._publish_metrics(names, refused)
        self.names, self.aliases, self.refused = names, snapshot.aliases, refused
        self._publish_missing()
        self.canary.set_candidate(candidate if candidate and candidate.digest in self._loaded else None)
        current = {v.digest for v in names.values()} | ({candidate.digest} if candidate else set())
        freed += self._unload_all_but(current)
        self._revision = None if transient or (crowded and freed) else snapshot.revision

    def _moved(self, targets: dict[str, ServedVersion]) -> dict[str, ServedVersion]:
        """Every name at the version it should mean where that is loaded; else the old one stays."""
        return self.names | {name: version for name, version in targets.items() if version.digest in self._loaded}

    async def _load(self, version: ServedVersion) -> None:
        started = time.monotonic()
        self._check(await asyncio.to_thread(self.source.manifest, version))
        folder = Path(tempfile.mkdtemp(prefix="feyntune-adapter-"))
        try:
            self._check(await asyncio.to_thread(self.source.fetch, version, folder / "adapter"))
            await self.engine.load_adapter(version.digest, folder / "adapter")
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._loaded[version.digest] = version
        metrics.LOADS.labels(slug(version.variant), "loaded").inc()
        metrics.LOAD_SECONDS.observe(time.monotonic() - started)
        log.info("adapter %s is loaded (%.2f s)", version.name, time.monotonic() - started)

    def _check(self, manifest: Manifest) -> None:
        """Refuse what need not be copied to be refused: an adapter of another base would be copied by every replica,
        and one of any size would fill its disk."""
        base = manifest.inputs.get("base")
        if base != self.base_digest:
            raise InvalidAdapterError(
                f"it was trained on base {str(base)[:16]}, this endpoint serves base {self.base_digest[:16]}"
            )
        foreign = [name for name in manifest.files if name.endswith(_RUNS_CODE)]
        if foreign:
            raise InvalidAdapterError(f"it holds {foreign[0]}: only safetensors and JSON are read")
        size = sum(file.size for file in manifest.files.values())
        if size > self.engine.adapter_bytes:
            raise InvalidAdapterError(
                f"its files have {size} bytes, an adapter that can be served at most {self.engine.adapter_bytes}"
            )

    def _unload_all_but(self, digests: set[str]) -> int:
        """Returns how many were unloaded; a slot is free once the requests it still answers have ended."""
        gone = self._loaded.keys() - digests
        for digest in gone:
            self.engine.unload_adapter(digest)
            log.info("adapter %s is unloaded", self._loaded.pop(digest).name)
        return len(gone)

    def _publish_missing(self) -> None:
        metrics.MISSING.clear()
        for name in self.missing:
            metrics.MISSING.labels(name).set(1)

    def _publish_metrics(self, names: dict[str, ServedVersion], refused: dict[str, str]) -> None:
        for name, old in self.names.items():
            if names.get(name) != old:
                metrics.SERVED.remove(name, old.name)
        for name, version in names.items():
            metrics.SERVED.labels(name, version.name).set(1)
        for version_name in self.refused.keys() - refused.keys():
            metrics.REFUSED.remove(version_name)
        for version_name in refused:
            metrics.REFUSED.labels(version_name).set(1)
