"""The training recipe: a base model and a mixture in, a LoRA adapter out. Read it from top to bottom.

The unit is the global batch, 16 abstracts by default. It is divided among the devices by tokens and packed without
padding, and its loss is divided by the predicted tokens of the whole batch, so the optimizer sees the same gradient
on one device or three, before and after an interruption. There is no Trainer class: setup, loop, save.

transformers and bitsandbytes load the base, peft makes the adapter. The process group is torch's own: the gradient of
an adapter is one small buffer, for which one all-reduce a step does what DDP's wrapper would.
"""

import errno
import json
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from feyntune.artifacts.artifact import Manifest, open_artifact, sha256_json, write_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.errors import UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.model.load import check_vocab_size, load_base, load_tokenizer
from feyntune.model.packed import attention_backend, group_by_token_budget, pack
from feyntune.telemetry import log, progress
from feyntune.training.batches import (
    Document,
    divide,
    documents,
    global_batch,
    largest_micro_batch,
    predicted,
    read_mixture,
)
from feyntune.training.checkpoints import Checkpointer
from feyntune.training.config import TrainConfig, adapter_metadata
from feyntune.training.distributed import ProcessGroup, init_process_group, stop_signals
from feyntune.training.dropout import document_seeds
from feyntune.training.memory import GPU_TOKENS
from feyntune.training.metrics import Metrics
from feyntune.training.results import hardware, peak_memory, write_adapter
from feyntune.training.runner import MicroBatchRunner, add_adapter, make_runner
from feyntune.training.state import TrainState, interrupt, resume, snapshot
from feyntune.variants import METHODS

STORE_TRIES = 8  # tries of a request to the store: two minutes, so a store may be away for one


def train(
    data: str | Path,
    mixture: str,
    method: str,
    base: str,
    out: str | Path,
    config: TrainConfig,
    checkpoints: str | None = None,
) -> Manifest | None:
    """Train one adapter into `out` (kind `adapter`). With several devices, every process calls this.

    Args:
        data: a `split` artifact.
        base: the base model, pinned or not.
        checkpoints: an address in a store for checkpoints and for the finished adapter; none are saved without it.

    Returns:
        The adapter's manifest; None in processes other than the first.

    Raises:
        Interrupted: SIGTERM or SIGINT came; the state is saved, and the same call resumes.
        UserError: the input cannot be trained on, the loss diverged, or the disk is full.
    """
    with stop_signals() as stop:
        try:
            group = init_process_group(config)
            return _train(data, mixture, method, base, out, config, checkpoints, group, stop)
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
    group: ProcessGroup,
    stop: threading.Event,
) -> Manifest | None:
    # Setup: documents.
    if method not in METHODS:
        raise UserError(f"Method {method!r} is unknown: choose one of {', '.join(METHODS)}.")
    variant = f"{mixture}/{method}"
    split = open_artifact(data, "split")
    base = pin_base(base)
    inputs = {"split": split.digest, "base": str(split_pin(base)[1])}
    metadata = adapter_metadata(config, mixture, method)
    papers = read_mixture(data, mixture, "train")
    tokenizer = load_tokenizer(base)
    if group.rank == 0:
        log.info("%s: loading the base model in %s", variant, config.precision)
    base_model = load_base(base, config.precision, group.device)
    check_vocab_size(base_model, tokenizer, base)
    context = _context(base_model, config, base)
    examples, too_long = documents(papers, tokenizer, context)
    validation, _ = documents(read_mixture(data, mixture, "validation", config.validation_papers), tokenizer, context)
    per_epoch = math.ceil(len(examples) / config.global_batch_size)
    total = config.max_steps or config.epochs * per_epoch

    # Setup: adapter, memory, optimizer.
    torch.manual_seed(config.seed)
    model, masks = add_adapter(base_model, method, config, base)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    group.broadcast(parameters.values())
    gradient = flat_gradient(list(parameters.values()))
    cuda = group.device.type == "cuda"
    largest: list[Document] = []
    if cuda:
        budget = config.micro_batch_tokens or GPU_TOKENS
        largest = largest_micro_batch(examples, config.global_batch_size, total, config.seed, group.world_size, budget)
    runner = make_runner(model, masks, method, config, group.device, sum(len(d.tokens) for d in largest) or None)
    runner.check_loss(examples[0])
    runner.probe(largest, gradient)
    probed = peak_memory(group.device)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=cuda or None,
    )

    # Setup: resume.
    checkpointer = None
    if checkpoints is not None:
        prefix = f"checkpoints/{sha256_json([inputs, metadata])[:12]}"
        store = open_store(checkpoints, STORE_TRIES)
        checkpointer = Checkpointer(store, prefix, inputs, metadata, config.keep_checkpoints)
    state = TrainState()
    resume(state, checkpointer, group, parameters, optimizer, variant)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        math.ceil(config.warmup_ratio * total),
        total,
        min_lr_rate=config.min_lr_ratio,
        last_epoch=state.step - 1,
    )
    metrics = Metrics(variant, group.rank == 0)
    attention = attention_backend(group.device, torch.float32 if config.precision == "fp32" else torch.bfloat16)
    if group.rank == 0:
        log.info(
            "%s: %d papers as %d documents, %d steps on %d %s (%s, %s attention, at most %d tokens at once, %d layers "
            "recompute in the largest micro-batch)",
            variant, len(papers), len(examples), total, group.world_size, group.device.type, config.precision,
            attention, runner.plan.micro_batch_tokens, runner.plan.layers,
        )  # fmt: skip

    # The loop.
    with progress(variant, total, "steps", done=state.step) as progress_logger:
        while True:
            if (state.step % per_epoch == 0 or state.step == total) and not state.is_validated():
                started = time.monotonic()
                perplexity, stopped = validate(runner, validation, group, stop)
                if stopped:
                    interrupt(state, checkpointer, config, group, parameters, optimizer, variant)
                epoch = round(state.step / per_epoch, 4)
                state.validation.append({"step": state.step, "epoch": epoch, "perplexity": perplexity})
                state.validation_seconds += time.monotonic() - started
                metrics.validated(perplexity)
            if state.step == total:
                break

            started = time.monotonic()
            batch = global_batch(examples, config.global_batch_size, state.step, config.seed)
            accumulate_gradients(batch, state.step, config, runner, gradient, group, stop)
            norm_tensor = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            # The only values that the host waits for in a step.
            loss, stopped, norm = torch.stack((*gradient[-2:], norm_tensor)).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise _diverged(variant, state.step, loss, norm, batch, checkpointer, config)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            state.add_step(loss, learning_rate, sum(len(d.tokens) for d in batch), time.monotonic() - started)

            progress_logger.advance(loss=loss, lr=learning_rate)
            metrics.stepped(state.step, total, loss, learning_rate, state.tokens, state.step_seconds, checkpointer)
            if stopped:
                interrupt(state, checkpointer, config, group, parameters, optimizer, variant)
            if checkpointer is not None and group.rank == 0 and not checkpointer.busy and state.save_is_due(config):
                checkpointer.save(snapshot(state, parameters, optimizer))
                state.mark_saved()

    # The end: nothing below needs the other processes, so that none of them waits for the store.
    group.leave()
    if group.rank > 0:
        return None
    stats = {
        **state.stats(),
        "train_tokens": state.tokens,
        "tokens_per_second": state.tokens / max(state.step_seconds, 1e-9),
        "papers": len(papers),
        "documents": len(examples),
        "papers_longer_than_context": too_long,
        "context": context,
        "steps": total,
        "peak_memory_bytes": peak_memory(group.device),
        "probed_memory_bytes": probed,
        "planned_memory_bytes": round(runner.plan.bytes),
        "attention": attention,
        "devices": group.world_size,
        "hardware": hardware(group.device),
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": runner.plan.micro_batch_tokens,
        "checkpointed_layers": runner.plan.layers,
        "settings": config.model_dump(mode="json"),
    }
    with write_artifact(out, "adapter", inputs, metadata) as folder:
        write_adapter(model, base, folder.path)
        (folder.path / "curve.json").write_text(json.dumps(state.curve(), indent=1), encoding="utf-8")
        folder.stats |= stats
    manifest = open_artifact(out, "adapter")
    if checkpointer is not None:
        checkpointer.wait(threading.TIMEOUT_MAX)
        push(checkpointer.store, out, "adapter")
        checkpointer.clear()
    metrics.finished(stats)
    log.info("%s: done, %s tokens in %.0f s, written to %s", variant, f"{state.tokens:,}", state.step_seconds, out)
    return manifest


def flat_gradient(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One buffer for the gradients of all `parameters`, then the step's loss, then whether to stop.

    The parameters' gradients become views of it: backward adds into the buffer, and one all-reduce covers everything.
    """
    buffer = torch.zeros(sum(p.numel() for p in parameters) + 2, device=parameters[0].device)
    start = 0
    for p in parameters:
        p.grad = buffer[start : start + p.numel()].view_as(p)
        start += p.numel()
    return buffer


def accumulate_gradients(
    batch: Sequence[Document],
    step: int,
    config: TrainConfig,
    runner: MicroBatchRunner,
    gradient: torch.Tensor,
    group: ProcessGroup,
    stop: threading.Event,
) -> None:
    """Leave the gradient of the whole global batch in every process: each computes one part of the batch.

    Args:
        gradient: the flat buffer; its last two values become the batch's mean loss and how many processes shall stop.
    """
    own = divide([len(d.tokens) for d in batch], group.world_size)[group.rank]
    gradient.zero_()
    seeds = document_seeds(config.seed, step, own)
    runner.backward([batch[i] for i in own], seeds, predicted(batch), gradient)
    gradient[-1] = float(stop.is_set())
    group.all_reduce(gradient)


def validate(
    runner: MicroBatchRunner, papers: Sequence[Document], group: ProcessGroup, stop: threading.Event
) -> tuple[float | None, bool]:
    """Perplexity per token of the validation papers, BOS and EOS as in training; and whether to stop.

    Groups are fixed and their sums added in order, so that the figure does not depend on the number of devices.
    """
    if not papers:
        return None, False
    lengths = [len(d.tokens) for d in papers]
    order = sorted(range(len(papers)), key=lambda i: -lengths[i])
    groups = group_by_token_budget([lengths[i] for i in order], runner.plan.micro_batch_tokens)
    sums = torch.zeros(len(groups), dtype=torch.float64, device=group.device)
    runner.model.eval()
    for first in range(0, len(groups), group.world_size):
        own = first + group.rank
        if own < len(groups):
            with torch.no_grad():
                sums[own] = runner.loss(pack([papers[order[i]].tokens for i in groups[own]])).double()
        stop_requested = torch.tensor([float(stop.is_set())], device=group.device)
        if group.all_reduce(stop_requested).item() > 0:
            return None, True
    group.all_reduce(sums)  # every entry is zero in all processes but one, so the order of the addition is irrelevant
    return math.exp(math.fsum(sums.tolist()) / predicted(papers)), False


def _context(model: PreTrainedModel, config: TrainConfig, base: str) -> int:
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    if not context:
        raise UserError(f"Base model {base}: its config.json names no max_position_embeddings; add it.")
    if config.max_length is not None and config.max_length > context:
        raise UserError(f"max_length is {config.max_length}, the base model's context {context}: lower max_length.")
    return config.max_length or context


def _diverged(
    variant: str,
    step: int,
    loss: float,
    norm: float,
    batch: Sequence[Document],
    checkpointer: Checkpointer | None,
    config: TrainConfig,
) -> UserError:
    newest = ""
    if checkpointer is not None:
        checkpointer.wait(config.save_deadline)
        if checkpointer.newest_step is not None:
            newest = f" The checkpoint of step {checkpointer.newest_step} is kept."
    return UserError(
        f"Training of {variant} diverged at step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}, in the batch "
        f"of papers {', '.join(sorted({d.id for d in batch}))}. Lower learning_rate, or set precision to bf16.{newest}"
    )
