"""Useful tokens per second of this training engine and of the baseline, on one model, data and machine.

    python -m benchmarks.train [--precision fp32|bf16|nf4] [--rounds 5] [--steps 2] [--dropout 0] [--json]

The baseline is transformers' Trainer with padded random batches of 16 (DataCollatorForSeq2Seq, multiples of 8).
Both train a Llama with random weights on the same global batches, documents as long as real hep-th abstracts
(log-normal, mean 185 tokens, coefficient of variation 0.5; on the 1,000 real ones it was 185 and 0.49). Rounds are
interleaved and change their order; on one CPU thread process CPU time counts, because the machine may be shared, on
a GPU or several threads wall time. Padding does not count. With dropout 0 the losses of each step are compared, too.
MFU is useful tokens per second times 4N FLOPs over the device's peak; hardware FLOPs utilization counts recomputation.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from feyntune.model.load import load_base
from feyntune.model.packed import attention_backend
from feyntune.training.batches import Document
from feyntune.training.config import TARGETS, TrainConfig
from feyntune.training.distributed import ProcessGroup
from feyntune.training.estimate import HARDWARE, flops_per_token
from feyntune.training.memory import LLAMA_8B, Shape
from feyntune.training.results import hardware
from feyntune.training.runner import add_adapter, make_runner
from feyntune.training.train import accumulate_gradients, flat_gradient

BATCH = 16


def make_model(folder: Path, args: argparse.Namespace) -> Shape:
    """A Llama with random weights, saved for both sides to load."""
    if args.shape_8b:
        shape = LLAMA_8B
    else:
        shape = Shape(args.hidden, 3 * args.hidden, args.layers, args.hidden // 32, args.hidden // 128, 4096)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.shape_8b else torch.float32)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1024,
    )
    with torch.device(args.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return shape


def device_of(args: argparse.Namespace) -> torch.device:
    """With its number: accelerate refuses to train a quantized model that was loaded on a GPU without one."""
    return torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)


def make_batches(count: int, vocabulary: int, seed: int = 0) -> list[list[Document]]:
    """Global batches of random tokens, each document as long as a real abstract."""
    r = random.Random(seed)
    sigma = math.sqrt(math.log(1 + 0.5**2))
    mu = math.log(185) - sigma**2 / 2

    def document(i: int) -> Document:
        n = min(max(round(r.lognormvariate(mu, sigma)), 20), 571)
        return Document(str(i), [r.randrange(3, vocabulary) for _ in range(n)])

    return [[document(s * BATCH + i) for i in range(BATCH)] for s in range(count)]


def mfu_hfu(shape: Shape, rate: float, recomputing: int, device: str) -> dict[str, float]:
    """Shares of a GPU's dense bf16 peak: of 4N FLOPs a token, and with what is recomputed; nothing on a CPU."""
    card = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    peak = next((h.flops for h in HARDWARE.values() if h.name.split("-")[0] in card), None)
    if not card or peak is None:
        return {}
    shares = {"mfu": flops_per_token(shape, 0), "hfu": flops_per_token(shape, recomputing)}
    return {name: round(rate * flops / peak, 4) for name, flops in shares.items()}


class Engine:
    """This project's steps."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.config = TrainConfig(
            precision=args.precision,
            lora_dropout=args.dropout,
            activation_checkpointing_layers=args.checkpoint_layers,
            learning_rate=3e-4,
        )
        self.group = ProcessGroup(0, 1, device_of(args))
        base = load_base(str(folder), args.precision, self.group.device)
        torch.manual_seed(0)
        model, masks = add_adapter(base, args.method, self.config, "base")
        self.model = model
        self.runner = make_runner(model, masks, args.method, self.config, self.group.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradient = flat_gradient(self.parameters)
        fused = self.group.device.type == "cuda" or None
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=3e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=fused
        )
        self.step = 0

    def train(self, batches: list[list[Document]], clock) -> tuple[float, list[float]]:
        """(seconds, loss of each step)."""
        losses, stop = [], threading.Event()
        started = clock()
        for batch in batches:
            accumulate_gradients(batch, self.step, self.config, self.runner, self.gradient, self.group, stop)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            losses.append(self.gradient[-2].item())
        return clock() - started, losses


class Baseline:
    """The published recipe's way: Trainer, padded batches."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        from peft import LoraConfig, get_peft_model

        self.args, self.device = args, device_of(args)
        # Their usual attention: FlashAttention where it is installed.
        flash = self.device.type == "cuda" and args.precision != "fp32" and find_spec("flash_attn") is not None
        self.attention = "flash_attention_2" if flash else "sdpa"
        base = load_base(str(folder), args.precision, self.device, attention=self.attention)
        torch.manual_seed(0)
        lora = LoraConfig(
            r=8, lora_alpha=32, lora_dropout=args.dropout, target_modules=TARGETS[args.method], task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, lora)
        if args.checkpoint_layers == "all":
            self.model.enable_input_require_grads()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=3e-4,
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.1,
        )

    def train(self, batches: list[list[Document]], clock) -> tuple[float, list[float]]:
        from tokenizers import Tokenizer, models

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
        losses: list[float] = []
        times: list[float] = []

        class Watch(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                times.append(clock())

            def on_train_end(self, *_: Any, **__: Any) -> None:
                times.append(clock())

            def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any, **__: Any):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        rows = [{"input_ids": d.tokens, "labels": d.tokens} for b in batches for d in b]
        # Both sides compute in bf16 under autocast, but NF4 on a CPU, where fp32 is the faster of the two.
        bf16 = self.args.precision == "bf16" or (self.args.precision == "nf4" and self.device.type == "cuda")
        precision = {"bf16": True} if bf16 else {}
        with tempfile.TemporaryDirectory() as tmp:
            arguments = TrainingArguments(
                output_dir=tmp,
                per_device_train_batch_size=BATCH,
                max_steps=len(batches),
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=self.device.type == "cpu",
                disable_tqdm=True,
                gradient_checkpointing=self.args.checkpoint_layers == "all",
                **precision,
            )
            arguments._n_gpu = min(arguments.n_gpu, 1)  # on a machine with two, DataParallel would take two batches
            trainer = InOrder(
                model=self.model,
                args=arguments,
                train_dataset=rows,
                data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
                optimizers=(self.optimizer, None),
                callbacks=[Watch()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return times[1] - times[0], losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16", "nf4"), default="fp32")
    parser.add_argument("--method", choices=tuple(TARGETS), default="lora-all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each side in each round")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--shape-8b", action="store_true", help="the shape of Llama-3.1-8B")
    parser.add_argument("--recompute", action="store_true", help="all layers, on both sides")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.checkpoint_layers = "auto"
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    cuda = args.device.startswith("cuda")

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.perf_counter() if args.threads > 1 else time.process_time()

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        shape = make_model(folder, args)
        if args.recompute:
            args.checkpoint_layers = shape.layers
        engine = Engine(folder, args)
        args.checkpoint_layers = "all" if args.recompute else "auto"
        trainer = Baseline(folder, args)
        batches = make_batches((args.rounds + 1) * args.steps, shape.vocabulary)

        def peak() -> int:
            return torch.cuda.max_memory_allocated() if cuda else 0

        figures: dict[str, dict[str, list[float]]] = {
            name: {"seconds": [], "losses": [], "peak": []} for name in ("engine", "trainer")
        }
        for i in range(args.rounds + 1):  # the first round warms up and is compared, not timed
            part = batches[i * args.steps : (i + 1) * args.steps]
            sides = [("engine", engine), ("trainer", trainer)]
            for name, side in sides if i % 2 else sides[::-1]:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                seconds, losses = side.train(part, clock)  # type: ignore[attr-defined]
                figures[name]["losses"] += losses
                figures[name]["peak"].append(peak())
                if i:
                    figures[name]["seconds"].append(seconds)

    useful = [sum(len(d.tokens) for d in b) for b in batches]
    tokens = [sum(useful[i : i + args.steps]) for i in range(args.steps, len(batches), args.steps)]
    rows = [BATCH * (-(-max(len(d.tokens) for d in b) // 8) * 8) for b in batches]
    padded = sum(rows) / sum(useful)
    ratios = [t / o for t, o in zip(figures["trainer"]["seconds"], figures["engine"]["seconds"], strict=True)]
    result: dict[str, Any] = {
        "benchmark": "train",
        "hardware": hardware(torch.device(args.device)),
        "clock": "wall" if cuda or args.threads > 1 else "process CPU",
        "threads": args.threads,
        "model": {"hidden": shape.hidden, "layers": shape.layers, "vocabulary": shape.vocabulary},
        "precision": args.precision,
        "method": args.method,
        "dropout": args.dropout,
        "attention": attention_backend(args.device, torch.float32 if args.precision == "fp32" else torch.bfloat16),
        "checkpointed_layers": engine.runner.plan.layers,
        "trainer_attention": trainer.attention,
        "padded_over_useful": round(padded, 3),
        "rounds": args.rounds,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(x, 3) for x in ratios],
    }
    for name, figure in figures.items():
        rate = statistics.median(n / s for n, s in zip(tokens, figure["seconds"], strict=True))
        result[name] = {"useful_tokens_per_second": round(rate, 1), "losses": [round(x, 6) for x in figure["losses"]]}
        if cuda:
            result[name]["peak_memory_bytes"] = max(figure["peak"])
        layers = shape.layers if args.recompute else 0
        recomputing = engine.runner.plan.layers if name == "engine" else layers
        result[name] |= mfu_hfu(shape, rate, recomputing, args.device)
    if args.dropout == 0:
        pairs = zip(figures["engine"]["losses"], figures["trainer"]["losses"], strict=True)
        result["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['hardware']}, {args.threads} thread(s), {result['clock']} time, {args.precision}, {args.method}")
    for name in ("trainer", "engine"):
        print(f"{name:>8}  {result[name]['useful_tokens_per_second']:10,.1f} useful tokens/s")
    print(f"   ratio  {result['ratio']:.2f} (rounds: {', '.join(map(str, result['ratios']))})")
    if "largest_loss_difference" in result:
        print(f"  losses  differ by at most {result['largest_loss_difference']:.1e}")


if __name__ == "__main__":
    main()
