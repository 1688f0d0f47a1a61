"""What the registry stores and what its events add up to: versions, events, state."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.registry.gate import GateResult, Measured

CHAMPION = "champion"
PREVIOUS = "previous"
SHORT = 16  # hex digits of a digest in names

KINDS = ("add", "promote", "rollback", "archive", "restore", "deploy", "confirm")

Stage = Literal["candidate", "staging", "production", "archived"]


class ConflictError(UserError):
    """A decision was rejected: another writer had decided in between. Read the registry again and retry."""


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
    gate: GateResult = Field(validation_alias=AliasChoices("gate", "verdict"))  # "verdict" before 0.2
    stage: Stage = "candidate"
    added: str = ""
    promoted: str = ""
    examples: list[str] = []  # prompts from the test abstracts it was measured on, for the workbench

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

    `seq` is one more than the highest its writer had seen; `parents` are the events nobody had built on then. `kind`
    is one of KINDS, or one of a newer version, which has no effect here. `digest`, of the event without it, is there
    where the event's name does not hold one.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1]
    seq: int
    parents: list[str]
    time: str
    by: str
    kind: str
    add: list[Version] = []
    versions: list[str] = []
    moves: dict[str, Move] = {}
    deployment: Deployment | None = None
    digest: str = ""


class Entry(BaseModel):
    """An event in its place in the order; `rejected` is why it has no effect."""

    name: str
    event: Event
    rejected: str | None = None


@dataclass(frozen=True)
class State:
    """What all events add up to.

    Attributes:
        versions: by name, oldest first, archived ones included.
        aliases: name to version name: `champion`, `previous`, and for each mixture `champion:hep-th` and
            `previous:hep-th`.
        history: all events in order, rejected ones included.
        revision: changes when, and only when, there are new events.
    """

    versions: dict[str, Version]
    aliases: dict[str, str]
    history: list[Entry]
    revision: str
    seq: int = 0
    heads: list[str] = field(default_factory=list)

    @property
    def served(self) -> list[Version]:
        """The versions an endpoint offers: all that are not archived, oldest first."""
        return [v for v in self.versions.values() if v.stage != "archived"]

    @property
    def failing(self) -> dict[str, str]:
        """Aliases whose version failed the gate when it was measured again, with the reasons."""
        return {
            alias: "; ".join(self.versions[name].gate.reasons)
            for alias, name in self.aliases.items()
            if not self.versions[name].gate.passed
        }

    @property
    def deployments(self) -> list[Deployment]:
        """Deployments, oldest first."""
        return [e.event.deployment for e in self.history if e.event.deployment is not None]

    def resolve(self, name: str) -> Version:
        """The served version that `name` means now.

        Args:
            name: an alias (`champion`, `previous:hep-th`), a variant or its slug (the version that is a champion,
                else its newest in production, else its newest), or VARIANT@DIGEST with at least four digits of
                the digest.

        Raises:
            UserError: nothing served has that name, or more than one version has.
        """
        if name in self.aliases:
            return self.versions[self.aliases[name]]
        variant, _, prefix = name.partition("@")
        matches = [v for v in self.served if variant in (v.variant, slug(v.variant))]
        if "@" in name:
            matches = [v for v in matches if len(prefix) >= 4 and v.digest.startswith(prefix)]
            if len(matches) > 1:
                raise UserError(f"{name} means {len(matches)} versions: give more digits of the digest.")
        if not matches:
            known = [*self.aliases, *dict.fromkeys(v.variant for v in self.served)]
            raise UserError(f"{name!r} is not in the registry; it has: {', '.join(known) or 'nothing yet'}.")
        champions = [n for a, n in self.aliases.items() if a.startswith(CHAMPION)]
        holders = [v for v in matches if v.name in champions]
        return (holders or [v for v in matches if v.stage == "production"] or matches)[-1]
