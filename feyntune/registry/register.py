"""Measured adapters into the registry: check, write the card, ask the gate, promote the best."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from feyntune.artifacts.artifact import Manifest, open_artifact, read_manifest, write_artifact
from feyntune.conditions import Conditions
from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.registry.card import model_card
from feyntune.registry.gate import (
    Clause,
    Interval,
    Measured,
    Perplexity,
    Policy,
    check_gate,
    compare_to_champion,
    read_policy,
)
from feyntune.registry.models import CHAMPION, SHORT, ConflictError, State, Version
from feyntune.registry.registry import Registry
from feyntune.telemetry import log

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALLOWED = (".safetensors", ".json", ".md")  # nothing that runs when it is loaded


class Registered(BaseModel):
    """What became of one variant.

    Attributes:
        version: VARIANT@DIGEST, or None where the adapter was refused.
        stage: of the version after this registration, or "refused".
        promoted: it passed the gate and stands in production, where its name and perhaps an alias serve it.
        champion: the overall `champion` is this version.
        reasons: why it was refused, was not promoted, or is not the champion.
    """

    version: str | None
    stage: Literal["candidate", "staging", "production", "archived", "refused"]
    promoted: bool
    champion: bool
    reasons: list[str]


class Registration(BaseModel):
    """What one call of `register` led to.

    Attributes:
        champion: the champion's variant (`hep-th/lora-qkv`), or None while no version has passed a gate.
        champion_version, previous: VARIANT@DIGEST of the champion and of the one before it.
    """

    variants: dict[str, Registered]
    champion: str | None
    champion_version: str | None
    previous: str | None


def register(
    comparison: str | Path,
    adapters: Mapping[str, str | Path],
    registry: str,
    policy: str | Path | None = None,
    promote: bool = True,
) -> Registration:
    """Add every variant that was compared; promote those that pass the gate, the best of them to champion.

    An adapter that is damaged, holds anything but LoRA weights in safetensors, or was trained on another base is
    refused by name and the others are registered. Registering the same again adds nothing, and what a person
    rolled back stays so: a version is promoted by this function once in its life.

    Args:
        comparison: a sealed `comparison`.
        adapters: sealed `adapter` folders by variant; those that are not in the comparison are refused.
        registry: address of the registry.
        policy: a gate.yaml (see gate.py); None for the default policy.
        promote: False leaves what passes the gate in staging.

    Raises:
        UserError: the comparison or the policy cannot be used, or an adapter of the comparison is not given.
        ArtifactError: the comparison is damaged.
    """
    rules = read_policy(policy)
    digest = open_artifact(comparison, "comparison").digest
    summary = _read_summary(Path(comparison) / "summary.json")
    missing = sorted(summary.variants.keys() - adapters.keys())
    if missing:
        raise UserError(f"{comparison} measured {missing[0]}, whose adapter was not given: add {missing[0]}=FOLDER.")
    unknown = sorted(adapters.keys() - summary.variants.keys() - {f.variant for f in summary.failures})
    if unknown:
        raise UserError(f"{unknown[0]} is not in {comparison}: evaluate it first, or leave it out.")

    target = Registry.open(registry)
    refused: dict[str, Registered] = {}
    accepted: dict[str, tuple[Version, Path, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="feyntune-cards-") as tmp:
        for name in sorted(summary.variants):
            card = Path(tmp) / slug(name)
            try:
                version = _version(name, Path(adapters[name]), summary, digest, rules, card)
                accepted[name] = (version, Path(adapters[name]), card)
            except UserError as e:
                log.error("%s is refused: %s", name, e)
                refused[name] = Registered(
                    version=None, stage="refused", promoted=False, champion=False, reasons=[str(e)]
                )
        names = [v.name for v in target.add(accepted.values())]
    state = _promote(target, names, rules) if promote else target.snapshot()
    for alias, why in state.failing.items():
        log.warning("%s (%s) failed the gate when measured again: %s", alias, state.aliases[alias], why)
    registered = {name: _registered(state, v.name, rules) for name, (v, _, _) in accepted.items()}
    champion = state.aliases.get(CHAMPION)
    return Registration(
        variants=dict(sorted({**registered, **refused}.items())),
        champion=state.versions[champion].variant if champion else None,
        champion_version=champion,
        previous=state.aliases.get("previous"),
    )


def checked_adapter(folder: str | Path) -> tuple[Manifest, dict[str, Any], int]:
    """An adapter fit for the registry: its manifest, its LoRA configuration and its rank.

    Raises:
        UserError: a file that is damaged, of a kind that can run code, or not a LoRA (named).
    """
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    manifest = open_artifact(folder, "adapter")
    for file in sorted(manifest.files):
        if Path(file).suffix not in ALLOWED:
            raise UserError(f"{folder / file} is refused: an adapter may hold only {', '.join(ALLOWED)} files.")
    for file in (WEIGHTS, CONFIG):
        if file not in manifest.files:
            raise UserError(f"{folder / file} is missing: an adapter holds {WEIGHTS} and {CONFIG}.")
    if not manifest.inputs.get("base"):
        raise UserError(f"{folder}: its manifest does not name its base: train it again.")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        kind, targets = config["peft_type"], config["target_modules"]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / CONFIG} is not a PEFT configuration ({e!r}).") from e
    if kind != "LORA" or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{folder / CONFIG} is a {kind} on {targets}: only LORA on named modules is registered.")
    ranks = set()
    try:
        with safe_open(folder / WEIGHTS, framework="np") as weights:
            for tensor in weights.keys():  # noqa: SIM118 (not a mapping)
                if ".lora_A." in tensor:
                    ranks.add(weights.get_slice(tensor).get_shape()[0])
                elif ".lora_B." not in tensor:
                    raise UserError(f"{folder / WEIGHTS} holds {tensor}, which is not a LoRA weight: it is refused.")
    except SafetensorError as e:
        raise UserError(f"{folder / WEIGHTS} is not a safetensors file ({e}): it is refused.") from e
    if ranks != {config.get("r")}:
        raise UserError(f"{folder / WEIGHTS} has rank {sorted(ranks)}, {CONFIG} says {config.get('r')}: it is refused.")
    return manifest, config, int(config["r"])


class _Digest(BaseModel):
    digest: str


class _Test(_Digest):
    abstracts: int


class _Base(_Digest):
    perplexity: Perplexity


class _Example(BaseModel):
    prompt: str


class _Completions(BaseModel):
    examples: list[_Example] = []


class _Failure(BaseModel):
    variant: str


class _Summary(BaseModel):
    """What this package reads of a comparison's summary.json; the rest goes into the card as it is."""

    model_config = ConfigDict(extra="allow")

    corpus: _Digest
    split: _Digest
    base: _Base
    test: _Test
    conditions: Conditions | None = None  # comparisons before 0.2 have none
    transfer: dict[str, Any] = {}
    retention: dict[str, Any] = {}
    as_served: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]]
    failures: list[_Failure] = []
    completions: _Completions = _Completions()


class _Variant(BaseModel):
    perplexity: Perplexity
    delta: Interval
    adapter_sha256: str
    memorization: float | None = Field(None, validation_alias=AliasChoices("memorization", "memorisation"))


def _read_summary(path: Path) -> _Summary:
    try:
        return _Summary.model_validate_json(path.read_bytes())
    except FileNotFoundError as e:
        raise UserError(f"{path} is missing: the folder is not a comparison of this version.") from e
    except ValidationError as e:
        raise UserError(f"{path}: {_first_error(e)}; run the comparison again.") from e


def _version(name: str, folder: Path, summary: _Summary, comparison: str, policy: Policy, card: Path) -> Version:
    """Check one adapter against its measurements and write its card folder."""
    manifest, lora, rank = checked_adapter(folder)
    try:
        variant = _Variant.model_validate(summary.variants[name])
        measured = Measured(
            test=summary.test.digest,
            base=summary.base.digest,
            abstracts=summary.test.abstracts,
            base_perplexity=summary.base.perplexity,
            perplexity=variant.perplexity,
            delta=variant.delta,
            conditions=summary.conditions,
            changes=_changes(summary, name),
            as_served=summary.as_served.get(name),
            memorization=variant.memorization,
        )
    except ValidationError as e:
        raise UserError(f"{name}: its measurements in summary.json cannot be used: {_first_error(e)}.") from e
    weights = manifest.files[WEIGHTS].sha256
    if variant.adapter_sha256 != weights:
        raise UserError(
            f"{folder / WEIGHTS} is {weights[:SHORT]}, the comparison measured {variant.adapter_sha256[:SHORT]}: "
            "give the adapter that was measured."
        )
    if manifest.inputs["base"] != measured.base:
        raise UserError(
            f"{folder} was trained on base {manifest.inputs['base'][:SHORT]}, the comparison measured on "
            f"{measured.base[:SHORT]}: an adapter can be served only with the base it was trained on."
        )
    lineage = {
        **manifest.inputs,
        "corpus": summary.corpus.digest,
        "evaluated on split": summary.split.digest,
        "test": measured.test,
        "adapter": manifest.digest,
        "weights": weights,
        "comparison": comparison,
    }
    lineage = {what: of for what, of in lineage.items() if of}
    gate = check_gate(measured, policy)
    with write_artifact(card, "card", inputs={"adapter": manifest.digest, "comparison": comparison}) as card_folder:
        training = {k: v for k, v in summary.variants[name].items() if k in ("train_tokens", "seconds")}
        text = model_card(name, manifest, lora, lineage, measured, gate, training)
        (card_folder.path / "README.md").write_text(text, encoding="utf-8")
        evaluation = {"measured": measured.model_dump(), "summary": summary.variants[name]}
        (card_folder.path / "evaluation.json").write_text(
            json.dumps(evaluation, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    place = f"{slug(name)}/{manifest.digest[:SHORT]}"
    return Version(
        variant=name,
        digest=manifest.digest,
        adapter=f"adapters/{place}",
        card=f"cards/{place}/{read_manifest(card).digest[:SHORT]}",
        rank=rank,
        targets=sorted(lora["target_modules"]),
        lineage=lineage,
        measured=measured,
        examples=[example.prompt for example in summary.completions.examples],
        gate=gate,
    )


def _changes(summary: _Summary, name: str) -> dict[str, Interval]:
    """The variant's change on every other category and retention set, in percent of the base's perplexity there."""
    changes = {}
    for where, measured in {**summary.transfer, **summary.retention}.items():
        systems = measured["systems"]
        base = systems["base"]["perplexity"]["abstract_mean"]
        changes[where] = Interval(**{k: 100 * systems[name]["delta"][k] / base for k in ("mean", "low", "high")})
    return changes


def _promote(registry: Registry, names: list[str], policy: Policy) -> State:
    """Promote what of `names` waits in staging; where another writer was first, decide again on what it left."""
    for attempt in range(10):
        state = registry.snapshot()
        waiting = [v for n in names if _may_be_promoted(v := state.versions[n], state, policy)]
        if not waiting:
            return state
        aliases = {}
        for alias in [CHAMPION, *dict.fromkeys(f"{CHAMPION}:{v.mixture}" for v in waiting)]:
            contenders = [v for v in waiting if alias in (CHAMPION, f"{CHAMPION}:{v.mixture}")]
            best = max(contenders, key=lambda v: v.measured.gain(policy.metric))
            holder = state.versions[state.aliases[alias]].measured if alias in state.aliases else None
            if compare_to_champion(best.measured, holder, policy).passed:
                aliases[alias] = best
        try:
            return registry.decide_promotion(state, waiting, aliases)
        except ConflictError:
            if attempt == 9:
                raise
    raise AssertionError("unreachable")


def _may_be_promoted(version: Version, state: State, policy: Policy) -> bool:
    """Whether a version waits, and would not take its variant's name from one that measured better."""
    if version.stage != "staging" or version.promoted:
        return False
    return _compare_to_predecessor(version, state, policy).passed


def _compare_to_predecessor(version: Version, state: State, policy: Policy) -> Clause:
    """`version` against the version in production that its variant's name means now."""
    current = [v for v in state.served if v.variant == version.variant and v.stage == "production"]
    holder = state.resolve(version.variant) if current else None
    return compare_to_champion(version.measured, holder.measured if holder else None, policy)


def _registered(state: State, name: str, policy: Policy) -> Registered:
    version, champion = state.versions[name], state.aliases.get(CHAMPION)
    if not version.gate.passed:
        reasons = version.gate.reasons
    elif version.stage == "archived":
        reasons = ["it is archived: restore it to serve it"]
    elif version.stage == "staging" and version.promoted:
        reasons = ["it was rolled back: only `feyntune promote` brings it back"]
    elif version.stage == "staging" and not (worse := _compare_to_predecessor(version, state, policy)).passed:
        what = worse.message.replace("the champion's perplexity", "the perplexity of the version in production")
        what = what.replace("the champion was", "the version in production was")
        reasons = [f"{what}: it waits for `feyntune promote`"]
    elif version.stage == "staging":
        reasons = ["it passed the gate and waits for `feyntune promote`"]
    elif name != champion and champion is not None:
        reasons = [compare_to_champion(version.measured, state.versions[champion].measured, policy).message]
    else:
        reasons = []
    return Registered(
        version=name,
        stage=version.stage,
        promoted=version.stage == "production" and version.gate.passed,
        champion=name == champion,
        reasons=reasons,
    )


def _first_error(e: ValidationError) -> str:
    error = e.errors()[0]
    return f"{'.'.join(str(p) for p in error['loc'])}: {error['msg']}"
