"""Settings of a training run. The defaults are the published recipe (arXiv 2508.03716).

No heavy imports here: the launcher compares configurations without loading torch.
"""

import difflib
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from feyntune.errors import UserError
from feyntune.variants import load_variants

TARGETS = {name: method.target_modules for name, method in load_variants().methods.items()}


class TrainConfig(BaseModel):
    """Settings of a training run. The first part decides the adapter, the second only how it is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_rank: PositiveInt = Field(8, description="Rank of the LoRA matrices (arXiv 2106.09685, section 4.1).")
    lora_alpha: PositiveInt = Field(32, description="LoRA updates are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the input of each LoRA pair.")
    precision: Literal["nf4", "bf16", "fp32"] = Field(
        "nf4", description="Precision of the frozen base model. Adapter weights are fp32 during training."
    )
    learning_rate: PositiveFloat = Field(3e-4, description="Peak learning rate after warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    adam_epsilon: PositiveFloat = Field(1e-5, description="AdamW epsilon.")
    weight_decay: NonNegativeFloat = Field(0.1, description="AdamW weight decay, on every LoRA matrix.")
    min_lr_ratio: float = Field(0.01, ge=0, le=1, description="The cosine schedule ends at this share of the peak.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps with linear warm-up from 0.")
    max_grad_norm: PositiveFloat = Field(1.0, description="Gradients are clipped to this norm.")
    epochs: PositiveInt = Field(4, description="Passes over the mixture.")
    max_steps: PositiveInt | None = Field(
        None, description="Optimizer steps instead of epochs, to compare mixtures at equal compute."
    )
    global_batch_size: PositiveInt = Field(16, description="Abstracts per optimizer step, over all devices.")
    max_length: PositiveInt | None = Field(
        None, ge=8, description="Tokens per document; longer ones are split. None: the base model's context."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the adapter's initialization, the data order and dropout.")
    seeds: PositiveInt = Field(
        1,
        description="Trainings of each variant in a run, with seed, seed + 1, …: the spread between them is reported.",
    )
    validation_papers: NonNegativeInt = Field(
        1000, description="Papers of the validation split that are scored at the end of each epoch."
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one.")
    devices: PositiveInt = Field(1, description="Processes, one per device, each with a full copy of the base.")
    threads: PositiveInt | None = Field(None, description="CPU threads per process. None: torch's default.")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="Most tokens per forward pass. None: chosen for the device's memory."
    )
    activation_checkpointing_layers: Literal["auto"] | NonNegativeInt = Field(
        "auto", description="Layers that recompute their activations in the backward pass. auto: as few as fit."
    )
    vocab_chunk_size: PositiveInt | None = Field(
        None, description="Vocabulary entries per chunk of the loss. None: 1024 on a CPU, 8192 on a GPU."
    )
    save_every_steps: PositiveInt | None = Field(None, description="Steps between checkpoints.")
    save_every_seconds: PositiveFloat | None = Field(
        75, description="Seconds between checkpoints. Bounds the work lost when a pod is killed."
    )
    save_deadline: PositiveFloat = Field(15, description="Seconds a checkpoint may take after SIGTERM.")
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints to keep; older ones are deleted.")

    @model_validator(mode="after")
    def _combinations(self) -> "TrainConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that decide the adapter. Training may resume elsewhere with other values of the rest."""
        return self.model_dump(mode="json", exclude=_EXECUTION_SETTINGS)


_EXECUTION_SETTINGS = {
    "seeds",
    "device",
    "devices",
    "threads",
    "micro_batch_tokens",
    "activation_checkpointing_layers",
    "vocab_chunk_size",
    "save_every_steps",
    "save_every_seconds",
    "save_deadline",
    "keep_checkpoints",
}


RENAMED = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "epsilon": "adam_epsilon",
    "min_rate": "min_lr_ratio",
    "warmup": "warmup_ratio",
    "clip": "max_grad_norm",
    "steps": "max_steps",
    "batch": "global_batch_size",
    "checkpoint_layers": "activation_checkpointing_layers",
    "loss_words": "vocab_chunk_size",
}


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """`values` as a TrainConfig.

    Raises:
        UserError: an unknown setting (with its new name or the nearest one) or an invalid value, named.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(where, TrainConfig.model_fields, n=1)
            if where in RENAMED:
                what = f"this setting is now called {RENAMED[where]}"
            elif near:
                what = f"there is no such setting, perhaps {near[0]}"
            else:
                what = f"there is no such setting; the settings are {', '.join(TrainConfig.model_fields)}"
        raise UserError(f"Recipe: train{'.' + where if where else ''}: {what}.") from e


def adapter_metadata(config: TrainConfig, mixture: str, method: str) -> dict[str, Any]:
    """The configuration that the adapter's manifest records."""
    return {**config.identity(), "variant": f"{mixture}/{method}", "mixture": mixture, "method": method}
