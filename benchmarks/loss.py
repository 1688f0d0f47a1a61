"""Cross-entropy through a frozen head of 128,256 words: the engine's loss against plain logits.

    python -m benchmarks.loss [--tokens 2048] [--hidden 512] [--words 128256] [--at-once 512,1024,4096] [--json]

Peak memory is the growth of a forked process's largest resident set; time is process CPU time on one thread.
"""

import argparse
import json
import os
import struct
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from feyntune.training.loss import CPU_VOCAB_CHUNK, frozen_head_loss


def measure(
    kind: str, tokens: int, hidden: int, words: int, at_once: int = CPU_VOCAB_CHUNK
) -> tuple[float, int, float, float]:
    """(CPU seconds, bytes above the inputs, loss, norm of the gradient) of one forward and backward, in a fork."""

    def run() -> tuple[float, int, float, float]:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        states = torch.randn(tokens, hidden, requires_grad=True)
        head = torch.nn.Linear(hidden, words, bias=False).requires_grad_(False)
        labels = torch.randint(0, words, (tokens,))
        _reset_peak()
        before, started = _peak(), time.process_time()
        if kind == "plain":
            loss = F.cross_entropy(head(states), labels, reduction="sum") / tokens
        else:
            loss = frozen_head_loss(states, head, labels, at_once) / tokens
        loss.backward()
        seconds = time.process_time() - started
        assert states.grad is not None
        return seconds, _peak() - before, loss.item(), states.grad.norm().item()

    return _in_fork(run)


def peak_bytes(kind: str, tokens: int, hidden: int, words: int, at_once: int = CPU_VOCAB_CHUNK) -> int:
    return measure(kind, tokens, hidden, words, at_once)[1]


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # sets the high-water mark to what is resident now (proc(5))


def _peak() -> int:
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _in_fork(function: Callable[[], tuple[float, int, float, float]]) -> tuple[float, int, float, float]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            os.write(write, struct.pack("dqdd", *function()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f:
        data = f.read()
    os.waitpid(pid, 0)
    if not data:
        raise RuntimeError("the measuring process died, most likely for memory")
    seconds, size, loss, norm = struct.unpack("dqdd", data)
    return seconds, size, loss, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--at-once", default=f"{CPU_VOCAB_CHUNK},512,4096", help="words whose logits exist at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from feyntune.training.results import hardware

    sizes = (args.tokens, args.hidden, args.words)
    settings = [int(n) for n in args.at_once.split(",")]
    runs: dict[str, list[tuple[float, int, float, float]]] = {}
    for _ in range(args.rounds):
        runs.setdefault("plain", []).append(measure("plain", *sizes))
        for at_once in settings:
            runs.setdefault(f"{at_once} words", []).append(measure("walk", *sizes, at_once))
    rows = {}
    for name, measurements in runs.items():
        middle = sorted(measurements)[len(measurements) // 2]
        rows[name] = {
            "cpu_seconds": round(middle[0], 2),
            "peak_mib": round(middle[1] / 2**20, 1),
            "loss": middle[2],
            "gradient_norm": middle[3],
            "times_less_memory": round(runs["plain"][0][1] / middle[1], 1),
            "times_faster": round(sorted(runs["plain"])[len(measurements) // 2][0] / middle[0], 2),
        }
    best = f"{settings[0]} words"
    result = {
        "benchmark": "loss",
        "hardware": hardware(torch.device("cpu")),
        "threads": 1,
        "tokens": args.tokens,
        "hidden": args.hidden,
        "words": args.words,
        "rounds": args.rounds,
        "rows": rows,
        "ratio": rows[best]["times_faster"],
        "memory_ratio": rows[best]["times_less_memory"],
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{args.tokens} tokens x {args.hidden}, {args.words} words, one thread of {result['hardware']}")
    for name, row in rows.items():
        print(
            f"{name:>10}  {row['cpu_seconds']:7.2f} CPU s  {row['peak_mib']:8.1f} MiB"
            f"  {row['times_faster']:5.2f} x faster  {row['times_less_memory']:6.1f} x less memory"
            f"  loss {row['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
