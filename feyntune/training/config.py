"""The knobs of a training run, with the published recipe's values as defaults (arXiv 2508.03716; stats in README).

No heavy imports here: the launcher compares configurations without loading torch.
"""

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
    """What decides the adapter comes first; what only decides how it is computed follows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: PositiveInt = 8  # of the LoRA matrices (arXiv 2106.09685 §4.1)
    alpha: PositiveInt = 32  # the update is scaled by alpha / rank
    dropout: float = Field(0.05, ge=0, lt=1)  # on the input of each LoRA pair
    precision: Literal["nf4", "bf16", "fp32"] = "nf4"  # of the frozen base; adapters are fp32 while they learn
    learning_rate: PositiveFloat = 3e-4  # at its highest, when the warm-up ends
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    epsilon: PositiveFloat = 1e-5  # of AdamW
    weight_decay: NonNegativeFloat = 0.1  # on every LoRA matrix
    min_rate: float = Field(0.01, ge=0, le=1)  # the cosine ends at this share of the learning rate
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps in which the rate rises from 0
    clip: PositiveFloat = 1.0  # largest norm of a step's gradient
    epochs: PositiveInt = 4  # passes over the mixture
    steps: PositiveInt | None = None  # steps instead of epochs, to compare mixtures at equal compute
    batch: PositiveInt = 16  # abstracts a step, over all devices
    max_length: PositiveInt | None = Field(None, ge=8)  # tokens of a document; None: the base's context
    seed: NonNegativeInt = 0  # of the initial adapter, the order of the data and dropout
    deterministic: bool = False  # same bytes on any number of devices; CPU only, up to 1.2 times the cost
    slots: PositiveInt = 6  # parts of a batch in deterministic mode; the devices must divide it
    validation_papers: NonNegativeInt = 1000  # papers of the validation split measured at the end of each epoch

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    devices: PositiveInt = 1  # processes, one to a device, each with a full copy of the base
    threads: PositiveInt | None = None  # CPU threads of a process; None: torch's choice, 1 if deterministic
    micro_batch_tokens: PositiveInt | None = None  # most tokens computed at once; None: chosen for the device
    checkpoint_layers: Literal["auto"] | NonNegativeInt = "auto"  # layers that recompute instead of remember
    compile: bool = False  # norms and MLPs by torch.compile: a minute first, then a few percent; needs a C compiler
    loss_words: PositiveInt | None = None  # of the vocabulary at once in the loss; None: 1024 on a CPU, 8192 on a GPU
    save_every_steps: PositiveInt | None = None  # checkpoint after so many steps
    save_every_seconds: PositiveFloat | None = 300  # checkpoint when so much time has passed
    save_deadline: PositiveFloat = 30  # seconds a checkpoint may take after SIGTERM
    keep_checkpoints: PositiveInt = 2  # the newest ones; older ones are deleted

    @model_validator(mode="after")
    def _combinations(self) -> "TrainConfig":
        if self.deterministic and self.slots % self.devices:
            raise ValueError(
                f"deterministic training shares {self.slots} slots evenly, which {self.devices} devices cannot: "
                "set slots to a multiple of devices"
            )
        if self.deterministic and self.device == "cuda":
            raise ValueError(
                "deterministic training runs on CPUs only, because the backward pass of GPU attention adds in no "
                "fixed order: leave deterministic off"
            )
        if self.deterministic and self.compile:
            raise ValueError(
                "deterministic training runs the same kernels everywhere, which torch.compile chooses for each "
                "machine: leave one of the two off"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self

    def identity(self) -> dict[str, Any]:
        """The knobs that decide the adapter; it may be computed elsewhere, or go on elsewhere, under the others."""
        return self.model_dump(mode="json", exclude=_HOW)


_HOW = {
    "device",
    "devices",
    "threads",
    "micro_batch_tokens",
    "checkpoint_layers",
    "compile",
    "loss_words",
    "save_every_steps",
    "save_every_seconds",
    "save_deadline",
    "keep_checkpoints",
}


def parse_config(values: dict[str, Any]) -> TrainConfig:
    """`values` as a TrainConfig.

    Raises:
        UserError: an unknown knob or a value that cannot be, named.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            what = f"there is no such knob; there are {', '.join(TrainConfig.model_fields)}"
        raise UserError(f"Training recipe{', ' + where if where else ''}: {what}.") from e


def adapter_config(config: TrainConfig, mixture: str, method: str) -> dict[str, Any]:
    """What the manifest of the adapter records as its making."""
    return {**config.identity(), "variant": f"{mixture}/{method}", "mixture": mixture, "method": method}
