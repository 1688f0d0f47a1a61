"""Benchmarks (`feyntune tasks`) in a comparison: each variant against the base, paired by document."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import open_artifact
from feyntune.errors import UserError
from feyntune.evaluation import statistics
from feyntune.names import BASE


def attach(
    folders: Sequence[str | Path], base: str, adapters: Mapping[str, str], resamples: int, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """`tasks` for the summary (only where folders are given) and the digests for the inputs.

    `tasks[NAME][METRIC][SYSTEM]` is {mean, documents} and for variants {delta, p, p_holm} against the base.

    Args:
        base, adapters: digests of what is compared; results of other systems are left out.

    Raises:
        UserError: run on another base or another adapter of the same name, or a task is there twice.
    """
    result: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    for folder in folders:
        manifest = open_artifact(folder, "tasks")
        if manifest.inputs["base"] != base:
            raise UserError(
                f"{folder} was run on base {manifest.inputs['base'][:16]}, not on {base[:16]}: run it again."
            )
        for name, digest in adapters.items():
            if manifest.inputs.get(name, digest) != digest:
                raise UserError(f"{folder} was run on another adapter {name} than the one compared: run it again.")
        values: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
        for r in pq.read_table(Path(folder) / "samples.parquet").to_pylist():
            if r["system"] == BASE or r["system"] in adapters:
                by_system = values.setdefault((r["task"], r["metric"]), {})
                by_system.setdefault(r["system"], {})[r["document"]] = r["value"]
        for (task, metric), by_system in sorted(values.items()):
            if metric in result.get(task, {}):
                raise UserError(f"Task {task} is there twice, the second time in {folder}: leave one out.")
            result.setdefault(task, {})[metric] = _paired(by_system, resamples, seed)
        inputs[f"tasks {manifest.digest[:16]}"] = manifest.digest
        result.setdefault("", {})[manifest.digest[:16]] = {**manifest.config, "lm_eval": manifest.stats["lm_eval"]}
    settings = result.pop("", {})
    return ({"tasks": {"settings": settings, "figures": result}} if folders else {}), inputs


def _paired(values: Mapping[str, Mapping[int, float]], resamples: int, seed: int) -> dict[str, Any]:
    """Figures of every system from its values by document, each variant against the base on the same documents."""
    documents = sorted(values[BASE])
    columns = {n: np.array([v.get(d, np.nan) for d in documents]) for n, v in values.items()}
    figures: dict[str, Any] = {
        n: {"mean": float(np.nanmean(c)), "documents": len(values[n])} for n, c in columns.items()
    }
    base = columns.pop(BASE)
    variants = columns
    for name, difference in statistics.paired_means(base, variants, resamples, seed).items():
        figures[name] |= {k: difference[k] for k in ("delta", "p", "p_holm")}
    return figures


def appendix(summary: Mapping[str, Any]) -> str:
    """The section of table.md; empty where no tasks were run."""
    if "tasks" not in summary:
        return ""
    text = "\n## Tasks\n\n| task | metric | system | documents | mean | minus base (95 %) | Holm p |\n"
    text += "|---|---|---|---:|---:|---:|---:|\n"
    for task, by_metric in summary["tasks"]["figures"].items():
        for metric, systems in by_metric.items():
            for name, f in sorted(systems.items(), key=lambda item: item[0] != BASE):
                d = f.get("delta")
                cells = [task, metric, name, str(f["documents"]), f"{f['mean']:.4f}"]
                cells.append(f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]" if d else "")
                cells.append(f"{f['p_holm']:.2g}" if d else "")
                text += "| " + " | ".join(cells) + " |\n"
    return text


def describe(settings: Mapping[str, Any]) -> list[str]:
    """How each set of tasks was run, a sentence each."""
    return [
        f"{', '.join(s['tasks'])}: lm-evaluation-harness {s['lm_eval']}, base in {s['precision']}, "
        + ("few-shot as the task says" if s["few_shot"] is None else f"{s['few_shot']} examples")
        + (f", only the first {s['limit']} documents of each" if s["limit"] else "")
        + "."
        for s in settings.values()
    ]
