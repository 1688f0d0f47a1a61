"""The report: one HTML page that needs nothing else, from a comparison's summary.

Sentences and chart positions are computed here; report.html.jinja lays them out and report.css gives them light,
dark, print and phone clothes. Charts are inline SVG in percent of their box, so their text never shrinks.
"""

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from feyntune.artifacts.artifact import Manifest
from feyntune.artifacts.records import SOURCES
from feyntune.conditions import as_served_sentence
from feyntune.evaluation import extraction, seeds, task_sections
from feyntune.evaluation.completion_stats import PUBLISHED as PUBLISHED_SIMILARITY
from feyntune.names import BASE, split_seed
from feyntune.tex import mark_words, set_formulas


def render(
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    curves: Mapping[str, Any],
    counts: dict[str, Any],
    audit: dict[str, Any],
    manifests: Mapping[str, Manifest],
    people: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        summary, rows: a comparison's summary.json and table (feyntune.evaluation.compare.table).
        curves: each variant's curve.json.
        counts, audit: of the corpus (may be empty) and of the split.
        manifests: "split", "evaluation", perhaps "corpus", and each variant's adapter.
        people: the study and the judges (feyntune.evaluation.report_sections.page).
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "n": _number,
        "signed": _signed,
        "short": _short,
        "p": _p,
        "seconds": _seconds,
        "share": _share,
        "tex": set_formulas,
        "marked": mark_words,
    }
    return environment.get_template("report.html.jinja").render(
        css=(here / "report.css").read_text(encoding="utf-8"),
        summary=summary,
        rows=rows,
        conclusion=conclusion(summary),
        best=summary["conclusion"]["best"],
        forest=_forest(rows),
        transfer=_transfer(summary, rows),
        learning=_learning(curves, rows),
        counts=_flat(counts),
        audit=_flat(audit),
        budget=budget(summary),
        matched=summary["budget"],
        published=_published(summary, rows),
        completions=_completions(summary, rows),
        example=_example(summary, rows),
        reproduce=_reproduce(summary, manifests),
        packages=manifests["evaluation"].packages,
        people=people,
        task_settings=task_sections.describe(summary["tasks"]["settings"]) if "tasks" in summary else [],
        extraction_sentences=extraction.sentences(summary["extraction"]) if "extraction" in summary else [],
        as_served=as_served_sentence(summary.get("as_served", {})),
        BASE=BASE,
    )


PAPER_BASE = "Llama-3.1-8B"
ONE_SEED = (
    "Each variant was trained with one seed: the ranking holds within it, and what another seed would change is not "
    "measured (--seeds 3 does)."
)
ONE_SEED_ALONE = "It was trained with one seed: what another seed would change is not measured (--seeds 3 does)."
SIGNIFICANT = "95 % CI, Holm-adjusted p < 0.05"


def conclusion(summary: dict[str, Any]) -> list[str]:
    """The result in sentences: which variant, how significant, at what cost."""
    test, result, variants = summary["test"], summary["conclusion"], summary["variants"]
    n = f"{test['abstracts']:,} test abstracts of {test['category']}"
    if not variants:
        return [f"No variant was measured on the {n}."]
    if "seeds" in summary:
        return seeds.sentences(summary["seeds"], summary["base"]["perplexity"]["abstract_mean"], n)
    if result["best"] is None:
        return [
            f"None of {len(variants)} variant{'s' if len(variants) > 1 else ''} is significantly better than the base "
            f"model on {n} ({SIGNIFICANT}).",
            ONE_SEED if len(variants) > 1 else ONE_SEED_ALONE,
        ]
    name = result["best"]
    best, base = variants[name], summary["base"]["perplexity"]["abstract_mean"]
    delta = best["delta"]
    sentences = [
        f"{name} lowers the perplexity of the base model from {base:.2f} to "
        f"{best['perplexity']['abstract_mean']:.2f} on {n}.",
        f"The difference, paired by abstract, is {_signed(delta['mean'])} "
        f"(95 % CI {_signed(delta['low'])} to {_signed(delta['high'])}; Holm-adjusted p {_p(best['p_holm'])}); "
        f"it is better on {_share(best['share_better'])} of the abstracts.",
    ]
    if result["lead"] is not None:
        lead = result["lead"]
        significant = "" if lead["high"] < 0 else ", which is not significant"
        sentences.append(
            f"Its difference from the next best, {lead['over']}, is {_signed(lead['mean'])} "
            f"(95 % CI {_signed(lead['low'])} to {_signed(lead['high'])}){significant}."
        )
    if best.get("train_tokens") and best.get("seconds"):
        sentences.append(f"It was trained on {best['train_tokens']:,} tokens in {_seconds(best['seconds'])}.")
    sentences += _completion_sentences(summary, name)
    if len(variants) > 1:
        sentences.append(
            f"{result['better_than_base']} of {len(variants)} variants are significantly better than the base "
            f"({SIGNIFICANT})."
        )
    sentences.append(ONE_SEED if len(variants) > 1 else ONE_SEED_ALONE)
    return sentences


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that divide [low, high] into about `about` steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _forest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Intervals of variant minus base: positions in percent of the width."""
    variants = [r for r in rows if r["delta"] is not None]
    ends = [0.0, *(r[k] for r in variants for k in ("delta_low", "delta_high"))]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    at = lambda value: round(100 * (value - low) / (high - low), 2)
    return {
        "ticks": [(at(t), _signed(t) if t else "0") for t in ticks(low, high)],
        "zero": at(0.0),
        "rows": [
            {
                "row": r,
                "low": at(r["delta_low"]),
                "mean": at(r["delta"]),
                "high": at(r["delta_high"]),
                "method": "all" if r["system"].endswith("all") else "qkv",
            }
            for r in variants
        ],
    }


def _transfer(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Perplexity of every system on every category and retention set, and the change against the base in percent."""
    result = {**summary.get("transfer", {}), **summary.get("retention", {})}
    if not result:
        return None
    lines = []
    for name in (r["system"] for r in rows):
        cells = []
        for category in result.values():
            value = category["systems"][name]["perplexity"]["abstract_mean"]
            base = category["systems"][BASE]["perplexity"]["abstract_mean"]
            delta = category["systems"][name].get("delta")
            cells.append({"value": value, "change": 100 * (value / base - 1), "delta": delta})
        lines.append({"system": name, "cells": cells})
    widest = max((abs(c["change"]) for line in lines for c in line["cells"]), default=0) or 1.0
    for line in lines:
        for cell in line["cells"]:
            cell["ink"] = round(60 * abs(cell["change"]) / widest)
    return {"categories": {c: v["abstracts"] for c, v in result.items()}, "lines": lines}


def _learning(curves: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One panel a variant, all on the same axes: loss in nats a token against training steps."""
    panels = []
    for name in (r["system"] for r in rows):
        if name not in curves:
            continue
        train, validation = _points(curves[name])
        if train:
            panels.append({"system": name, "train": train, "validation": validation})
    if not panels:
        return None
    every = [p for panel in panels for p in panel["train"] + panel["validation"]]
    right = max(x for x, _ in every) or 1
    low, high = min(y for _, y in every), max(y for _, y in every)
    room = 0.08 * (high - low) or 0.5
    low, high = low - room, high + room
    at = lambda x, y: (round(100 * x / right, 2), round(100 * (high - y) / (high - low), 2))
    for panel in panels:
        panel["train_line"] = " ".join("{},{}".format(*at(*p)) for p in panel["train"])
        panel["validation_line"] = " ".join("{},{}".format(*at(*p)) for p in panel["validation"])
        panel["validation_dots"] = [at(*p) for p in panel["validation"]]
        panel["data"] = panel["train"][:: max(1, len(panel["train"]) // 12)]
    return {
        "panels": panels,
        "x": [(at(t, 0)[0], _count(t)) for t in ticks(0, right, 4)],
        "y": [(at(0, t)[1], f"{t:g}") for t in ticks(low, high, 4)],
    }


def _points(curve: dict[str, Any], most: int = 120) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) while training, averaged to at most `most` points; and (step, loss) on validation abstracts."""
    losses = curve["loss"]
    size = max(1, math.ceil(len(losses) / most))
    train = []
    for start in range(0, len(losses), size):
        group = losses[start : start + size]
        train.append((start + len(group), sum(group) / len(group)))
    return train, [(p["step"], math.log(p["perplexity"])) for p in curve["validation"] if p["perplexity"] is not None]


def budget(summary: dict[str, Any]) -> str:
    """Whether variants can be ranked by their data, or differ in how much they were trained; "" for fewer than two."""
    result = summary["budget"]
    if len(summary["variants"]) < 2 or result["smallest"] is None:
        return ""
    if result["matched"]:
        return "All variants were trained on the same number of tokens (within 5 %): their ranking compares their data."
    return (
        f"Variants were trained for a fixed number of epochs, as in the paper: the largest saw {result['spread']:.1f} "
        "times the tokens of the smallest, so more training and better data cannot be told apart between them."
    )


def _published(summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paper's figures beside ours of the same name; empty where ours are of other abstracts or another base."""
    if not like_published(summary):
        return []
    best = rows[1] if len(rows) > 1 else None
    result = [
        {"what": "Perplexity, base", "published": "11.20", "ours": _number(rows[0]["abstract_mean"], 2)},
        {
            "what": "Perplexity, best variant",
            "published": "9.83",
            "ours": f"{_number(best['abstract_mean'], 2)} ({best['system']})" if best else "–",
        },
    ]
    similar = [r for r in rows[1:] if r["similarity_with_prompt"] is not None]
    if rows[0]["similarity_with_prompt"] is not None:
        most = max(similar, key=lambda r: r["similarity_with_prompt"], default=None)
        result += [
            {
                "what": "Similarity with the prompt on both sides, base",
                "published": f"{PUBLISHED_SIMILARITY['base']:.2f}",
                "ours": _number(rows[0]["similarity_with_prompt"], 2),
            },
            {
                "what": "Similarity with the prompt on both sides, best variant",
                "published": f"{PUBLISHED_SIMILARITY['fine-tuned']:.2f}",
                "ours": f"{_number(most['similarity_with_prompt'], 2)} ({most['system']})" if most else "–",
            },
        ]
    return result


def like_published(summary: dict[str, Any]) -> bool:
    """Whether the paper's figures may stand beside these: hep-th abstracts and the paper's base model."""
    return summary["test"]["category"] == "hep-th" and summary["base"].get("name", "").endswith(PAPER_BASE)


def _example(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """For the first screen: of the papers shown further down, the one that the best system completed most closely."""
    examples = summary.get("completions", {}).get("examples", [])
    if len(rows) < 2 or not examples:
        return None
    best = rows[1]["system"]
    pairs = []
    for example in examples:
        texts = {s["system"]: s for s in example["systems"] if s["parts"]}
        if BASE in texts and best in texts:
            pairs.append({**example, "systems": [texts[BASE], texts[best]], "of": len(examples)})
    return max(pairs, key=lambda e: e["systems"][1]["similarity"] or 0.0, default=None)


# Heading, measure, and how its mean is written.
_COLUMNS = [
    ("Similarity", "similarity", "{:.3f}".format),
    ("Similarity with prompt", "similarity_with_prompt", "{:.3f}".format),
    ("Tokens", "tokens", "{:.0f}".format),
    ("Stopped by itself", "stopped", lambda v: _share(v)),
    ("Word entropy, bits", "entropy_1", "{:.2f}".format),
    ("Pair entropy, bits", "entropy_2", "{:.2f}".format),
    ("Distinct words", "distinct_1", lambda v: _share(v)),
    ("Distinct pairs", "distinct_2", lambda v: _share(v)),
    ("Repeated fours", "repeated_4", lambda v: _share(v)),
    ("Compression", "compression", "{:.2f}".format),
]


_ACROSS = 5  # columns of figures that fit a screen and a sheet of paper


def _completions(summary: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Tables of the test papers' completions, one for each decoding and truncation, and memorization."""
    if "completions" not in summary:
        return None
    result = summary["completions"]
    systems = [r["system"] for r in rows]
    tables = []
    for decoding, by_truncation in result["figures"]["test"].items():
        for truncation, figures in by_truncation.items():
            columns = [c for c in _COLUMNS if c[1] in figures[BASE]]
            lines = []
            for name in [*systems, None]:
                cells = []
                for _, measure, form in columns:
                    figure = figures[name][measure] if name else {"mean": result["reference"]["test"].get(measure)}
                    mean, delta = figure["mean"], figure.get("delta")
                    cells.append(
                        {
                            "mean": "–" if mean is None else form(mean),
                            "delta": delta
                            and f"{_signed(delta['mean'])} [{_signed(delta['low'])}, {_signed(delta['high'])}]",
                            "significant": bool(delta) and figure["p_holm"] < 0.05,
                        }
                    )
                lines.append({"system": name or "reference continuation", "cells": cells})
            heads = [c[0] for c in columns]
            for first in range(0, len(heads), _ACROSS):
                part = slice(first, first + _ACROSS)
                cut = [{**line, "cells": line["cells"][part]} for line in lines]
                tables.append(
                    {
                        "decoding": decoding,
                        "truncation": truncation,
                        "first": first == 0,
                        "heads": heads[part],
                        "lines": cut,
                    }
                )
    memorization = [{"system": name, **result["memorization"][name]} for name in systems]
    return {**result, "tables": tables, "memorization": memorization, "used": {c[1] for c in _COLUMNS}}


def _completion_sentences(summary: dict[str, Any], name: str) -> list[str]:
    """A variant's completions in sentences: similarity of the truncated ones, and memorization."""
    if "completions" not in summary:
        return []
    completions = summary["completions"]
    decoding = completions["settings"]["decodings"][0]
    figures = completions["figures"]["test"][decoding]["truncated"]
    sentences = []
    similarity = figures[name].get("similarity", {})
    if "delta" in similarity:
        delta = similarity["delta"]
        closer = "closer to" if delta["mean"] > 0 else "farther from"
        p = similarity["p_holm"]
        significance = f"Holm-adjusted p {_p(p)}" + ("" if p < 0.05 else ", n.s.")
        sentences.append(
            f"Its completions of {completions['papers']['test']} abstracts are {closer} the reference continuations "
            f"than the base's, truncated by the same rule: cosine similarity {similarity['mean']:.3f} against "
            f"{figures[BASE]['similarity']['mean']:.3f}, difference {_signed(delta['mean'])} "
            f"(95 % CI {_signed(delta['low'])} to {_signed(delta['high'])}; {significance})."
        )
    memorized = completions["memorization"][name]["test"]
    sentences.append(
        f"{_share(memorized['share'])} of its completions share {completions['settings']['memorized_words']} or more "
        "consecutive words with an abstract of its training set."
    )
    return sentences


def _ingest_command(corpus: Manifest | None) -> str:
    """The command that made the corpus, its source as it was given to it."""
    if corpus is None:
        return "feyntune ingest SOURCE --out corpus"
    kind, _, prefix = str(corpus.config["source"]).partition("-")
    words = ["feyntune", "ingest", f"{kind}:{corpus.stats.get('given', 'SOURCE')}", "--out", "corpus"]
    words += ["--prefix", prefix] if prefix else []
    words += [] if SOURCES[corpus.config["source"]] else ["--converted-text"]
    words += ["--until", corpus.config["until"]] if corpus.config.get("until") else []
    words += ["--categories", ",".join(corpus.config["categories"])] if corpus.config.get("categories") else []
    return shlex.join(words)


def _reproduce(summary: dict[str, Any], manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """The commands that make these figures again, and the digests they must give."""
    split, evaluation = manifests["split"], manifests["evaluation"]
    corpus = manifests.get("corpus")
    commands = [_ingest_command(corpus)]
    after = split.config.get("after")
    commands.append("feyntune split corpus --out split" + (f" --after {after}" if after else ""))
    if "previous" in split.inputs:
        commands[-1] += " --previous PREVIOUS"
    known = {k: v for k, v in manifests.items() if k in summary["variants"]}
    for name, adapter in known.items():
        mixture, _, method = split_seed(name)[0].rpartition("/")
        config = {k: v for k, v in adapter.config.items() if k not in ("variant", "mixture", "method")}
        commands.append(
            f"feyntune train --data split --mix {mixture} --method {method} --base BASE --out adapters/{name} "
            f"--recipe '{json.dumps({'train': config})}'"
        )
    given = "".join(f" --adapter {name}=adapters/{name}" for name in known)
    settings = {k: v for k, v in evaluation.config.items() if k != "include_base"}
    commands.append(
        f"feyntune evaluate --data split --base BASE --out evaluation{given} "
        f"--recipe '{json.dumps({'evaluate': settings})}'"
    )
    digests = {"corpus": summary["corpus"]["digest"], "split": summary["split"]["digest"]}
    digests |= {"base": summary["base"]["digest"], "test set": summary["test"]["digest"]}
    digests |= {f"adapter {name}": adapter.digest for name, adapter in known.items()}
    return {"commands": commands, "digests": digests}


_ITEMS = 20  # of a list; a corpus can have thousands of clusters


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _flat(figures: dict[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Numbers and words of nested counts as (name, value); long lists are shortened, and say so."""
    result: list[tuple[str, str]] = []
    for key, value in figures.items():
        name = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, dict):
            result += _flat(value, name)
        elif isinstance(value, bool):
            result.append((name, "yes" if value else "no"))
        elif isinstance(value, int | float):
            result.append((name, _number(value)))
        elif isinstance(value, list):
            items = [", ".join(map(str, i)) if isinstance(i, list) else _plain(i) for i in value]
            more = f" … ({len(items):,} in all)" if len(items) > _ITEMS else ""
            result.append((name, ("; ".join(items[:_ITEMS]) or "none") + more))
        elif value:
            result.append((name, str(value)))
    return result


def _number(value: float | None, digits: int = 3) -> str:
    """Integers with thin groups, others with `digits` significant decimals where they matter."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def _signed(value: float) -> str:
    if value == 0:
        return "0"
    digits = 2 if abs(value) >= 1 else min(6, 1 - math.floor(math.log10(abs(value))))
    return f"{value:+,.{digits}f}".replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1g}"


def _short(digest: str | None) -> str:
    return (digest or "–")[:12]


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.{1 if 0 < value < 0.1 else 0}f} %"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
