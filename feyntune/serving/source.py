"""Where the adapters to serve come from: the registry.

The one exception to the rule that steps do not import each other: an endpoint follows the registry while it
runs, so it reads it through the registry's own class. Nothing else in this package imports `feyntune.registry`.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from feyntune.artifacts.artifact import Manifest
from feyntune.artifacts.names import StoreError
from feyntune.artifacts.store import pull, stored_manifest
from feyntune.names import slug
from feyntune.registry.models import Version
from feyntune.registry.registry import Registry


@dataclass(frozen=True)
class ServedVersion:
    """A version that may be served.

    Args:
        name: `VARIANT@DIGEST` (16 digits), as the registry says it.
        stats: what a client may want to know of it: lineage, stage, figures.
    """

    name: str
    variant: str
    digest: str
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RegistrySnapshot:
    """All there is to serve at one moment.

    Args:
        revision: equal revisions mean equal snapshots.
        names: model name (a slug or an alias) to version; several names may mean one version.
        aliases: which of the names are aliases.
        staging: the newest version that passed the gate and waits for promotion, if there is one.
    """

    revision: str
    names: dict[str, ServedVersion]
    aliases: frozenset[str] = frozenset()
    staging: ServedVersion | None = None


class AdapterSource(Protocol):
    """All methods block; they are called in a thread."""

    def revision(self) -> str: ...
    def snapshot(self) -> RegistrySnapshot: ...
    def manifest(self, version: ServedVersion) -> Manifest: ...
    def fetch(self, version: ServedVersion, folder: Path) -> Manifest: ...
    def card(self, version: ServedVersion) -> str: ...


class RegistrySource:
    """The registry at a store's address."""

    def __init__(self, uri: str):
        self.registry = Registry.open(uri)
        self._versions: dict[str, Version] = {}

    def revision(self) -> str:
        return self.registry.revision()

    def snapshot(self) -> RegistrySnapshot:
        """Each variant under its slug (its newest version in production, else its newest), and every alias."""
        state = self.registry.snapshot()
        self._versions = dict(state.versions)
        names = {slug(v.variant): _served_version(state.resolve(v.variant)) for v in state.served}
        aliases = {slug(a): _served_version(state.versions[name]) for a, name in state.aliases.items()}
        staging = [v for v in state.served if v.stage == "staging" and not v.promoted]  # else it was rolled back
        return RegistrySnapshot(
            revision=state.revision,
            names=names | aliases,
            aliases=frozenset(aliases),
            staging=_served_version(staging[-1]) if staging else None,
        )

    def manifest(self, version: ServedVersion) -> Manifest:
        """What a version consists of, before any of it is copied.

        Raises:
            UserError: the store does not answer, or nothing is there.
        """
        where = self._versions[version.name].adapter
        manifest = stored_manifest(self.registry.store, where)
        if manifest is None:
            raise StoreError(f"{self.registry.store.uri}/{where} is missing: restore it.")
        return manifest

    def fetch(self, version: ServedVersion, folder: Path) -> Manifest:
        """Copy a version to `folder`, every file checked against its manifest.

        Raises:
            UserError: the store does not answer, or what it holds is damaged.
        """
        return self.registry.fetch(self._versions[version.name], folder)

    def card(self, version: ServedVersion) -> str:
        """The model card of a version, Markdown, checked against its manifest.

        Raises:
            UserError: the store does not answer, or what it holds is damaged.
        """
        with tempfile.TemporaryDirectory(prefix="feyntune-card-") as tmp:
            pull(self.registry.store, self._versions[version.name].card, Path(tmp) / "card", kind="card")
            return (Path(tmp) / "card" / "README.md").read_text(encoding="utf-8")


def _served_version(version: Version) -> ServedVersion:
    stats = version.model_dump(
        mode="json", include={"lineage", "stage", "rank", "targets", "added", "measured", "examples"}
    )
    return ServedVersion(version.name, version.variant, version.digest, stats)
