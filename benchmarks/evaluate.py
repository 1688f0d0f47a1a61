"""How fast abstracts are scored, against the baseline, on the same abstracts and the same model in one run.

    python -m benchmarks.evaluate [--abstracts 400] [--adapters 2] [--json]

The baseline (FeynTune's metrics.py and most others): for each system load the base and its adapter, tokenize,
random batches of 12 padded to the longest, the whole logits of a batch in fp32, cross-entropy. Ours is the
`evaluate` step itself, from the split folder to the sealed scores, entropies included. Both score the base and
every adapter in a process of their own, timed after the imports; the fastest of `--repeat` runs counts, and the
run fails where any abstract's mean loss differs by more than 1e-4. The model is a Llama of the size given with
random weights: speed does not depend on what it knows.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

SIZES = {"hidden": 256, "layers": 4, "heads": 8, "vocabulary": 16_384}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--abstracts", type=int, default=400)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2, help="runs of each side, taken in turn; the fastest counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--side", choices=("make", "feyntune", "baseline"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "make":
        make(args.folder, args.abstracts, args.adapters)
        return
    if args.side:
        _measure(args.side, args.folder, args.adapters)
        return
    with tempfile.TemporaryDirectory() as folder:
        passed = ["--abstracts", str(args.abstracts), "--adapters", str(args.adapters), "--folder", folder]
        _run("make", passed)
        runs: dict[str, list[dict[str, Any]]] = {"feyntune": [], "baseline": []}
        for _ in range(args.repeat):
            for side in runs:
                runs[side].append(_run(side, passed))
    best = {side: min(results, key=lambda r: r["cpu_seconds"]) for side, results in runs.items()}
    error = _largest_difference(best["feyntune"].pop("losses"), best["baseline"].pop("losses"))
    if error > 1e-4:
        sys.exit(f"the two sides differ by {error:.2g} nats a token in some abstract")
    summary = {
        "benchmark": "evaluate",
        "work": {"abstracts": args.abstracts, "systems": 1 + args.adapters, "model": SIZES},
        "feyntune": best["feyntune"],
        "baseline": best["baseline"],
        "ratio": round(best["baseline"]["cpu_seconds"] / best["feyntune"]["cpu_seconds"], 2),
        "largest_difference": error,
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": 1, "python": platform.python_version()},
    }
    if args.json:
        print(json.dumps(summary))
    else:
        _print(summary)


def make(folder: Path, abstracts: int, adapters: int) -> None:
    """A random base model, adapters of both methods, and a split of test abstracts only."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from feyntune.artifacts.artifact import write_artifact
    from feyntune.artifacts.records import SCHEMA
    from feyntune.ingestion.synthetic import synthetic_records
    from feyntune.model.base import folder_digest

    torch.manual_seed(0)
    texts = [" ".join(r["abstract"].split()) for r in synthetic_records(abstracts, seed=1, categories=("hep-th",))]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=SIZES["vocabulary"],  # a Llama's output layer is large beside its body; here too
        hidden_size=SIZES["hidden"],
        intermediate_size=3 * SIZES["hidden"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["heads"] // 4,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    row = {"primary": "hep-th", "categories": ["hep-th"], "title": "", "date": date(2024, 1, 1), "license": None}
    row |= {"withdrawn": False, "source": "synthetic", "split": "test"}
    rows = [{**row, "id": f"2401.{i:05d}", "cluster": str(i), "abstract": t} for i, t in enumerate(texts)]
    schema = pa.schema([*SCHEMA, pa.field("split", pa.string()), pa.field("cluster", pa.string())])
    with write_artifact(folder / "split", "split") as out:
        pq.write_table(pa.Table.from_pylist(rows, schema), out.path / "papers.parquet")
    for i in range(adapters):
        targets = ["q_proj", "k_proj", "v_proj"] if i % 2 == 0 else "all-linear"
        lora = LoraConfig(r=8, lora_alpha=32, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), lora)
        with write_artifact(folder / f"adapter-{i}", "adapter", inputs={"base": folder_digest(folder / "base")}) as out:
            model.save_pretrained(out.path)


def run_feyntune(folder: Path, adapters: int) -> dict[str, dict[str, float]]:
    """Mean loss of each abstract by system, through the evaluate step."""
    import pyarrow.parquet as pq

    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.evaluation.evaluate import evaluate
    from feyntune.names import slug

    with tempfile.TemporaryDirectory(dir=folder) as out:
        given = {f"v{i}/lora-all": folder / f"adapter-{i}" for i in range(adapters)}
        config = EvaluateConfig(precision="fp32", completions=None, retention=None)
        evaluate(folder / "split", str(folder / "base"), given, f"{out}/scores", config)
        result = {}
        for name in ("base", *given):
            table = pq.read_table(f"{out}/scores/scores/{slug(name)}.parquet")
            losses = table["nll_text"].to_numpy() / table["n_tokens"].to_numpy()
            result[name] = dict(zip(table["id"].to_pylist(), losses.tolist(), strict=True))
    return result


def run_baseline(folder: Path, adapters: int) -> dict[str, dict[str, float]]:
    """The same in random padded batches of 12 with the whole logits of each."""
    import pyarrow.parquet as pq
    import torch
    import torch.nn.functional as F
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    papers = pq.read_table(folder / "split" / "papers.parquet")
    ids, texts = papers["id"].to_pylist(), papers["abstract"].to_pylist()
    result: dict[str, dict[str, float]] = {}
    for name, adapter in [("base", None), *((f"v{i}/lora-all", folder / f"adapter-{i}") for i in range(adapters))]:
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="sdpa")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        model.eval()
        result[name] = {}
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        for start in range(0, len(order), 12):
            rows = order[start : start + 12]
            batch = tokenizer(
                [tokenizer.bos_token + texts[i] for i in rows],
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
                return_token_type_ids=False,
            )
            with torch.no_grad():
                logits = model(**batch, use_cache=False).logits.float()
            mask = batch["attention_mask"][:, 1:]
            loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
            means = (loss * mask).sum(1) / mask.sum(1)
            result[name] |= {ids[i]: float(m) for i, m in zip(rows, means, strict=True)}
    return result


def _measure(side: str, folder: Path, adapters: int) -> None:
    """Run one side in this process and print its figures as JSON."""
    import peft  # noqa: F401
    import torch

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    losses = (run_feyntune if side == "feyntune" else run_baseline)(folder, adapters)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    figures = {"seconds": round(seconds, 2), "cpu_seconds": round(_cpu_seconds(after) - _cpu_seconds(before), 2)}
    figures["peak_mb_above_start"] = round((after.ru_maxrss - before.ru_maxrss) / 1024)
    print(json.dumps({**figures, "losses": losses}))


def _cpu_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def _run(side: str, passed: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.evaluate", "--side", side, *passed]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) if done.stdout else {}


def _largest_difference(feyntune: dict[str, dict[str, float]], baseline: dict[str, dict[str, float]]) -> float:
    if {s: sorted(v) for s, v in feyntune.items()} != {s: sorted(v) for s, v in baseline.items()}:
        sys.exit("the two sides scored different abstracts")
    return max(abs(feyntune[s][i] - baseline[s][i]) for s in feyntune for i in feyntune[s])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    work = summary["work"]
    table = Table(title=f"{work['abstracts']} abstracts, {work['systems']} systems", title_justify="left")
    for column in ("", "CPU seconds", "seconds", "peak memory above start, MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, side in (("feyntune", summary["feyntune"]), ("baseline", summary["baseline"])):
        table.add_row(name, f"{side['cpu_seconds']}", f"{side['seconds']}", f"{side['peak_mb_above_start']}")
    console = Console()
    console.print(table)
    console.print(
        f"ratio {summary['ratio']} in CPU time, largest difference {summary['largest_difference']:.1g} nats a token"
    )
    console.print(f"{summary['hardware']['cpu']}, one thread")


if __name__ == "__main__":
    main()
