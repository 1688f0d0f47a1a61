"""What a training saves and resumes from: position, losses, adapter and optimizer."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from feyntune.errors import Interrupted
from feyntune.telemetry import log
from feyntune.training.checkpoints import Checkpoint, Checkpointer
from feyntune.training.config import TrainConfig
from feyntune.training.distributed import ProcessGroup


@dataclass
class TrainState:
    """Position and history of a training. `step` and what `curve` returns are functions of the training alone."""

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # nats a token
    learning_rates: list[float] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    step_seconds: float = 0.0
    validation_seconds: float = 0.0
    interruptions: int = 0
    saved_step: int = 0
    saved_time: float = field(default_factory=time.monotonic)

    def is_validated(self) -> bool:
        """Whether the validation perplexity of this step is known."""
        return any(entry["step"] == self.step for entry in self.validation)

    def add_step(self, loss: float, learning_rate: float, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.losses.append(round(loss, 6))
        self.learning_rates.append(float(f"{learning_rate:.6g}"))
        self.step_seconds += seconds

    def save_is_due(self, config: TrainConfig) -> bool:
        steps, seconds = config.save_every_steps, config.save_every_seconds
        return (steps is not None and self.step - self.saved_step >= steps) or (
            seconds is not None and time.monotonic() - self.saved_time >= seconds
        )

    def mark_saved(self) -> None:
        self.saved_step, self.saved_time = self.step, time.monotonic()

    def curve(self) -> dict[str, Any]:
        """What travels with the adapter: loss in nats a token, learning rate, validation perplexity."""
        return {"loss": self.losses, "learning_rate": self.learning_rates, "validation": self.validation}

    def stats(self) -> dict[str, Any]:
        return {
            "seconds": self.step_seconds + self.validation_seconds,
            "step_seconds": self.step_seconds,
            "validation_seconds": self.validation_seconds,
            "interruptions": self.interruptions,
        }


def snapshot(state: TrainState, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> Checkpoint:
    """A copy of the whole state on the CPU."""
    tensors = {}
    for name, p in parameters.items():
        tensors[f"adapter.{name}"] = p.detach().to("cpu", copy=True)
        moments = optimizer.state.get(p, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                tensors[f"{moment}.{name}"] = moments[moment].to("cpu", copy=True)
    curve = {name: list(values) for name, values in state.curve().items()}
    return Checkpoint(state.step, tensors, {"step": state.step, "tokens": state.tokens, **curve}, state.stats())


def resume(
    state: TrainState,
    checkpointer: Checkpointer | None,
    group: ProcessGroup,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    variant: str,
) -> None:
    """Resume from the newest undamaged checkpoint: rank 0 reads it, the others receive it from rank 0."""
    checkpoint = checkpointer.load_latest() if checkpointer is not None and group.rank == 0 else None
    saved = group.broadcast_object(None if checkpoint is None else (checkpoint.progress, checkpoint.stats))
    if saved is None:
        return
    progress, stats = saved
    state.step, state.tokens = progress["step"], progress["tokens"]
    state.losses, state.learning_rates = progress["loss"], progress["learning_rate"]
    state.validation = progress["validation"]
    state.step_seconds, state.validation_seconds = stats["step_seconds"], stats["validation_seconds"]
    state.interruptions = stats["interruptions"] + 1
    state.mark_saved()
    for name, p in parameters.items():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if checkpoint is not None:
            p.data.copy_(checkpoint.tensors[f"adapter.{name}"])
            for moment, value in moments.items():
                value.copy_(checkpoint.tensors[f"{moment}.{name}"])
        group.broadcast([p, *moments.values()])
        # The fused optimizer of a GPU reads the step there.
        optimizer.state[p] = {"step": torch.tensor(float(state.step), device=p.device), **moments}
    for param_group in optimizer.param_groups:
        param_group["initial_lr"] = param_group["lr"]  # what a schedule that starts in the middle reads
    if group.rank == 0:
        log.info("%s: resuming from step %d", variant, state.step)


def interrupt(
    state: TrainState,
    checkpointer: Checkpointer | None,
    config: TrainConfig,
    group: ProcessGroup,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    variant: str,
) -> None:
    """Save within the deadline and raise Interrupted. All processes call this after the same step; rank 0 saves."""
    outcome = "nothing is saved, because no address for checkpoints was given"
    if checkpointer is not None and group.rank == 0:
        deadline = time.monotonic() + config.save_deadline
        if checkpointer.wait(deadline - time.monotonic()) and checkpointer.newest_step != state.step and state.step > 0:
            checkpointer.save(snapshot(state, parameters, optimizer))
            checkpointer.wait(deadline - time.monotonic())
        newest = checkpointer.newest_step
        outcome = f"step {newest} is saved" if newest is not None else "nothing was saved yet"
    raise Interrupted(
        f"Training of {variant} was stopped after step {state.step}; {outcome}. Start it again to resume."
    )
