"""The tables of a comparison: one row a system, as Markdown and as CSV."""

from typing import Any

from feyntune.evaluation.completion_stats import TRUNCATIONS
from feyntune.evaluation.report import budget, conclusion, like_published
from feyntune.names import BASE

# Perplexity on the hep-th test set, mean over abstracts (FeynTune, arXiv 2508.03716).
PUBLISHED = {BASE: 11.20, "hep-th+hep-ph+gr-qc/lora-all": 9.83}


def table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a system, the base first, then the variants from the best to the worst."""
    rows = []
    ranked = sorted(summary["variants"], key=lambda name: summary["variants"][name]["delta"]["mean"])
    for name in [BASE, *ranked]:
        system = summary["base"] if name == BASE else summary["variants"][name]
        delta = system.get("delta", {})
        rows.append(
            {
                "system": name,
                "abstracts": summary["test"]["abstracts"],
                **system["perplexity"],
                "bits_per_byte": system["bits_per_byte"],
                "entropy": system["entropy"],
                "delta": delta.get("mean"),
                "delta_low": delta.get("low"),
                "delta_high": delta.get("high"),
                **{k: system.get(k) for k in ("p_holm", "effect", "share_better", "train_tokens", "seconds")},
                "published": PUBLISHED.get(name) if like_published(summary) else None,
                **_completion_columns(summary.get("completions"), name),
                "memorization": system.get("memorization"),
                "adapter_sha256": system.get("adapter_sha256"),
            }
        )
    return rows


def _completion_columns(completions: dict[str, Any] | None, system: str) -> dict[str, float | None]:
    """The columns of the table that come from the first decoding's completions of test papers; None without any."""
    columns: dict[str, float | None] = {}
    for truncation, prefix in TRUNCATIONS.items():
        for measure in ("similarity", "similarity_with_prompt", "distinct_2", "repeated_4", "compression", "stopped"):
            if (truncation, measure) == ("truncated", "stopped"):
                continue
            figure: dict[str, Any] = {}
            if completions is not None:
                decoding = completions["settings"]["decodings"][0]
                figure = completions["figures"]["test"][decoding][truncation][system].get(measure, {})
            columns[prefix + measure] = figure.get("mean")
            if measure == "similarity":
                delta = figure.get("delta", {})
                columns |= {f"{prefix}{measure}_delta{end}": delta.get(k) for end, k in _ENDS.items()}
                columns[f"{prefix}{measure}_p_holm"] = figure.get("p_holm")
    return columns


_ENDS = {"": "mean", "_low": "low", "_high": "high"}


def to_markdown(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The conclusion, and tables of three columns: the Kubeflow UI shows them in a panel 500 pixels wide.

    Everything else is in table.csv, completions.csv and the report.
    """
    lines = [*conclusion(summary), "", *_head(["system", "perplexity", "minus base [95 % CI]"])]
    for r in rows:
        delta = f"{r['delta']:+.2f} [{r['delta_low']:+.2f}, {r['delta_high']:+.2f}]" if r["delta"] is not None else ""
        lines.append(f"| {r['system']} | {r['abstract_mean']:.2f} | {delta} |")
    lines += [f"| {f['variant']} |  | failed in {f['step']} |" for f in summary["failures"]]
    lines += [f"\n{f['variant']} failed in {f['step']}: {' '.join(f['error'].split())}" for f in summary["failures"]]
    test = summary["test"]
    lines += ["", f"Mean over {test['abstracts']:,} test abstracts of {test['category']}; lower is better."]
    lines += [f"Test set {test['digest'][:16]}."]
    lines += ["", budget(summary)] if budget(summary) else []
    if "completions" in summary:
        lines += _markdown_completions([r["system"] for r in rows], summary["completions"])
    return "\n".join(lines) + "\n"


def _markdown_completions(systems: list[str], completions: dict[str, Any]) -> list[str]:
    """Of the completions what says most in least room: the first decoding's, as the study shows them."""
    decoding = completions["settings"]["decodings"][0]
    lines = []
    for split, by_decoding in completions["figures"].items():
        figures = by_decoding[decoding]["truncated"]
        named = {"similarity": "similarity", "repeated_4": "repeated 4-grams"}
        measures = [m for m in named if m in figures[BASE]]
        lines += ["", f"Completions of {completions['papers'][split]} {split} papers, {decoding}, truncated:", ""]
        lines += _head(["system", *(named[m] for m in measures)])
        for name in systems:
            cells = [_show(figures[name][m]["mean"], ".3f") for m in measures]
            lines.append("| " + " | ".join([name, *cells]) + " |")
        own = completions["reference"][split]
        lines.append("| reference | " + " | ".join(_show(own.get(m), ".3f") for m in measures) + " |")
    if "missing" in completions["similarity"]:
        lines += ["", f"No semantic similarity: {completions['similarity']['missing']}"]
    return lines


def _head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
