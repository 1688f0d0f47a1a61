"""Settings of the evaluate step and of the comparison. No heavy imports: they are checked before a run starts."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator


def _off(value: Any) -> Any:
    """`false` switches off what a setting describes: Kubeflow's parameters know no null."""
    return None if value is False else value


class CompletionsConfig(BaseModel):
    """Beginnings of abstracts that every system completes.

    Attributes:
        papers, holdout_papers: how many test papers, and papers newer than the base where there are any; those of the
            category that decides (`decisive`), chosen by the hash of their ids.
        rule: where the prompt ends. `paper` is FeynTune's; `careful` respects TeX, abbreviations and initials.
        decodings: `sampled` is the paper's (temperature, one sample), `greedy` has no chance in it.
        temperature, top_p: of the sampling. FeynTune leaves top_p to the model's own settings; 1 keeps every token.
        max_new_tokens: most tokens of a completion; fewer where the model's context ends before.
        seed: of the sampling. A paper's own seed follows from it and its id and is the same for every system.
        similarity: the embedding model: a hub id, a folder of sentence-transformers, or `package:NAME/FOLDER`, a folder
            in an installed Python package. `false` leaves semantic similarity out, as does a model that cannot be had.
        memorised_words: a completion with a run of so many words of the training set counts as memorised.
        requests: most completions computed at once.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    papers: int = Field(100, ge=2)
    holdout_papers: int = Field(25, ge=0)
    rule: Literal["paper", "careful"] = "paper"
    decodings: list[Literal["sampled", "greedy"]] = Field(["sampled", "greedy"], min_length=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    seed: int = Field(42, ge=0, lt=2**63)
    similarity: Annotated[str | None, BeforeValidator(_off)] = "sentence-transformers/all-mpnet-base-v2"
    memorised_words: int = Field(30, ge=1)
    requests: int = Field(64, ge=1)

    @field_validator("decodings")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a decoding is named twice: name each once")
        return value


class EvaluateConfig(BaseModel):
    """What is scored, and how.

    Attributes:
        categories: primary categories (`hep-th`) or archives (`cs`, standing for every `cs.*`) whose test papers
            are scored. The paper measures on hep-th; the transfer matrix needs the others too.
        include_base: score the base model itself beside the adapters.
        precision: of the base's weights. The paper measures on 16-bit weights what it trained on 4-bit ones.
        tokens_per_batch: most tokens in one packed batch.
        tokens_per_head: tokens whose logits exist at one time (tokens x vocabulary x 4 bytes).
        completions: what is completed, and how; `false` measures perplexity alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    categories: list[str] = Field(["hep-th"], min_length=1)
    include_base: bool = True
    precision: Literal["fp32", "bf16", "nf4"] = "bf16"
    tokens_per_batch: int = Field(4096, ge=1)
    tokens_per_head: int = Field(512, ge=1)
    completions: Annotated[CompletionsConfig | None, BeforeValidator(_off)] = CompletionsConfig()


class CompareConfig(BaseModel):
    """How variants are held against the base.

    Attributes:
        category: whose test abstracts decide; the other scored categories go into the transfer matrix. None takes
            hep-th, the paper's, or whatever was scored where hep-th was not.
        resamples, seed: of the bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    category: str | None = None
    resamples: int = Field(9999, ge=99)
    seed: int = 1


def decisive(scored: list[str], wanted: str | None = None) -> str | None:
    """Whose test abstracts decide: `wanted`, or hep-th where it is scored; None: all scored categories together."""
    return wanted or ("hep-th" if "hep-th" in scored else None)
