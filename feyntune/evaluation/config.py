"""Settings of the evaluate step and of the comparison. No heavy imports: they are checked before a run starts."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

RENAMED = {"memorised_words": "memorized_words", "requests": "max_concurrent_requests"}  # before 0.2


def _off(value: Any) -> Any:
    """`false` switches off what a setting describes: Kubeflow's parameters know no null."""
    return None if value is False else value


class CompletionsConfig(BaseModel):
    """Prompts from abstracts that every system completes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    papers: int = Field(
        100, ge=2, description="Test papers of the primary category to complete, chosen by the hash of their ids."
    )
    holdout_papers: int = Field(
        25, ge=0, description="Papers after the base's knowledge cutoff to complete, where the split has any."
    )
    rule: Literal["paper", "careful"] = Field(
        "paper",
        description="Where the prompt ends: `paper` splits sentences as FeynTune does; `careful` respects TeX, "
        "abbreviations and initials.",
    )
    decodings: list[Literal["sampled", "greedy"]] = Field(
        ["sampled", "greedy"],
        min_length=1,
        description="`sampled` is the paper's (temperature, one sample); `greedy` is deterministic.",
    )
    temperature: float = Field(0.7, gt=0, description="Sampling temperature.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps every token. FeynTune uses the model's own setting."
    )
    max_new_tokens: int = Field(
        1024, ge=1, description="Maximum tokens of a completion; fewer where the model's context ends before."
    )
    seed: int = Field(
        42, ge=0, lt=2**63, description="Sampling seed. A paper's own seed follows from it and the paper's id."
    )
    similarity: Annotated[str | None, BeforeValidator(_off)] = Field(
        "sentence-transformers/all-mpnet-base-v2",
        description="Embedding model: a hub id, a folder of sentence-transformers, or `package:NAME/FOLDER`, a folder "
        "in an installed Python package. `false`, or a model that cannot be loaded, leaves semantic similarity out.",
    )
    memorized_words: int = Field(
        30, ge=1, description="A completion that shares this many consecutive words with its training set is memorized."
    )
    max_concurrent_requests: int = Field(64, ge=1, description="Completions computed in one batch.")

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, value: Any) -> Any:
        for old in RENAMED.keys() & (value if isinstance(value, dict) else {}):
            raise ValueError(f"{old} is now called {RENAMED[old]}")
        return value

    @field_validator("decodings")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a decoding is named twice: name each once")
        return value


class ExtractionConfig(BaseModel):
    """Training papers that a variant is tried to be made to repeat, each beside a test paper of the same age."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    papers: int = Field(
        400, ge=2, description="Pairs of a training and a test paper of each variant's mixture, at most."
    )
    prompts: list[Annotated[int, Field(ge=1)]] = Field(
        [25, 50, 100], min_length=1, description="Tokens of a paper that are given, one length after another."
    )
    continuation: int = Field(
        50, ge=1, description="Tokens after them that must follow exactly for the paper to count as reproduced."
    )

    @field_validator("prompts")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a prompt length is named twice: name each once")
        return sorted(value)

    @property
    def tokens(self) -> int:
        """Of a paper that are read."""
        return max(self.prompts) + self.continuation


_SHIPPED = "package:feyntune/evaluation/retention_texts"
RETENTION = {name: f"{_SHIPPED}/{name}.jsonl" for name in ("everyday", "other-sciences")}


class EvaluateConfig(BaseModel):
    """What is scored, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    categories: list[str] = Field(
        ["hep-th"],
        min_length=1,
        description="Primary categories (`hep-th`) or archives (`cs`, which stands for every `cs.*`) whose test papers "
        "are scored. The paper measures on hep-th; the transfer matrix needs the others too.",
    )
    include_base: bool = Field(True, description="Score the base model itself beside the adapters.")
    precision: Literal["fp32", "bf16", "fp16", "nf4"] = Field(
        "bf16",
        description="Precision of the base's weights. The paper measures on 16-bit weights what it trained on 4-bit.",
    )
    paper_perplexity: bool = Field(
        False,
        description="Measure perplexity exactly as the paper: weights and arithmetic in fp16, whatever `precision` "
        "says. The rest of its definition always holds for `abstract_mean`: BOS before an abstract, no EOS, mean over "
        "abstracts. Its batches of 12 change nothing: padding is not attended to.",
    )
    tokens_per_batch: int = Field(4096, ge=1, description="Maximum tokens of one packed batch.")
    tokens_per_head: int = Field(
        512, ge=1, description="Tokens whose logits exist at one time (tokens x vocabulary x 4 bytes)."
    )
    retention: Annotated[dict[str, str] | None, BeforeValidator(_off)] = Field(
        RETENTION,
        description="Texts far from the mixtures by name: JSON lines files with a `text` a line (a path, "
        "`s3://BUCKET/FILE`, or `package:NAME/FILE`). How much worse a variant is on them is in the transfer matrix, "
        "and the gate may limit it. A file whose content changes is another one: what was scored is scored again. "
        "`false`: none.",
    )
    retention_texts: int = Field(64, ge=2, description="Maximum texts of each retention set.")
    completions: Annotated[CompletionsConfig | None, BeforeValidator(_off)] = Field(
        CompletionsConfig(), description="What is completed, and how; `false` completes nothing."
    )
    extraction: Annotated[ExtractionConfig | None, BeforeValidator(_off)] = Field(
        ExtractionConfig(),
        description="How much of its training papers a variant can be made to repeat; `false` leaves it out.",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_the_paper(cls, value: Any) -> Any:
        """One setting is enough, also over a recipe that names a precision."""
        return {**value, "precision": "fp16"} if isinstance(value, dict) and value.get("paper_perplexity") else value

    @field_validator("retention")
    @classmethod
    def _names(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in value or {}:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"{name!r} is no name of a retention set: use letters, digits, '-', '.' and '_'")
        return value


class CompareConfig(BaseModel):
    """How variants are compared with the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    category: str | None = Field(
        None,
        description="Primary category, whose test abstracts rank the variants; the other scored categories go into "
        "the transfer matrix. By default hep-th (the paper's), or all that was scored where hep-th was not.",
    )
    resamples: int = Field(9999, ge=99, description="Bootstrap resamples.")
    seed: int = Field(1, description="Seed of the bootstrap.")


def primary_category(scored: list[str], category: str | None = None) -> str | None:
    """The category whose test abstracts rank the variants: `category`, or hep-th where it is scored; None: all."""
    return category or ("hep-th" if "hep-th" in scored else None)
