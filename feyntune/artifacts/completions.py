"""Completions of several systems side by side: the same papers and prompts, one text a system and paper."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, field_validator

from feyntune.artifacts.artifact import Manifest, open_artifact
from feyntune.errors import UserError
from feyntune.names import BASE, slug

COLUMNS = ["id", "primary", "split", "rule", "decoding", "seed", "prompt", "reference", "completion", "truncated"]


class CompletionFilter(BaseModel):
    """Which of the completions in an evaluation are used.

    Attributes:
        rule: where the prompt ends: `paper` (half of the sentences as FeynTune splits them) or `careful`.
        decoding, seed: of sampled completions with several seeds the given one, or the lowest.
        text: `truncated` shows every system truncated by the same rule, `completion` all it wrote. The base has not
            learned to stop after an abstract, so the latter measures stopping as much as physics.
        split: `test`, or `holdout` (papers newer than the base).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rule: Literal["paper", "careful"] = "paper"
    decoding: Literal["sampled", "greedy"] = "sampled"
    seed: int | None = None
    text: Literal["truncated", "completion"] = "truncated"
    split: Literal["test", "holdout"] = "test"

    @field_validator("text", mode="before")
    @classmethod
    def _current_name(cls, value: Any) -> Any:
        if value == "fair":  # before 0.2
            raise ValueError("fair is now called truncated")
        return value


class Passage(NamedTuple):
    """The first part of an abstract, and its reference continuation."""

    primary: str
    prompt: str
    reference: str


@dataclass
class SystemCompletions:
    """Every system's completion of every paper in `papers`.

    Attributes:
        papers: by id, sorted.
        texts: by system, the base first, then by id.
        digests: sha256 of the file of completions each system's texts come from.
        models: of systems that answered through an endpoint, the model.
        left_out: papers that not every system completed.
    """

    test: str
    papers: dict[str, Passage] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def inputs(self) -> dict[str, str]:
        """What a folder made from these completions names as its inputs."""
        return {"test": self.test, **{f"completions of {name}": d for name, d in self.digests.items()}}

    def first(self, count: int) -> list[str]:
        """`count` ids, the same ones whatever systems there are, those of a smaller count among them."""
        return sorted(self.papers, key=lambda i: hashlib.sha256(i.encode()).digest())[:count]


def completions_in(manifest: Manifest) -> dict[str, str]:
    """Names of the files of completions in an artifact, by system."""
    known = {slug(name): name for name in (BASE, *manifest.inputs, *manifest.config.get("systems", {}))}
    result = {}
    for path in sorted(manifest.files):
        folder, _, name = path.rpartition("/")
        if folder == "completions" and name.endswith(".parquet"):
            result[known.get(name.removesuffix(".parquet"), name.removesuffix(".parquet"))] = path
    return result


def read_completions(folders: Sequence[str | Path], filter: CompletionFilter) -> SystemCompletions:
    """Read the completions of all systems in `folders` that pass `filter` (kinds `evaluation` and `answers`).

    Raises:
        UserError: no base, a system twice, another test set, another prompt for the same paper, or a system
            without completions that pass the filter.
    """
    result: SystemCompletions | None = None
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in map(Path, folders):
        manifest = open_artifact(folder)
        if manifest.kind not in ("evaluation", "answers"):
            raise UserError(f"{folder} holds a {manifest.kind}: give folders of `evaluate` or `ask`.")
        result = result or SystemCompletions(manifest.inputs["test"])
        if manifest.inputs["test"] != result.test:
            raise UserError(
                f"{folder} was made on test set {manifest.inputs['test'][:16]}, the others on {result.test[:16]}: "
                "give systems that completed the same papers."
            )
        files = completions_in(manifest)
        if not files:
            raise UserError(f"{folder} holds no completions: evaluate with completions.")
        for name, path in files.items():
            if name in rows:
                raise UserError(f"{name} is given twice, the second time in {folder}: leave one out.")
            rows[name] = _filtered(folder / path, filter, name)
            result.digests[name] = manifest.files[path].sha256
            if name in manifest.config.get("systems", {}):
                result.models[name] = manifest.config["systems"][name]["model"]
    if result is None or BASE not in rows:
        raise UserError("The base model's completions are not given: add its evaluation.")
    names = [BASE, *sorted(rows.keys() - {BASE})]
    everywhere = set.intersection(*(set(rows[name]) for name in names))
    result.left_out = len(set.union(*(set(rows[name]) for name in names))) - len(everywhere)
    for identifier in sorted(everywhere):
        passages = {Passage(r["primary"], r["prompt"], r["reference"]) for r in (rows[n][identifier] for n in names)}
        if len(passages) > 1:
            raise UserError(f"Not all systems were given the same prompt of {identifier}: complete again.")
        result.papers[identifier] = passages.pop()
    if not result.papers:
        raise UserError("No paper was completed by all systems: give systems that completed the same papers.")
    result.texts = {name: {i: rows[name][i][filter.text] for i in result.papers} for name in names}
    result.digests = {name: result.digests[name] for name in names}
    return result


def _filtered(path: Path, filter: CompletionFilter, name: str) -> dict[str, dict[str, Any]]:
    """Rows of one system by id."""
    conditions = [(key, "=", getattr(filter, key)) for key in ("rule", "decoding", "split")]
    if "truncated" not in pq.read_schema(path).names:
        raise UserError(f"{path} was written by an earlier version (before 0.2): complete again.")
    rows = pq.read_table(path, columns=COLUMNS, filters=conditions).to_pylist()
    seeds = {r["seed"] for r in rows} - {None}
    seed = filter.seed if filter.seed is not None else min(seeds, default=None)
    result = {r["id"]: r for r in rows if r["seed"] in (seed, None)}  # completions from an endpoint have no seed
    if not result:
        asked = f"{filter.decoding} completions (rule {filter.rule}, {filter.split}"
        asked += f", seed {filter.seed})" if filter.seed is not None else ")"
        raise UserError(f"{name} has no {asked}: choose others, or complete again.")
    return result
