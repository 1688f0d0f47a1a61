"""What a study's scores say: means, differences to the base, raters' habits and their agreement."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from feyntune.names import BASE
from feyntune.statistics import holm, mean_over_papers
from feyntune.study.agreement import alpha, icc, interval_over_papers
from feyntune.variants import METHODS

OTHERS = "other models"  # behind endpoints; FeynTune's are commercial ones

# Recomputed from the 900 scores FeynTune published with arXiv 2508.03716 (25 papers, 25 systems, three raters, 36
# blocks of one rater and one paper; agreement over the 5 papers that all three scored).
PUBLISHED: dict[str, Any] = {
    "categories": {BASE: 3.75, "lora-qkv": 4.92, "lora-all": 5.43, OTHERS: 7.50},
    "icc": 0.49,
    "icc_without_others": 0.34,
    "alpha": 0.46,
}

AGREEMENT = {
    "icc": "ICC(2,1)",
    "icc_without_others": "ICC(2,1) without other models",
    "alpha": "Krippendorff's alpha (interval)",
}

HOW = {
    "mean": "mean of all scores, 1 to 10",
    "z": "scores less their rater's mean, over their rater's standard deviation: raters' habits taken out",
    "difference": "the system's score minus the base's by the same rater on the same paper, averaged",
    "interval": "95 %, percentiles of a bootstrap that draws whole papers",
    "p_holm": "two-sided, by flipping the signs of whole papers' differences, after Holm's correction over the systems",
    "icc": "ICC(2,1), Shrout & Fleiss 1979: absolute agreement of single scores on items that all raters scored",
    "alpha": "Krippendorff's alpha, interval differences, on items that at least two raters scored",
    "published": (
        "FeynTune's: recomputed from its published scores. Its three raters are authors of the paper, each of its ten "
        "mixtures counts in a mean, other models are ChatGPT-4, Claude, Gemini and DeepSeek, the base is Llama-3.1-8B, "
        "completions were sampled without BOS and shown whole; what raters were told is not published."
    ),
}

Rating = Mapping[str, Any]  # a row of feyntune.study.study.RATINGS


def category(system: str) -> str:
    """`base`, `lora-qkv`, `lora-all`, or `other models`."""
    method = system.rpartition("/")[2]
    return system if system == BASE else method if method in METHODS else OTHERS


def figures(ratings: Sequence[Rating], items: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]) -> dict:
    """All figures of a study.

    Args:
        ratings: scored rows. items: rows of the key by item, for what is not scored yet.
        config: of the study-result: raters, systems, resamples, bootstrap_seed.

    Returns:
        systems, categories: {name: {n, mean, sd, z_mean, difference, z_difference, and p_holm within difference}},
        raters: {name: {items, scored, mean, sd, offset}} (offset from the mean of raters on items all scored),
        agreement: {items, raters, icc, alpha, icc_without_others} as {value, low, high, name,
            published}, published, how, scored, of.
    """
    resamples, seed = int(config["resamples"]), int(config["bootstrap_seed"])
    z = _standardized(ratings)
    papers = sorted({r["id"] for r in ratings})
    kinds = [BASE, *METHODS, OTHERS]
    systems = sorted({r["system"] for r in ratings}, key=lambda s: (kinds.index(category(s)), s))
    of_system = {s: _figures_of([s], ratings, z, papers, resamples, seed) for s in systems}
    groups = dict.fromkeys(map(category, systems))
    of_category = {
        g: _figures_of([s for s in systems if category(s) == g], ratings, z, papers, resamples, seed) for g in groups
    }
    for result in (of_system, of_category):
        for kind in ("difference", "z_difference"):
            tested = [f[kind] for name, f in result.items() if name != BASE and f[kind]["p"] is not None]
            for each, p in zip(tested, holm([t["p"] for t in tested]), strict=True):
                each["p_holm"] = p
    return {
        "scored": len(ratings),
        "of": len(items),
        "papers": len(papers),
        "systems": of_system,
        "categories": of_category,
        "raters": _raters(ratings, items, config["raters"]),
        "agreement": _agreement(ratings, resamples, seed),
        "published": PUBLISHED,
        "how": HOW,
        "resamples": resamples,
        "seed": seed,
        "filter": config["filter"] if "filter" in config else config["choice"],  # "choice" before 0.2
        "show_reference": config["show_reference"],
    }


def _standardized(ratings: Sequence[Rating]) -> list[float]:
    """z-scores within each rater, in the order of `ratings`; 0 for a rater who always gives the same score."""
    scores = defaultdict(list)
    for r in ratings:
        scores[r["rater"]].append(r["score"])
    mean = {rater: np.mean(s) for rater, s in scores.items()}
    sd = {rater: np.std(s, ddof=1) if len(s) > 1 else 0.0 for rater, s in scores.items()}
    return [float((r["score"] - mean[r["rater"]]) / sd[r["rater"]]) if sd[r["rater"]] else 0.0 for r in ratings]


def _figures_of(
    systems: list[str], ratings: Sequence[Rating], z: list[float], papers: list[str], resamples: int, seed: int
) -> dict[str, Any]:
    selected = np.array([r["system"] in systems for r in ratings])
    raw = np.array([r["score"] for r in ratings], float)
    result: dict[str, Any] = {
        "n": int(selected.sum()),
        "mean": float(raw[selected].mean()),
        "sd": float(raw[selected].std(ddof=1)) if selected.sum() > 1 else None,
        "z_mean": float(np.array(z)[selected].mean()),
        "interval": _over_papers(ratings, raw * selected, selected, papers, resamples, seed, None),
    }
    if systems == [BASE]:
        return result
    for kind, values in (("difference", raw), ("z_difference", np.array(z))):
        base = {(r["rater"], r["id"]): v for r, v in zip(ratings, values, strict=True) if r["system"] == BASE}
        paired = selected & np.array([(r["rater"], r["id"]) in base for r in ratings])
        less = np.array([base.get((r["rater"], r["id"]), 0.0) for r in ratings])
        result[kind] = _over_papers(ratings, (values - less) * paired, paired, papers, resamples, seed, 0.0)
    return result


def _over_papers(
    ratings: Sequence[Rating],
    values: np.ndarray,
    counted: np.ndarray,
    papers: list[str],
    resamples: int,
    seed: int,
    null: float | None,
) -> dict[str, Any]:
    place = {p: i for i, p in enumerate(papers)}
    at = [place[r["id"]] for r in ratings]
    sums = np.bincount(at, weights=values, minlength=len(papers))
    counts = np.bincount(at, weights=counted.astype(float), minlength=len(papers))
    return mean_over_papers(sums, counts, resamples, seed, null)


def _raters(ratings: Sequence[Rating], items: Mapping[str, Mapping[str, str]], raters: list[str]) -> dict[str, Any]:
    table, _ = _table(ratings, raters)
    shared = table[~np.isnan(table).any(axis=1)] if len(raters) > 1 else table[:0]
    result = {}
    for i, rater in enumerate(raters):
        scores = [r["score"] for r in ratings if r["rater"] == rater]
        result[rater] = {
            "items": sum(item["rater"] == rater for item in items.values()),
            "scored": len(scores),
            "mean": float(np.mean(scores)) if scores else None,
            "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            "offset": float(shared[:, i].mean() - shared.mean()) if len(shared) else None,
        }
    return result


def _table(ratings: Sequence[Rating], raters: list[str]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Scores [things, raters], NaN where there is none, and the (paper, system) of each row, by paper."""
    things = sorted({(r["id"], r["system"]) for r in ratings})
    row, column = {t: i for i, t in enumerate(things)}, {r: i for i, r in enumerate(raters)}
    table = np.full((len(things), len(raters)), np.nan)
    for r in ratings:
        table[row[r["id"], r["system"]], column[r["rater"]]] = r["score"]
    return table, things


def _agreement(ratings: Sequence[Rating], resamples: int, seed: int) -> dict[str, Any]:
    raters = sorted({r["rater"] for r in ratings})
    resamples = min(resamples, 1999)  # each resample is an analysis of variance of its own

    def blocks(rows: Sequence[Rating], complete: bool) -> list[np.ndarray]:
        table, things = _table(rows, raters)
        enough = (~np.isnan(table)).sum(axis=1) >= (len(raters) if complete else 2)
        of_paper = defaultdict(list)
        for keep, (paper, _), row in zip(enough, things, table, strict=True):
            if keep:
                of_paper[paper].append(row)
        return [np.array(rows) for rows in of_paper.values()]

    if len(raters) < 2:
        nothing = {"value": None, "low": None, "high": None}
        coefficients = dict.fromkeys(AGREEMENT, nothing)
        return {"items": 0, "papers": 0, "raters": len(raters)} | _named(coefficients)
    measured = [r for r in ratings if category(r["system"]) != OTHERS]
    all_scored = blocks(ratings, complete=True)
    return {
        "items": sum(map(len, all_scored)),
        "papers": len(all_scored),
        "raters": len(raters),
        **_named(
            {
                "icc": interval_over_papers(icc, all_scored, resamples, seed),
                "icc_without_others": interval_over_papers(icc, blocks(measured, complete=True), resamples, seed),
                "alpha": interval_over_papers(alpha, blocks(ratings, complete=False), resamples, seed),
            }
        ),
    }


def _named(coefficients: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Each coefficient with its name and FeynTune's value, for who shows it."""
    return {key: {**c, "name": AGREEMENT[key], "published": PUBLISHED[key]} for key, c in coefficients.items()}


def markdown(summary: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    show = lambda v, form=".2f": "–" if v is None else format(v, form)
    interval = lambda d: f"{show(d['mean'], '+.2f')} [{show(d['low'], '+.2f')}, {show(d['high'], '+.2f')}]"
    lines = [f"{summary['scored']} of {summary['of']} items scored, {summary['papers']} papers.", ""]
    lines += ["| system | n | mean (sd) | z | minus base (95 %) | Holm p | published mean |", "|---|" + "---:|" * 6]
    published = summary["published"]["categories"]
    for group, of in (("", summary["systems"]), ("all ", summary["categories"])):
        for name, f in of.items():
            if group and name == BASE:
                continue
            d = f.get("difference")
            cells = [group + name, str(f["n"]), f"{f['mean']:.2f} ({show(f['sd'])})", f"{f['z_mean']:+.2f}"]
            cells += [interval(d) if d else "", show(d.get("p_holm"), ".2g") if d else ""]
            cells.append(show(published.get(name)) if group or name == BASE else "")
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| rater | scored | mean (sd) | offset |", "|---|---:|---:|---:|"]
    for name, r in summary["raters"].items():
        cells = [
            name,
            f"{r['scored']} of {r['items']}",
            f"{show(r['mean'])} ({show(r['sd'])})",
            show(r["offset"], "+.2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| agreement | ours (95 %) | published |", "|---|---:|---:|"]
    for key, words in AGREEMENT.items():
        a = summary["agreement"][key]
        shown = f"{show(a['value'])} [{show(a['low'])}, {show(a['high'])}]"
        lines.append(f"| {words} | {shown} | {summary['published'][key]:.2f} |")
    lines += ["", *(f"- {key}: {text}" for key, text in summary["how"].items())]
    return "\n".join(lines) + "\n"
