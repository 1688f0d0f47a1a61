"""What a comparison makes of completions: paired figures of every measure, memorization, and texts side by side."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import Manifest
from feyntune.errors import UserError
from feyntune.evaluation import statistics
from feyntune.evaluation.completions import MEASURES
from feyntune.evaluation.config import CompareConfig
from feyntune.evaluation.repetition import DEFINITIONS as REPETITION
from feyntune.evaluation.repetition import repetition
from feyntune.names import BASE, slug

# Mean similarity on the hep-th test set (FeynTune, arXiv 2508.03716): the base, and the fine-tuned variants.
PUBLISHED = {"base": 0.88, "fine-tuned": 0.90}

DEFINITIONS = {
    "similarity": "cosine of the sentence embeddings of completion and reference continuation",
    "similarity_with_prompt": "the same with the prompt before both (FeynTune's): what both share lifts it",
    **REPETITION,
    "overlap": "words of the longest run that stands word for word in an abstract the system was trained on (for the "
    "base: in any training abstract)",
    "memorized": "share of completions whose overlap reaches the threshold",
    "stopped": "share of completions the model ended itself (EOS)",
    "tokens": "tokens of the completion",
}
TRUNCATIONS = {"full": "", "truncated": "truncated_"}  # name -> prefix of its measures
EXAMPLES = 3  # papers shown side by side
SHOWN = 4  # systems shown beside the reference continuation: the base, then the best

Tables = dict[str, pa.Table]


def read(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest], measured_as: Mapping[str, str]
) -> Tables | None:
    """Every system's completions, joined: the same papers, prompts and decodings in the same order as the base's.

    Args:
        folders, manifests: of each system's evaluation, the base's among them.
        measured_as: the name each system has in its evaluation (that of one of its seeds).

    Raises:
        UserError: a system completed other prompts than the base.
    """
    if not manifests[BASE].config.get("completions"):
        return None
    tables = {}
    for name, folder in folders.items():
        order = [("id", "ascending"), ("decoding", "ascending")]
        tables[name] = pq.read_table(folder / "completions" / f"{slug(measured_as[name])}.parquet").sort_by(order)
    joined = ["id", "decoding", "split", "prompt", "reference"]
    expected = tables[BASE].select(joined)
    for name, table in tables.items():
        if not table.select(joined).equals(expected):
            raise UserError(f"{name} did not complete the prompts that the base did: evaluate it again.")
    return tables


def figures(
    tables: Tables, manifests: Mapping[str, Manifest], measured_as: Mapping[str, str], config: CompareConfig
) -> dict[str, Any]:
    """The `completions` of a summary.

    `figures[split][decoding][truncation][system][measure]` is {mean} and, for variants, {delta, p, p_holm, effect}
    against the base, paired by paper; truncation is one of TRUNCATIONS. `reference[split][measure]` is the
    mean over the reference continuations. `memorization[system]` counts over all decodings.
    """
    settings = manifests[BASE].config["completions"]
    stats = {name: m.stats.get("completions", {}) for name, m in manifests.items()}
    similarity = _similarity_model(stats)
    base = tables[BASE]
    result: dict[str, Any] = {"settings": settings, "similarity": similarity, "definitions": DEFINITIONS}
    result["training_papers"] = {name: f.get("training_papers", {}).get(measured_as[name]) for name, f in stats.items()}
    result["papers"], result["figures"], result["reference"] = {}, {}, {}
    splits, decodings = np.array(base["split"].to_pylist()), np.array(base["decoding"].to_pylist())
    for split in ("test", "holdout"):
        one = (splits == split) & (decodings == settings["decodings"][0])
        if not one.any():
            continue
        result["papers"][split] = int(one.sum())
        result["reference"][split] = _of_references(base.filter(pa.array(one)))
        result["figures"][split] = {
            decoding: {
                truncation: _measured(
                    tables, (splits == split) & (decodings == decoding), truncation, settings, similarity, config
                )
                for truncation in TRUNCATIONS
            }
            for decoding in settings["decodings"]
        }
    result["memorization"] = {
        name: {split: _memorization(t.filter(pa.array(splits == split)), settings) for split in result["papers"]}
        for name, t in tables.items()
    }
    return result


def examples(tables: Tables, ranked: Sequence[str], decoding: str) -> list[dict[str, Any]]:
    """A few test papers: prompt, reference, and the truncated completions of the base and the best of `ranked`.

    A text is a list of [words, agrees]: whether the reference continuation has them too, in the same order, at
    least two in a row.
    """
    shown = list(ranked)[:SHOWN]
    rows = {name: [r for r in tables[name].to_pylist() if _is_example(r, decoding)] for name in shown}
    first = sorted(rows[shown[0]], key=lambda r: hashlib.sha256(r["id"].encode()).digest())[:EXAMPLES]
    result = []
    for row in first:
        texts = {name: next(r for r in rows[name] if r["id"] == row["id"]) for name in shown}
        systems = [
            {
                "system": name,
                "parts": agreements(r["truncated"], r["reference"]),
                "stop": r["truncated_by"],
                "similarity": r["truncated_similarity"],
                "overlap": r["truncated_overlap"],
            }
            for name, r in texts.items()
        ]
        result.append({"id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "systems": systems})
    return result


def agreements(text: str, reference: str, least: int = 2) -> list[tuple[str, bool]]:
    """`text` in parts, each with whether it stands word for word and in the same order in `reference`."""
    own, other = text.split(), reference.split()
    blocks = difflib.SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    parts, at = [], 0
    for block in blocks:
        if block.size < least and block.size:
            continue
        parts += [(" ".join(own[at : block.a]), False), (" ".join(own[block.a : block.a + block.size]), True)]
        at = block.a + block.size
    return [(words, same) for words, same in parts if words]


def rows(completions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures as one long table: a row a system and measure."""
    result = []
    for split, by_decoding in completions["figures"].items():
        for decoding, by_truncation in by_decoding.items():
            for truncation, systems in by_truncation.items():
                for system, measures in systems.items():
                    for measure, f in measures.items():
                        delta = f.get("delta", {})
                        result.append(
                            {
                                "split": split,
                                "decoding": decoding,
                                "truncation": truncation,
                                "system": system,
                                "measure": measure,
                                "mean": f["mean"],
                                "delta": delta.get("mean"),
                                "delta_low": delta.get("low"),
                                "delta_high": delta.get("high"),
                                **{k: f.get(k) for k in ("p", "p_holm", "effect")},
                                "reference": completions["reference"][split].get(measure),
                            }
                        )
    return result


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _is_example(row: Mapping[str, Any], decoding: str) -> bool:
    return row["split"] == "test" and row["decoding"] == decoding


def _similarity_model(stats: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The embedding model of all systems, or why there is no similarity to compare."""
    models = {name: f.get("similarity", {"missing": "its evaluation does not say"}) for name, f in stats.items()}
    for name, model in models.items():
        if "missing" in model:
            return {**model, "missing": f"{model['missing']}" if name == BASE else f"{name}: {model['missing']}"}
    if len({json.dumps(m, sort_keys=True) for m in models.values()}) > 1:
        digests = ", ".join(f"{name} {m['digest'][:12]}" for name, m in models.items())
        return {"missing": f"the systems were embedded by different models ({digests})"}
    return dict(models[BASE])


def _measured(
    tables: Tables,
    chosen: np.ndarray,
    truncation: str,
    settings: Mapping[str, Any],
    similarity: Mapping[str, Any],
    config: CompareConfig,
) -> dict[str, dict[str, Any]]:
    columns = {name: _columns(t.filter(pa.array(chosen)), truncation, settings) for name, t in tables.items()}
    result: dict[str, dict[str, Any]] = {name: {} for name in columns}
    for measure in columns[BASE]:
        if measure in MEASURES[:2] and "missing" in similarity:
            continue
        values = {name: c[measure] for name, c in columns.items()}
        paired = statistics.paired_means(
            values[BASE], {n: v for n, v in values.items() if n != BASE}, config.resamples, config.seed
        )
        for name, v in values.items():
            present = v[np.isfinite(v)]
            result[name][measure] = {"mean": float(present.mean()) if len(present) else None, **paired.get(name, {})}
    return result


def _columns(table: pa.Table, truncation: str, settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Each measure of one system as [papers], nan where a text has none."""
    before = TRUNCATIONS[truncation]
    number = lambda column: np.array(table[column].to_pylist(), float)  # None becomes nan
    result = {m: number(before + m) for m in MEASURES}
    result["memorized"] = (result["overlap"] >= settings["memorized_words"]).astype(float)
    if truncation == "full":
        result["stopped"] = np.array([r == "eos" for r in table["stop_reason"].to_pylist()], float)
    result["tokens"] = number("n_tokens" if truncation == "full" else "truncated_tokens")
    return result


def _of_references(table: pa.Table) -> dict[str, float]:
    """Means over the reference continuations; overlap is with all training abstracts."""
    each = [repetition(text) for text in table["reference"].to_pylist()]
    result = {}
    for name in REPETITION:
        values = [v for e in each if (v := e[name]) is not None]
        if values:
            result[name] = float(np.mean(values))
    result["overlap"] = float(np.mean(table["reference_overlap"].to_pylist()))
    return result


def _memorization(table: pa.Table, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Share of completions with a long run of a training abstract; the same of the references, for comparison."""
    overlap, own = np.array(table["overlap"].to_pylist()), np.array(table["reference_overlap"].to_pylist())
    least = settings["memorized_words"]
    return {
        "share": float((overlap >= least).mean()),
        "mean": float(overlap.mean()),
        "longest": int(overlap.max()),
        "reference_share": float((own >= least).mean()),
        "reference_mean": float(own.mean()),
        "completions": len(overlap),
    }
