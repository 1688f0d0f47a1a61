"""Where the adapters to serve come from: the registry, and nothing else of the project's other rooms.

A source says which versions there are and which names mean which of them, and fetches one.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from feyntune.artifacts.artifact import Manifest
from feyntune.artifacts.store import pull
from feyntune.names import slug
from feyntune.registry.models import Version
from feyntune.registry.registry import Registry


@dataclass(frozen=True)
class Offered:
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
class Offer:
    """All there is to serve at one moment.

    Args:
        marker: equal markers mean equal offers.
        names: model name (a slug or an alias) to version; several names may mean one version.
        aliases: which of the names are aliases.
        staging: the newest version that passed the gate and waits for promotion, if there is one.
    """

    marker: str
    names: dict[str, Offered]
    aliases: frozenset[str] = frozenset()
    staging: Offered | None = None


class Source(Protocol):
    """All methods block; they are called in a thread."""

    def marker(self) -> str: ...
    def offer(self) -> Offer: ...
    def fetch(self, version: Offered, folder: Path) -> Manifest: ...
    def card(self, version: Offered) -> str: ...


class RegistrySource:
    """The registry at a store's address."""

    def __init__(self, uri: str):
        self.registry = Registry.open(uri)
        self._versions: dict[str, Version] = {}

    def marker(self) -> str:
        return self.registry.revision()

    def offer(self) -> Offer:
        """Each variant under its slug (its newest version in production, else its newest), and every alias."""
        state = self.registry.snapshot()
        self._versions = dict(state.versions)
        names = {slug(v.variant): _offered(state.resolve(v.variant)) for v in state.served}
        aliases = {slug(a): _offered(state.versions[name]) for a, name in state.aliases.items()}
        staging = [v for v in state.served if v.stage == "staging" and not v.promoted]  # else it was rolled back
        return Offer(
            marker=state.revision,
            names=names | aliases,
            aliases=frozenset(aliases),
            staging=_offered(staging[-1]) if staging else None,
        )

    def fetch(self, version: Offered, folder: Path) -> Manifest:
        """Copy a version to `folder`, every file checked against its manifest.

        Raises:
            UserError: the store does not answer, or what it holds is damaged.
        """
        return self.registry.fetch(self._versions[version.name], folder)

    def card(self, version: Offered) -> str:
        """The model card of a version, Markdown, checked against its manifest.

        Raises:
            UserError: the store does not answer, or what it holds is damaged.
        """
        with tempfile.TemporaryDirectory(prefix="feyntune-card-") as tmp:
            pull(self.registry.store, self._versions[version.name].card, Path(tmp) / "card", kind="card")
            return (Path(tmp) / "card" / "README.md").read_text()


def _offered(version: Version) -> Offered:
    stats = version.model_dump(mode="json", include={"lineage", "stage", "rank", "targets", "added", "measured"})
    return Offered(version.name, version.variant, version.digest, stats)
