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
    head = ["system", "perplexity (mean over abstracts)", "token-weighted", "bits per byte", "minus base (95 %)"]
    published = like_published(summary)
    head += ["Holm p", "train tokens", *(["published"] if published else [])]
    lines = [*conclusion(summary), "", *_head(head)]
    for r in rows:
        cells = [r["system"], _show(r["abstract_mean"], ".3f"), _show(r["token"], ".3f")]
        cells.append(_show(r["bits_per_byte"], ".4f"))
        cells.append(f"{r['delta']:+.3f} [{r['delta_low']:+.3f}, {r['delta_high']:+.3f}]" if r["p_holm"] else "")
        cells += [_show(r["p_holm"], ".2g"), _show(r["train_tokens"], ",")]
        cells += [_show(r["published"], ".2f")] if published else []
        lines.append("| " + " | ".join(cells) + " |")
    for f in summary["failures"]:
        lines.append(f"| {f['variant']} | failed in {f['step']}: {f['error']} |" + "  |" * (len(head) - 2))
    test = summary["test"]
    lines += ["", f"{test['abstracts']:,} test abstracts of {test['category']}, test set {test['digest'][:16]}."]
    lines += ["", budget(summary)] if budget(summary) else []
    if "completions" in summary:
        lines += _markdown_completions([r["system"] for r in rows], summary["completions"])
    return "\n".join(lines) + "\n"


def _markdown_completions(systems: list[str], completions: dict[str, Any]) -> list[str]:
    lines = []
    for split, by_decoding in completions["figures"].items():
        for decoding, by_truncation in by_decoding.items():
            for truncation, figures in by_truncation.items():
                measures = list(figures[BASE])
                lines += [
                    "",
                    f"Completions of {completions['papers'][split]} {split} papers, {decoding}, {truncation}",
                    "",
                ]
                lines += _head(["system", *measures])
                for name in systems:
                    cells = [_show(figures[name][m]["mean"], ".3f") for m in measures]
                    lines.append("| " + " | ".join([name, *cells]) + " |")
                own = completions["reference"][split]
                lines.append(
                    "| reference continuation | " + " | ".join(_show(own.get(m), ".3f") for m in measures) + " |"
                )
    if "missing" in completions["similarity"]:
        lines += ["", f"No semantic similarity: {completions['similarity']['missing']}"]
    return lines


def _head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
