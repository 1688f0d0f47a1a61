"""What only a card can tell, in one command of about fifteen minutes:

    python -m benchmarks.gpu [--out FILE] [--only speed,losses,faults]
    python -m benchmarks.gpu --tiny          the same code on a CPU with a tiny model, in a minute: figures mean nothing

- speed: for NF4 and bf16, at 1,100, 3,300 and 4,400 tokens at once, with and without recomputation: useful tokens a
  second, MFU (4N FLOPs a token), hardware FLOPs utilization, peak memory against the plan, and whether a step makes the
  host wait for the GPU anywhere but where the loss is read.
- losses: 50 steps beside transformers' Trainer, on the same batches without dropout.
- faults, with two cards: a rank is killed; a store stalls at the end while NCCL is up.

The model has the shape of Llama-3.1-8B and random weights. The result is JSON with the hardware's name; keep it as
benchmarks/results/gpu-CARD.json. A part that fails leaves its error in its place, and the others run.
"""

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.train import Baseline, Engine, make_batches, make_model, mfu_hfu
from feyntune.forkserver import Process
from feyntune.model.packed import attention_backend
from feyntune.training import launch as launching
from feyntune.training.batches import Document
from feyntune.training.memory import RESERVED_BYTES, MemoryPlan, Shape, step_bytes
from feyntune.training.results import hardware, peak_memory
from feyntune.training.train import accumulate_gradients

BARS = {"A100": 5000, "H100": 11000}  # useful tokens a second of LoRA-all under NF4 at 3,300 tokens
STALL_SECONDS = 20.0


def options(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Arguments of benchmarks.train."""
    sizes = {"hidden": 128, "layers": 2, "shape_8b": not args.tiny}
    common = {"method": "lora-all", "device": args.device, "dropout": 0.05}
    return argparse.Namespace(**{**sizes, **common, "checkpoint_layers": "auto", **changes})


def documents_of(tokens: int, vocabulary: int) -> list[Document]:
    """Documents of 185 tokens, as hep-th abstracts have on average, `tokens` in all."""
    lengths = [185] * (tokens // 185) + ([tokens % 185] if tokens % 185 > 1 else [])
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=generator).tolist()
    return [Document(str(i), draw(n)) for i, n in enumerate(lengths)]


def speed(folder: Path, shape: Shape, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput and memory of one precision, over tokens at once and recomputation."""
    cuda = args.device == "cuda"
    engine = Engine(folder, options(args, precision=precision, checkpoint_layers=shape.layers))
    rows = []
    for tokens in (300, 600, 900) if args.tiny else (1100, 3300, 4400):
        for layers in (0, shape.layers):
            documents = documents_of(tokens, shape.vocabulary)
            engine.runner.plan = MemoryPlan(tokens, layers)
            gc.collect()
            engine.train([documents] * 2, time.perf_counter)  # warms up
            waits = host_waits(engine, documents) if cuda else None
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

            def clock() -> float:
                if cuda:
                    torch.cuda.synchronize()
                return time.perf_counter()

            steps = 2 if args.tiny else 8
            seconds, _ = engine.train([documents] * steps, clock)
            rate = steps * tokens / seconds
            planned = step_bytes(shape, "lora-all", engine.config, tokens, layers)
            row = {
                "precision": precision,
                "tokens": tokens,
                "recomputing_layers": layers,
                "useful_tokens_per_second": round(rate, 1),
                "seconds_per_step": round(seconds / steps, 4),
                "peak_bytes": peak_memory(engine.group.device),
                "planned_bytes": round(planned),
                "peak_over_plan": round(peak_memory(engine.group.device) / (planned - RESERVED_BYTES), 3)
                if cuda
                else None,
                "tokens_at_once": engine.runner.plan.micro_batch_tokens,  # less than `tokens` after out of memory
                "host_waits": waits,
            }
            rows.append(row | mfu_hfu(shape, rate, layers, args.device))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def host_waits(engine: Engine, documents: list[Document]) -> str:
    """ "none", or where a step makes the host wait for the GPU before its loss is read."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        accumulate_gradients(
            documents, 0, engine.config, engine.runner, engine.gradient, engine.group, threading.Event()
        )
        return "none"
    except RuntimeError:
        return traceback.format_exc(limit=-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(folder: Path, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """50 steps beside the Trainer, one side at a time: both together may not fit."""
    steps = 3 if args.tiny else 50
    batches = make_batches(steps, shape.vocabulary)
    precision = "fp32" if args.tiny else "nf4"
    result: dict[str, Any] = {"steps": steps, "precision": precision}
    for name, side, layers in (("engine", Engine, "auto"), ("trainer", Baseline, "auto" if args.tiny else "all")):
        trainer = side(folder, options(args, precision=precision, dropout=0.0, checkpoint_layers=layers))
        seconds, values = trainer.train(batches, time.perf_counter)  # type: ignore[attr-defined]
        result[name] = [round(value, 6) for value in values]
        result[f"{name}_seconds"] = round(seconds, 2)
        del trainer
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    differences = [abs(a - b) for a, b in zip(result["engine"], result["trainer"], strict=True)]
    return result | {"largest_difference": max(differences), "ratio_of_time": ratio(result)}


def ratio(result: dict[str, Any]) -> float:
    return round(result["trainer_seconds"] / result["engine_seconds"], 3)


def faults(args: argparse.Namespace) -> dict[str, Any]:
    """Two ranks of a small training: one is killed; then a store that accepts and stalls at the end."""
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        return {"skipped": "needs two GPUs"}
    from feyntune.demo import copy_demo_base
    from feyntune.ingestion.ingest import ingest
    from feyntune.splitting.split import split

    with tempfile.TemporaryDirectory() as tmp:
        place = Path(tmp)
        ingest("synthetic:300", place / "corpus")
        split(place / "corpus", place / "split")
        config = {"precision": "bf16" if args.device == "cuda" else "fp32", "devices": 2, "max_steps": 12}
        if args.device == "cuda":
            config["max_steps"] = 300  # a card is fast: the kill must come before the end
        config |= {"validation_papers": 2, "save_every_steps": 1, "device": args.device}
        job = {"data": str(place / "split"), "mixture": "hep-th", "method": "lora-qkv", "config": config}
        job["base"] = str(copy_demo_base(place / "base"))
        return {"killed_rank": killed_rank(job, place), "stalled_store": stalled_store(job, place)}


def killed_rank(job: dict[str, Any], place: Path) -> dict[str, Any]:
    """SIGKILL for rank 1 after the first checkpoint: the launcher notices and starts the training once more."""
    starts: list[tuple[float, Sequence[Process]]] = []
    real, killed = launching._start, []

    def start(path: Path, devices: int) -> Sequence[Process]:
        starts.append((time.monotonic(), real(path, devices)))
        return starts[-1][1]

    def kill() -> None:
        while not starts or not list((place / "store").rglob("step-*/manifest.json")):
            time.sleep(0.01)
        os.kill(starts[0][1][1].pid, signal.SIGKILL)
        killed.append(time.monotonic())

    launching._start = start
    try:
        threading.Thread(target=kill, daemon=True).start()
        manifest = launching.launch(**job, out=str(place / "killed"), checkpoints=str(place / "store"))
    finally:
        launching._start = real
    return {
        "starts": len(starts),
        "seconds_until_restart": round(starts[-1][0] - killed[0], 2),
        "interruptions": manifest.stats["interruptions"],
        "steps": manifest.stats["steps"],
    }


def stalled_store(job: dict[str, Any], place: Path) -> dict[str, Any]:
    """Rank 1 must end before rank 0, which the store keeps waiting; the launcher then uploads the adapter itself."""
    ranks: list[Process] = []
    ended: dict[int, float] = {}
    real = launching._start

    def start(path: Path, devices: int) -> Sequence[Process]:
        ranks.extend(real(path, devices, "benchmarks.gpu"))
        for rank, process in enumerate(ranks):
            threading.Thread(target=lambda r=rank, p=process: ended.setdefault(r, _ended(p)), daemon=True).start()
        return ranks

    launching._start = start
    error = ""
    try:
        launching.launch(**job, out=str(place / "stalling"), checkpoints=str(place / "other-store"))
    except Exception as e:
        error = str(e)
    finally:
        launching._start = real
    time.sleep(0.5)
    if 0 not in ended or 1 not in ended:
        raise RuntimeError(f"the ranks did not end: {error}")
    return {"error": error, "seconds_rank_1_ended_before_rank_0": round(ended[0] - ended[1], 2)}


def _ended(process: Process) -> float:
    while process.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def stalling_rank(job: Path) -> None:
    """One training process, whose store stalls when the adapter is pushed."""
    from feyntune.artifacts.store import FolderStore, StoreError

    put_file = FolderStore.put_file

    def stall(self: FolderStore, name: str, path: Path) -> None:
        if name.startswith("adapter/"):
            time.sleep(STALL_SECONDS if torch.cuda.is_available() else 3)
            raise StoreError("the store does not answer")
        put_file(self, name, path)

    FolderStore.put_file = stall  # type: ignore[method-assign]
    os._exit(launching.work(job))


def part(result: dict[str, Any], name: str, measure: Callable[[], Any]) -> None:
    """Measure one part; an error is a result too."""
    started = time.monotonic()
    try:
        result[name] = measure()
    except Exception as e:
        traceback.print_exc()
        result[name] = {"error": f"{type(e).__name__}: {e}"}
    result["seconds"][name] = round(time.monotonic() - started, 1)


def main() -> None:
    if len(sys.argv) == 2 and sys.argv[1].endswith("job.json"):
        stalling_rank(Path(sys.argv[1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--only", default="speed,losses,faults", help="parts, separated by commas")
    parser.add_argument("--out", type=Path, help="file for the JSON; it is printed in any case")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "cuda"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at first use; as a training has it
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU: give --tiny to try the code on a CPU")
    transformers_logging.disable_progress_bar()
    device = torch.device(args.device)
    parts = args.only.split(",")
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "hardware": hardware(device),
        "devices": torch.cuda.device_count(),
        "tiny": args.tiny,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "attention": attention_backend(device),
        "seconds": {},
    }
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        if {"speed", "losses"} & set(parts):
            shape = make_model(folder, options(args))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if "speed" in parts:
            for precision in ("nf4", "bf16"):
                part(result, f"speed_{precision}", lambda p=precision: speed(folder, shape, p, args))
                gc.collect()
        if "losses" in parts:
            part(result, "losses", lambda: losses(folder, shape, args))
    if "faults" in parts:
        part(result, "faults", lambda: faults(args))
    bar = next((bar for card, bar in BARS.items() if card in result["hardware"]), None)
    if bar is not None and isinstance(result.get("speed_nf4"), list):
        rates = [r["useful_tokens_per_second"] for r in result["speed_nf4"] if r["tokens"] == 3300]
        result["bar"] = {"useful_tokens_per_second": bar, "reached": max(rates) >= bar}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
