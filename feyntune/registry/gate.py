"""The gate: which measured variants may be promoted, by a policy file a person can read.

    # gate.yaml
    metric: abstract_mean        # or token: what ranks the variants that pass
    margin_over_base: 0.0        # perplexity by which the interval must clear the base
    minimum_abstracts: 30
    maximum_memorisation: 0.01   # leave out not to ask for it
    margin_over_champion: 0.0
    unlike_champion: replace     # or keep: when the champion was measured on another test set

One clause stands in every policy: the paired 95 % interval of variant minus base lies below zero.
"""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from feyntune.artifacts.artifact import sha256_json
from feyntune.errors import UserError

Metric = Literal["abstract_mean", "token"]


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


class Measured(BaseModel):
    """What one comparison found about one variant. `test` and `base` are digests."""

    model_config = ConfigDict(frozen=True)

    test: str
    base: str
    abstracts: int
    base_perplexity: Perplexity
    perplexity: Perplexity
    delta: Interval  # variant minus base: below zero is better
    memorisation: FiniteFloat | None = None

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
    maximum_memorisation: FiniteFloat | None = Field(None, ge=0, le=1)
    margin_over_champion: FiniteFloat = Field(0.0, ge=0)
    unlike_champion: Literal["replace", "keep"] = "replace"

    @property
    def digest(self) -> str:
        return sha256_json(self.model_dump())


class Clause(BaseModel):
    """One clause, what was found, and one sentence saying so."""

    model_config = ConfigDict(frozen=True)

    clause: str
    passed: bool
    says: str


class Verdict(BaseModel):
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
        return [c.says for c in self.clauses if not c.passed]


def read_policy(path: str | Path | None) -> Policy:
    """The policy in a YAML file; the default policy without one.

    Raises:
        UserError: the file is not there, is not YAML, or has an unknown or impossible clause (named).
    """
    if path is None:
        return Policy()
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise UserError(f"Policy {path} cannot be read ({e.strerror}): give the path of a gate.yaml.") from e
    except yaml.YAMLError as e:
        raise UserError(f"Policy {path} is not YAML: {str(e).replace(chr(10), ' ')}.") from e
    try:
        return Policy.model_validate({} if content is None else content)
    except ValidationError as e:
        error = e.errors()[0]
        clause = ".".join(str(p) for p in error["loc"]) or "the file"
        raise UserError(f"Policy {path}: {clause}: {error['msg']}; clauses: {', '.join(Policy.model_fields)}.") from e


def judge(measured: Measured, policy: Policy) -> Verdict:
    """Hold one variant's measurements against every clause that does not concern the champion."""
    delta, limit = measured.delta, 0.0 - policy.margin_over_base
    clauses = [
        Clause(
            clause="below_base",
            passed=delta.high < limit and measured.gain(policy.metric) > 0,
            says=_below_base(measured, policy),
        ),
        Clause(
            clause="minimum_abstracts",
            passed=measured.abstracts >= policy.minimum_abstracts,
            says=f"measured on {measured.abstracts} abstracts, the policy asks for {policy.minimum_abstracts}"
            + (
                f": {policy.minimum_abstracts - measured.abstracts} too few"
                if measured.abstracts < policy.minimum_abstracts
                else ""
            ),
        ),
    ]
    if policy.maximum_memorisation is not None:
        clauses.append(_memorisation(measured.memorisation, policy.maximum_memorisation))
    return Verdict(policy=policy.digest, clauses=clauses)


def beats(challenger: Measured, champion: Measured | None, policy: Policy) -> Clause:
    """Whether `challenger` takes an alias from `champion` (None: nobody holds it).

    Two variants compare by their gain over the same base on the same test set. Where either differs there is
    nothing to compare, and the policy's `unlike_champion` decides.
    """
    if champion is None:
        return Clause(clause="beats_champion", passed=True, says="there is no champion yet")
    if (challenger.test, challenger.base) != (champion.test, champion.base):
        what = "test set" if challenger.test != champion.test else "base"
        return Clause(
            clause="beats_champion",
            passed=policy.unlike_champion == "replace",
            says=f"the champion was measured on another {what}; by the policy it is "
            + ("replaced" if policy.unlike_champion == "replace" else "kept"),
        )
    lead = challenger.gain(policy.metric) - champion.gain(policy.metric)
    passed = lead > policy.margin_over_champion
    says = f"{abs(lead):.4g} {'below' if lead > 0 else 'above'} the champion's perplexity ({policy.metric})"
    if not passed:
        says += f", the policy asks for more than {policy.margin_over_champion:.4g} below"
    return Clause(clause="beats_champion", passed=passed, says=says)


def _below_base(measured: Measured, policy: Policy) -> str:
    delta, limit = measured.delta, 0.0 - policy.margin_over_base
    says = f"variant minus base is {delta.mean:.4g}, 95 % interval [{delta.low:.4g}, {delta.high:.4g}]"
    if not delta.high < limit:
        says += f": its upper end must lie below {limit:.4g} and is {delta.high - limit:.4g} above"
    elif measured.gain(policy.metric) <= 0:
        says += f", but its {policy.metric} perplexity is {-measured.gain(policy.metric):.4g} above the base's"
    return says


def _memorisation(found: float | None, limit: float) -> Clause:
    if found is None:
        says = f"memorisation was not measured, the policy allows at most {limit:.4g}"
    elif found > limit:
        says = f"memorisation is {found:.4g}, {found - limit:.4g} over the policy's maximum of {limit:.4g}"
    else:
        says = f"memorisation is {found:.4g}, the policy allows {limit:.4g}"
    return Clause(clause="maximum_memorisation", passed=found is not None and found <= limit, says=says)
