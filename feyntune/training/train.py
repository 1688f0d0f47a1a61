"""The training recipe: a base model and a mixture in, a LoRA adapter out. Read it from top to bottom.

The unit is the global batch, 16 abstracts by default. It is divided among the devices by tokens, laid end to end
without padding, and its loss is divided by the tokens of the whole batch, so the optimiser sees the same thing
on one device or three, before and after an interruption. There is no Trainer class: setup, loop, save.

transformers and bitsandbytes give the base (placed by accelerate), peft the adapter. The process group is torch's
own, because accelerate's launcher starts a single process on CPUs without saying so, and because the gradient of
an adapter is one small buffer, for which one all-reduce a step does what DDP's wrapper would.
"""

import errno
import json
import math
import os
import platform
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from feyntune.artifacts.artifact import Manifest, open_artifact, sha256_json, write_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.errors import Interrupted, UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.model.load import best_device, check_fit, load_base, load_tokenizer
from feyntune.model.packed import IGNORE, Packed, backbone, budgeted, head, hidden_states, kernel, pack
from feyntune.telemetry import log, progress
from feyntune.training.batches import Document, divide, documents, global_batch, predicted, read_mixture
from feyntune.training.checkpoints import Checkpoints, State
from feyntune.training.config import TARGETS, TrainConfig, adapter_metadata
from feyntune.training.dropout import DropoutSeeds, document_seeds, use_document_dropout
from feyntune.training.loss import WORDS, frozen_head_loss
from feyntune.training.memory import GPU_WORDS, plan_memory
from feyntune.training.metrics import Metrics
from feyntune.variants import METHODS

PATIENCE = 8  # tries of a request to the store: two minutes, so a store may be away for one


def train(
    data: str | Path,
    mixture: str,
    method: str,
    base: str,
    out: str | Path,
    config: TrainConfig,
    checkpoints: str | None = None,
) -> Manifest | None:
    """Train one adapter and seal it in `out` (kind `adapter`). With several devices, every process calls this.

    Args:
        data: a sealed split.
        base: the base model, pinned or not.
        checkpoints: a place in a store for checkpoints and for the finished adapter; none are kept without it.

    Returns:
        The adapter's manifest; None in processes other than the first.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the state is saved, the same call goes on from there.
        UserError: the input cannot be trained on, the loss diverged, or the disk or store gave out.
    """
    with _ranks(config) as ranks, _stop_signals() as stop:
        try:
            return _train(data, mixture, method, base, out, config, checkpoints, ranks, stop)
        except torch.OutOfMemoryError as e:
            raise UserError(
                "The GPU ran out of memory: lower micro_batch_tokens, or raise activation_checkpointing_layers."
            ) from e
        except OSError as e:
            if e.errno == errno.ENOSPC:
                raise UserError(f"No space is left on the disk of {out}: free some and start again.") from e
            raise


def _train(
    data: str | Path,
    mixture: str,
    method: str,
    base: str,
    out: str | Path,
    config: TrainConfig,
    checkpoints: str | None,
    ranks: "_Ranks",
    stop: threading.Event,
) -> Manifest | None:
    # Setup: what to train on.
    if method not in METHODS:
        raise UserError(f"Method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    variant = f"{mixture}/{method}"
    split = open_artifact(data, "split")
    base = pin_base(base)
    inputs = {"split": split.digest, "base": str(split_pin(base)[1])}
    made = adapter_metadata(config, mixture, method)
    papers = read_mixture(data, mixture, "train")
    tokenizer = load_tokenizer(base)
    bare = load_base(base, config.precision, ranks.device)
    check_fit(bare, tokenizer, base)
    context = _context(bare, config, base)
    examples, cut = documents(papers, tokenizer, context)
    validation, _ = documents(read_mixture(data, mixture, "validation", config.validation_papers), tokenizer, context)
    per_epoch = math.ceil(len(examples) / config.global_batch_size)
    total = config.max_steps or config.epochs * per_epoch

    # Setup: what learns.
    torch.manual_seed(config.seed)
    model, seeds = _with_adapter(bare, method, config, base)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ranks.same_everywhere(parameters.values())
    compute = _compute(model, method, config, ranks, seeds)
    gradient = _Gradient(list(parameters.values()))
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    _check_loss(compute, examples[0])

    # Setup: where it stands.
    saver = None
    if checkpoints is not None:
        prefix = f"checkpoints/{sha256_json([inputs, made])[:12]}"
        saver = Checkpoints(open_store(checkpoints, PATIENCE), prefix, inputs, made, config.keep_checkpoints)
    now = _Standing()
    _resume(now, saver, ranks, parameters, optimiser, variant)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimiser,
        math.ceil(config.warmup_ratio * total),
        total,
        min_lr_rate=config.min_lr_ratio,
        last_epoch=now.step - 1,
    )
    metrics = Metrics(variant, ranks.rank == 0)
    if ranks.rank == 0:
        log.info(
            "%s: %d papers as %d documents, %d steps on %d %s (%s, %s attention, %d tokens at once, %d layers "
            "checkpointed)",
            variant, len(papers), len(examples), total, ranks.world, ranks.device.type, config.precision,
            kernel(ranks.device), compute.tokens, compute.checkpointed,
        )  # fmt: skip

    # The loop.
    with progress(variant, total, "steps") as ticker:
        ticker.done = now.step
        while True:
            if (now.step % per_epoch == 0 or now.step == total) and not now.measured():
                started = time.monotonic()
                perplexity, stopped = _validate(compute, validation, ranks, stop)
                if stopped:
                    _interrupt(now, saver, config, ranks, parameters, optimiser, variant)
                epoch = round(now.step / per_epoch, 4)
                now.validation.append({"step": now.step, "epoch": epoch, "perplexity": perplexity})
                now.validating += time.monotonic() - started
                metrics.validated(perplexity)
            if now.step == total:
                break

            started = time.monotonic()
            batch = global_batch(examples, config.global_batch_size, now.step, config.seed)
            loss, stopped = _gradient_of(batch, now.step, compute, gradient, ranks, stop)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _diverged(variant, now.step, loss, norm, batch, saver, config)
            rate = schedule.get_last_lr()[0]
            optimiser.step()
            schedule.step()
            now.after_step(loss, rate, sum(len(d.tokens) for d in batch), time.monotonic() - started)

            ticker.advance(loss=loss, lr=rate)
            metrics.stepped(now.step, total, loss, rate, now.tokens, now.seconds, saver)
            if stopped:
                _interrupt(now, saver, config, ranks, parameters, optimiser, variant)
            if saver is not None and ranks.rank == 0 and not saver.busy and now.save_is_due(config):
                saver.save(_snapshot(now, parameters, optimiser))
                now.saved()

    # The end: seal the adapter, put it into the store, drop the checkpoints.
    if ranks.rank > 0:
        ranks.wait()
        return None
    stats = {
        **now.stats(),
        "train_tokens": now.tokens,
        "tokens_per_second": now.tokens / max(now.seconds, 1e-9),
        "papers": len(papers),
        "documents": len(examples),
        "papers_longer_than_context": cut,
        "context": context,
        "steps": total,
        "peak_memory_bytes": _peak_memory(ranks.device),
        "attention": kernel(ranks.device),
        "devices": ranks.world,
        "hardware": hardware(ranks.device),
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": compute.tokens,
        "checkpointed_layers": compute.checkpointed,
        "settings": config.model_dump(mode="json"),
    }
    with write_artifact(out, "adapter", inputs, made) as folder:
        _write_adapter(model, base, folder.path)
        (folder.path / "curve.json").write_text(json.dumps(now.curve(), indent=1))
        folder.stats |= stats
    manifest = open_artifact(out, "adapter")
    if saver is not None:
        saver.wait(threading.TIMEOUT_MAX)
        push(saver.store, out, "adapter")
        saver.clear()
    metrics.finished(stats)
    log.info("%s: done, %s tokens in %.0f s, sealed as %s", variant, f"{now.tokens:,}", now.seconds, out)
    ranks.wait()
    return manifest


# Setup


@dataclass
class _Ranks:
    """The processes that train together, one to a device."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` of all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """`values` of every process, in the order of the ranks."""
        if self.world == 1:
            return [values]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(parts, values)
        return parts

    def same_everywhere(self, tensors: Iterator[torch.Tensor] | Any) -> None:
        """Give every process the first one's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def told(self, value: Any) -> Any:
        """The first process's `value`, in every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def _ranks(config: TrainConfig) -> Iterator[_Ranks]:
    """Join the process group that the launcher's environment describes; refuse another size than was asked for."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if world != config.devices:
        raise UserError(
            f"devices is {config.devices}, but {world} processes were started: start the training through "
            "feyntune.training.launch, which starts one to a device."
        )
    cuda = config.device == "cuda" or (config.device == "auto" and best_device().type == "cuda")
    if cuda and torch.cuda.device_count() < world:
        raise UserError(f"devices is {world}, but this machine has {torch.cuda.device_count()} GPUs: lower it.")
    if cuda and config.deterministic:
        raise UserError("deterministic training runs on CPUs only: set device to cpu, or deterministic to false.")
    if config.compile and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise UserError("compile needs a C compiler when it runs, and the images hold none: set compile to false.")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    threads = config.threads or (1 if config.deterministic else None)
    if threads is not None:
        torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(config.deterministic)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield _Ranks(rank, world, device)
    finally:
        if joined:
            dist.destroy_process_group()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. The loop looks at it after every step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _context(model: PreTrainedModel, config: TrainConfig, base: str) -> int:
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    if not context:
        raise UserError(f"Base model {base}: its config.json names no max_position_embeddings; add it.")
    if config.max_length is not None and config.max_length > context:
        raise UserError(f"max_length is {config.max_length}, the base model's context {context}: lower max_length.")
    return config.max_length or context


def _with_adapter(
    model: PreTrainedModel, method: str, config: TrainConfig, base: str
) -> tuple[PeftModel, DropoutSeeds]:
    """The base with a fresh adapter in fp32. Nothing else is cast: embeddings and head keep their precision."""
    names = model.config.architectures or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise UserError(
            f"Base model {base} is a {', '.join(names) or 'model of no kind'}, not a causal language model."
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=TARGETS[method],
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, lora)
    except ValueError as e:
        raise UserError(
            f"Base model {base} has no layers named {', '.join(TARGETS[method])}: {method} needs them."
        ) from e
    for module in peft.modules():
        # Else peft copies each input to fp32 before autocast makes it bf16 again.
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return peft, use_document_dropout(peft, config.lora_dropout)


@dataclass
class _Compute:
    """How micro-batches are computed."""

    model: PeftModel
    device: torch.device
    seeds: DropoutSeeds
    seed: int
    slots: int | None  # of deterministic mode
    tokens: int  # most tokens at once
    words: int  # of the vocabulary whose logits exist at once
    autocast: bool  # bf16 products of fp32 adapters
    checkpointed: int  # layers

    def loss(self, packed: Packed) -> torch.Tensor:
        """Sum of the loss over the predicted tokens, in nats."""
        packed = packed.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = hidden_states(self.model, packed)
        labels = packed.labels[0]
        real = labels != IGNORE
        return frozen_head_loss(hidden[real], head(self.model), labels[real], self.words)


def _compute(model: PeftModel, method: str, config: TrainConfig, ranks: _Ranks, seeds: DropoutSeeds) -> _Compute:
    cuda = ranks.device.type == "cuda"
    plan = plan_memory(model, method, config, ranks.device)
    if plan.layers:
        # Without reentry the inputs need no gradient of their own, so the embeddings stay as they are.
        bare: Any = model.get_base_model()
        bare.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "self_attn")]
        for layer in layers[plan.layers :]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
    if config.compile:
        for layer in backbone(model).layers:  # type: ignore[union-attr]
            for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):  # type: ignore[union-attr]
                part.compile(dynamic=True)  # type: ignore[operator,union-attr]
    return _Compute(
        model=model,
        device=ranks.device,
        seeds=seeds,
        seed=config.seed,
        slots=config.deterministic_shards if config.deterministic else None,
        tokens=plan.tokens,
        words=config.vocab_chunk_size or (GPU_WORDS if cuda else WORDS),
        autocast=config.precision == "bf16" or (cuda and config.precision == "nf4"),
        checkpointed=plan.layers,
    )


def _check_loss(compute: _Compute, document: Document) -> None:
    """The loss through backbone and bare head must be the model's own: some models scale or cap their logits."""
    packed = pack([document.tokens[:32]]).to(compute.device)
    compute.model.eval()
    with torch.no_grad(), torch.autocast(compute.device.type, torch.bfloat16, enabled=compute.autocast):
        causal = compute.model.get_base_model()
        out = causal(
            input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, lengths=packed.lengths
        )
        own = torch.nn.functional.cross_entropy(out.logits[0].float(), packed.labels[0], reduction="sum").item()
        ours = compute.loss(packed).item()
    if not math.isclose(own, ours, rel_tol=0.02):
        raise UserError(
            f"The base model computes another loss ({own:.4f}) than its hidden states and output head give "
            f"({ours:.4f}): it changes its logits in a way this engine does not know; choose another base."
        )


# The loop


@dataclass
class _Standing:
    """Where the training stands. What is in `curve` and `step` is a function of the training alone."""

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # in steps
    validating: float = 0.0  # seconds
    interruptions: int = 0
    saved_step: int = 0
    saved_time: float = field(default_factory=time.monotonic)

    def measured(self) -> bool:
        return any(entry["step"] == self.step for entry in self.validation)

    def after_step(self, loss: float, rate: float, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.losses.append(round(loss, 6))
        self.rates.append(float(f"{rate:.6g}"))
        self.seconds += seconds

    def save_is_due(self, config: TrainConfig) -> bool:
        steps, seconds = config.save_every_steps, config.save_every_seconds
        return (steps is not None and self.step - self.saved_step >= steps) or (
            seconds is not None and time.monotonic() - self.saved_time >= seconds
        )

    def saved(self) -> None:
        self.saved_step, self.saved_time = self.step, time.monotonic()

    def curve(self) -> dict[str, Any]:
        """What travels with the adapter: the loss in nats a token, the learning rate, validation perplexity."""
        return {"loss": self.losses, "learning_rate": self.rates, "validation": self.validation}

    def stats(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds + self.validating,
            "step_seconds": self.seconds,
            "validation_seconds": self.validating,
            "interruptions": self.interruptions,
        }


class _Gradient:
    """The gradient of all adapter weights as one row, with the step's loss and the wish to stop at its end."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        self.row = torch.zeros(sum(p.numel() for p in parameters) + 2, device=parameters[0].device)
        start = 0
        for p in parameters:
            p.grad = self.row[start : start + p.numel()].view_as(p)  # backward adds into the row
            start += p.numel()


def _gradient_of(
    batch: Sequence[Document], step: int, compute: _Compute, gradient: _Gradient, ranks: _Ranks, stop: threading.Event
) -> tuple[float, bool]:
    """Leave the gradient of the whole global batch in every process; returns its mean loss and whether to stop.

    In the normal mode each process computes one part of the batch and all-reduce adds them in an order of its own.
    In deterministic mode the batch has a fixed number of parts (slots), whoever computes them, and their gradients
    are added in the slots' order.
    """
    row = gradient.row
    parts = divide([len(d.tokens) for d in batch], compute.slots or ranks.world)
    count = predicted(batch)
    rows = []
    compute.model.train()
    for places in parts[ranks.rank :: ranks.world]:
        row.zero_()
        for group in budgeted([len(batch[i].tokens) for i in places], compute.tokens):
            chosen = [places[i] for i in group]
            packed = pack([batch[i].tokens for i in chosen])
            compute.seeds.set(packed.lengths, document_seeds(compute.seed, step, chosen))
            loss = compute.loss(packed) / count
            loss.backward()
            row[-2] += loss.detach()
        if compute.slots:
            rows.append(row.clone())
    if compute.slots:
        gathered = ranks.gather(torch.stack(rows))
        row.zero_()
        for slot in range(compute.slots):
            row += gathered[slot % ranks.world][slot // ranks.world]
    row[-1] = float(stop.is_set())
    if compute.slots:
        ranks.sum(row[-1:])
    else:
        ranks.sum(row)
    loss, wish = row[-2:].tolist()
    return loss, wish > 0


def _validate(
    compute: _Compute, papers: Sequence[Document], ranks: _Ranks, stop: threading.Event
) -> tuple[float | None, bool]:
    """Perplexity a token of the validation papers, BOS and EOS as in training; and whether to stop.

    Groups are fixed and their sums added in order, so that the figure does not depend on the devices.
    """
    if not papers:
        return None, False
    lengths = [len(d.tokens) for d in papers]
    order = sorted(range(len(papers)), key=lambda i: -lengths[i])
    groups = budgeted([lengths[i] for i in order], compute.tokens)
    sums = torch.zeros(len(groups), dtype=torch.float64, device=ranks.device)
    compute.model.eval()
    for first in range(0, len(groups), ranks.world):
        mine = first + ranks.rank
        if mine < len(groups):
            with torch.no_grad():
                sums[mine] = compute.loss(pack([papers[order[i]].tokens for i in groups[mine]])).double()
        wish = torch.tensor([float(stop.is_set())], device=ranks.device)
        if ranks.sum(wish).item() > 0:
            return None, True
    ranks.sum(sums)  # every entry is zero in all processes but one, so this adds nothing in any order
    return math.exp(math.fsum(sums.tolist()) / predicted(papers)), False


def _diverged(
    variant: str,
    step: int,
    loss: float,
    norm: float,
    batch: Sequence[Document],
    saver: Checkpoints | None,
    config: TrainConfig,
) -> UserError:
    kept = ""
    if saver is not None:
        saver.wait(config.save_deadline)
        kept = f" The checkpoint of step {saver.newest_step} is kept." if saver.newest_step is not None else ""
    return UserError(
        f"Training of {variant} diverged at step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, in the batch "
        f"of papers {', '.join(sorted({d.id for d in batch}))}. Lower learning_rate, or set precision to bf16.{kept}"
    )


# Stopping and going on


def _snapshot(now: _Standing, parameters: dict[str, torch.nn.Parameter], optimiser: torch.optim.AdamW) -> State:
    """A copy of the whole state on the CPU."""
    tensors = {}
    for name, p in parameters.items():
        tensors[f"adapter.{name}"] = p.detach().to("cpu", copy=True)
        moments = optimiser.state.get(p, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in moments:
                tensors[f"{moment}.{name}"] = moments[moment].to("cpu", copy=True)
    curve = {
        **now.curve(),
        "validation": list(now.validation),
        "loss": list(now.losses),
        "learning_rate": list(now.rates),
    }
    return State(now.step, tensors, {"step": now.step, "tokens": now.tokens, **curve}, now.stats())


def _resume(
    now: _Standing,
    saver: Checkpoints | None,
    ranks: _Ranks,
    parameters: dict[str, torch.nn.Parameter],
    optimiser: torch.optim.AdamW,
    variant: str,
) -> None:
    """Go on from the newest checkpoint that holds; the first process reads it, the others get it from there."""
    state = saver.newest() if saver is not None and ranks.rank == 0 else None
    found = ranks.told(None if state is None else (state.progress, state.stats))
    if found is None:
        return
    saved, stats = found
    now.step, now.tokens = saved["step"], saved["tokens"]
    now.losses, now.rates, now.validation = saved["loss"], saved["learning_rate"], saved["validation"]
    now.seconds, now.validating = stats["step_seconds"], stats["validation_seconds"]
    now.interruptions = stats["interruptions"] + 1
    now.saved()
    for name, p in parameters.items():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        if state is not None:
            p.data.copy_(state.tensors[f"adapter.{name}"])
            for moment, value in moments.items():
                value.copy_(state.tensors[f"{moment}.{name}"])
        ranks.same_everywhere([p, *moments.values()])
        optimiser.state[p] = {"step": torch.tensor(float(now.step)), **moments}
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]  # what a schedule that starts in the middle reads
    log.info("%s: goes on from step %d", variant, now.step)


def _interrupt(
    now: _Standing,
    saver: Checkpoints | None,
    config: TrainConfig,
    ranks: _Ranks,
    parameters: dict[str, torch.nn.Parameter],
    optimiser: torch.optim.AdamW,
    variant: str,
) -> None:
    """Save within the deadline and end. The other processes wait for the first, whose end would end them too."""
    kept = "nothing is kept, because no place for checkpoints was given"
    if saver is not None and ranks.rank == 0:
        ends = time.monotonic() + config.save_deadline
        if saver.wait(ends - time.monotonic()) and saver.newest_step != now.step and now.step > 0:
            saver.save(_snapshot(now, parameters, optimiser))
            saver.wait(ends - time.monotonic())
        kept = f"step {saver.newest_step} is saved" if saver.newest_step is not None else "nothing was saved yet"
    ranks.wait()
    raise Interrupted(f"Training of {variant} was stopped after step {now.step}; {kept}. Start it again to go on.")


# The end


def _write_adapter(model: PeftModel, base: str, folder: Path) -> None:
    """The adapter as peft loads it, in 16 bits: fp16, whose ten bits of mantissa bf16 does not have."""
    weights = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in sorted(get_peft_model_state_dict(model).items())
    }
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError("The adapter's weights are too large for 16 bits: the training diverged, lower learning_rate.")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    location = split_pin(base)[0]
    settings = model.peft_config["default"].to_dict()  # type: ignore[union-attr,index]
    settings |= {
        "base_model_name_or_path": Path(location).name if Path(location).is_dir() else location,
        "revision": None,
        "inference_mode": True,
    }
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=1, sort_keys=True, default=str))


def hardware(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU what was allocated at most, of a CPU process its largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
