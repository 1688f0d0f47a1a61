"""Sealed evaluations with completions, as `evaluate` leaves them, made without a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.judging.external import SCHEMA
from feyntune.names import BASE, slug

QKV, ALL = "hep-th/lora-qkv", "hep-ph+gr-qc/lora-all"
SEEDS = (3, 7)

Write = Callable[[int], str]  # a completion, from the number of the paper


def completion_rows(write: Write, papers: int = 12, **changes: Any) -> list[dict[str, Any]]:
    """Rows of one system: greedy, and sampled with two seeds, by both rules."""
    rows = []
    for number in range(papers):
        for rule in ("paper", "careful"):
            for seed in (None, *SEEDS):
                decoding = "greedy" if seed is None else "sampled"
                text = f" {write(number)} {'' if seed is None else f'[{seed}]'}"
                row = {
                    "id": f"hep-th/{9901001 + number}",
                    "primary": "hep-th",
                    "split": "test" if number < papers - 2 else "holdout",
                    "rule": rule,
                    "decoding": decoding,
                    "seed": seed,
                    "temperature": None if seed is None else 0.7,
                    "max_new_tokens": 64,
                    "prompt": f"Beginning {number} under the {rule} rule.",
                    "reference": f"The reference continuation of {number} has seven words.",
                    "completion": f"{text} and runs on",
                    "stop_reason": "eos",
                    "n_tokens": 9,
                    "truncated": text.rstrip(),
                }
                rows.append({**row, **changes})
    return rows


def make_evaluation(
    folder: Path, systems: Mapping[str, Write | list[dict[str, Any]]], papers: int = 12, test: str = "7" * 64
) -> Path:
    """A sealed `evaluation` that holds completions of `systems` (a function, or rows) and no scores."""
    inputs = {"split": "5" * 64, "base": "b" * 64, "test": test}
    inputs |= {name: f"{i:064x}" for i, name in enumerate(systems, 1) if name != BASE}
    with write_artifact(folder, "evaluation", inputs, {"include_base": BASE in systems}) as out:
        (out.path / "completions").mkdir()
        for name, write in systems.items():
            rows = write if isinstance(write, list) else completion_rows(write, papers)
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out.path / "completions" / f"{slug(name)}.parquet")
    return folder


def with_completions(evaluation: Path, folder: Path, word: str) -> Path:
    """A copy of a scored evaluation with completions added for each of its systems; `word` stands in them."""
    manifest = read_manifest(evaluation)
    config = {k: v for k, v in manifest.config.items() if k != "completions"}  # these were not made by `evaluate`
    with write_artifact(folder, "evaluation", manifest.inputs, config) as out:
        (out.path / "completions").mkdir()
        for name in (n for n in manifest.files if not n.startswith("completions/")):
            (out.path / name).parent.mkdir(exist_ok=True)
            (out.path / name).write_bytes((evaluation / name).read_bytes())
            if name.startswith("scores/"):
                rows = completion_rows(lambda n, name=name: f"{word} of {Path(name).stem} on {n}")
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out.path / "completions" / Path(name).name)
        out.stats |= manifest.stats
    return folder
