"""Settings of the evaluate step and of the comparison. No heavy imports: they are checked before a run starts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EvaluateConfig(BaseModel):
    """What is scored, and how.

    Attributes:
        categories: primary categories (`hep-th`) or archives (`cs`, standing for every `cs.*`) whose test papers
            are scored. The paper measures on hep-th; the transfer matrix needs the others too.
        include_base: score the base model itself beside the adapters.
        precision: of the base's weights. The paper measures on 16-bit weights what it trained on 4-bit ones.
        tokens_per_batch: most tokens in one packed batch.
        tokens_per_head: tokens whose logits exist at one time (tokens x vocabulary x 4 bytes).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    categories: list[str] = Field(["hep-th"], min_length=1)
    include_base: bool = True
    precision: Literal["fp32", "bf16", "nf4"] = "bf16"
    tokens_per_batch: int = Field(4096, ge=1)
    tokens_per_head: int = Field(512, ge=1)


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
