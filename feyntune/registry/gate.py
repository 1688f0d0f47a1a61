"""The gate: which measured variants may be promoted, by a policy file a person can read.

    # gate.yaml
    metric: abstract_mean        # or token: what ranks the variants that pass
    margin_over_base: 0.0        # perplexity by which the interval must clear the base
    minimum_abstracts: 30
    maximum_memorization: 0.01   # leave out not to ask for it
    maximum_increase: {everyday: 5}  # percent; leave out not to ask for it
    margin_over_champion: 0.0
    on_incomparable_champion: replace  # or keep: when the champion was measured on another test set or base

One clause is part of every policy: the paired 95 % interval of variant minus base lies below zero.
A champion on the same test set that was measured in another way (precision, attention, special tokens, version of the
evaluation; feyntune.conditions) is kept, whatever the policy: measure it again, or promote by hand.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from feyntune.artifacts.artifact import sha256_json
from feyntune.conditions import Conditions, differences
from feyntune.errors import UserError

Metric = Literal["abstract_mean", "token"]

_RENAMED = {"maximum_memorisation": "maximum_memorization", "unlike_champion": "on_incomparable_champion"}


class Perplexity(BaseModel):
    """Both definitions: the mean over abstracts, and over all tokens."""

    model_config = ConfigDict(frozen=True)

    abstract_mean: FiniteFloat
    token: FiniteFloat


class Interval(BaseModel):
    """A paired difference of per-abstract perplexities with its 95 % interval."""

    model_config = ConfigDict(frozen=True)

    mean: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class AsServed(BaseModel):
    """How far the endpoint's log-probabilities are from the scores' (feyntune.evaluation.as_served); nats a token."""

    model_config = ConfigDict(frozen=True)

    texts: int
    mean_difference: FiniteFloat
    largest_difference: FiniteFloat
    scored: dict[str, str | float]  # lora, attention, perplexity
    served: dict[str, str | float]


class Measured(BaseModel):
    """One variant's figures from one comparison. `test` and `base` are digests; `conditions` is None before 0.2."""

    model_config = ConfigDict(frozen=True)

    test: str
    base: str
    abstracts: int
    base_perplexity: Perplexity
    perplexity: Perplexity
    delta: Interval  # variant minus base: below zero is better
    conditions: Conditions | None = None
    changes: dict[str, Interval] = {}  # on other categories and retention sets, in percent of the base's perplexity
    as_served: AsServed | None = None  # None before 0.2, and where nothing was completed
    # Events before 0.2 spell it with an s.
    memorization: FiniteFloat | None = Field(None, validation_alias=AliasChoices("memorization", "memorisation"))

    def gain(self, metric: Metric) -> float:
        """Perplexity the variant is below its base (larger is better)."""
        if metric == "abstract_mean":
            return -self.delta.mean
        return self.base_perplexity.token - self.perplexity.token


class Policy(BaseModel):
    """The clauses of a gate, with the defaults used when no policy file is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Metric = "abstract_mean"
    margin_over_base: FiniteFloat = Field(0.0, ge=0)
    minimum_abstracts: int = Field(30, ge=1)
    maximum_memorization: FiniteFloat | None = Field(None, ge=0, le=1)
    maximum_increase: dict[str, Annotated[FiniteFloat, Field(ge=0)]] = {}
    margin_over_champion: FiniteFloat = Field(0.0, ge=0)
    on_incomparable_champion: Literal["replace", "keep"] = "replace"

    @property
    def digest(self) -> str:
        return sha256_json(self.model_dump())


class Clause(BaseModel):
    """One clause, whether it holds, and one sentence with the figures."""

    model_config = ConfigDict(frozen=True)

    clause: str
    passed: bool
    message: str = Field(validation_alias=AliasChoices("message", "says"))  # "says" before 0.2


class GateResult(BaseModel):
    """All clauses of one policy (by digest) on one variant."""

    model_config = ConfigDict(frozen=True)

    policy: str
    clauses: list[Clause]

    @property
    def passed(self) -> bool:
        return bool(self.clauses) and all(c.passed for c in self.clauses)

    @property
    def reasons(self) -> list[str]:
        """Why it was refused: the sentence of each failed clause."""
        return [c.message for c in self.clauses if not c.passed]


def read_policy(path: str | Path | None) -> Policy:
    """The policy in a YAML file; the default policy without one.

    Raises:
        UserError: the file is not there, is not YAML, or has an unknown or impossible clause (named).
    """
    if path is None:
        return Policy()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"Policy {path} cannot be read ({e.strerror}): give the path of a gate.yaml.") from e
    except yaml.YAMLError as e:
        raise UserError(f"Policy {path} is not YAML: {str(e).replace(chr(10), ' ')}.") from e
    try:
        return Policy.model_validate({} if content is None else content)
    except ValidationError as e:
        error = e.errors()[0]
        if (new := _RENAMED.get(str(error["loc"][0]) if error["loc"] else "")) is not None:
            raise UserError(f"Policy {path}: {error['loc'][0]} is now called {new}: rename it.") from e
        clause = ".".join(str(p) for p in error["loc"]) or "the file"
        raise UserError(f"Policy {path}: {clause}: {error['msg']}; clauses: {', '.join(Policy.model_fields)}.") from e


def check_gate(measured: Measured, policy: Policy) -> GateResult:
    """Hold one variant's measurements against every clause that does not concern the champion."""
    delta, limit = measured.delta, 0.0 - policy.margin_over_base
    clauses = [
        Clause(
            clause="below_base",
            passed=delta.high < limit and measured.gain(policy.metric) > 0,
            message=_below_base(measured, policy),
        ),
        Clause(
            clause="minimum_abstracts",
            passed=measured.abstracts >= policy.minimum_abstracts,
            message=f"measured on {measured.abstracts} abstracts, the policy asks for {policy.minimum_abstracts}"
            + (
                f": {policy.minimum_abstracts - measured.abstracts} too few"
                if measured.abstracts < policy.minimum_abstracts
                else ""
            ),
        ),
    ]
    if policy.maximum_memorization is not None:
        clauses.append(_memorization(measured.memorization, policy.maximum_memorization))
    clauses += [_increase(name, measured.changes.get(name), limit) for name, limit in policy.maximum_increase.items()]
    return GateResult(policy=policy.digest, clauses=clauses)


def compare_to_champion(challenger: Measured, champion: Measured | None, policy: Policy) -> Clause:
    """Whether `challenger` takes an alias from `champion` (None: nobody holds it).

    Two variants compare by their gain over the same base on the same test set. Where either differs there is
    nothing to compare, and the policy's `on_incomparable_champion` decides. Where they were measured under other
    conditions the champion is kept: a gain in bf16 does not beat one in fp32.
    """
    if champion is None:
        return Clause(clause="better_than_champion", passed=True, message="there is no champion yet")
    if (challenger.test, challenger.base) != (champion.test, champion.base):
        what = "test set" if challenger.test != champion.test else "base"
        return Clause(
            clause="better_than_champion",
            passed=policy.on_incomparable_champion == "replace",
            message=f"the champion was measured on another {what}; by the policy it is "
            + ("replaced" if policy.on_incomparable_champion == "replace" else "kept"),
        )
    if unlike := differences(challenger.conditions, champion.conditions):
        return Clause(
            clause="better_than_champion",
            passed=False,
            message=f"the champion was measured otherwise, in {', '.join(unlike)}, so it is kept: evaluate both alike",
        )
    lead = challenger.gain(policy.metric) - champion.gain(policy.metric)
    passed = lead > policy.margin_over_champion
    message = f"{abs(lead):.4g} {'below' if lead > 0 else 'above'} the champion's perplexity ({policy.metric})"
    if not passed:
        message += f", the policy asks for more than {policy.margin_over_champion:.4g} below"
    return Clause(clause="better_than_champion", passed=passed, message=message)


def _below_base(measured: Measured, policy: Policy) -> str:
    delta, limit = measured.delta, 0.0 - policy.margin_over_base
    message = f"variant minus base is {delta.mean:.4g}, 95 % interval [{delta.low:.4g}, {delta.high:.4g}]"
    if not delta.high < limit:
        message += f": its upper end must lie below {limit:.4g} and is {delta.high - limit:.4g} above"
    elif measured.gain(policy.metric) <= 0:
        message += f", but its {policy.metric} perplexity is {-measured.gain(policy.metric):.4g} above the base's"
    return message


def _memorization(share: float | None, limit: float) -> Clause:
    if share is None:
        message = f"memorization was not measured, the policy allows at most {limit:.4g}"
    elif share > limit:
        message = f"memorization is {share:.4g}, {share - limit:.4g} over the policy's maximum of {limit:.4g}"
    else:
        message = f"memorization is {share:.4g}, the policy allows {limit:.4g}"
    return Clause(clause="maximum_memorization", passed=share is not None and share <= limit, message=message)


def _increase(name: str, change: Interval | None, limit: float) -> Clause:
    """The upper end of the interval counts: what was measured on few texts is no proof that nothing was forgotten."""
    passed = change is not None and change.high <= limit
    if change is None:
        message = f"{name} was not measured, the policy allows an increase of at most {limit:.4g} %"
    else:
        message = f"perplexity on {name} changes by {change.mean:+.4g} % (95 % interval up to {change.high:+.4g} %)"
        message += f", the policy allows at most {limit:.4g} %"
        message += "" if passed else f": {change.high - limit:.4g} too much"
    return Clause(clause=f"maximum_increase on {name}", passed=passed, message=message)
