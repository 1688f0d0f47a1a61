"""A study and judges in a comparison: whether they belong to it, their tables, and their part of the report.

Both are read from their artifacts alone: summary.json and summary.md of a `study-result`, summary.json and rubric.txt
of a `judgment`.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from feyntune.artifacts.artifact import Manifest, open_artifact
from feyntune.artifacts.completions import completions_in
from feyntune.errors import UserError
from feyntune.evaluation.report import ticks
from feyntune.names import BASE

HOW_JUDGED = {
    "win_rate": (
        "share of papers on which the judge preferred the system, a tie counting one half; every paper is judged in "
        "both orders and counts their mean, papers with one usable answer are left out"
    ),
    "flipped": "papers on which the winner changed with the order",
    "share_first": "how often the text shown first won, among answers with a winner: one half without position bias",
    "interval": "95 %, percentiles of a bootstrap that draws papers",
    "p_holm": "two-sided against one half, by flipping outcomes of whole papers, Holm-adjusted over pairs",
}


def attach(
    evaluations: Mapping[str, Manifest], people: str | Path | None, judges: Sequence[str | Path]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a `study-result` and `judgment`s that were made on these evaluations' completions.

    Returns:
        `study` and `judges` for the summary (each only where given), and the digests for the inputs.

    Raises:
        UserError: made on another test set, or on other completions of a system that is compared.
        ArtifactError: a folder is damaged or of another kind.
    """
    result: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    if people is not None:
        manifest = open_artifact(people, "study-result")
        _check(people, manifest, evaluations)
        text = (Path(people) / "summary.md").read_text(encoding="utf-8")
        result |= {
            "study": json.loads((Path(people) / "summary.json").read_text(encoding="utf-8")),
            "study_markdown": text,
        }
        inputs["study"] = manifest.digest
    for folder in judges:
        manifest = open_artifact(folder, "judgment")
        _check(folder, manifest, evaluations)
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        name = summary["judge"]["name"]
        if f"judge {name}" in inputs:
            raise UserError(f"Judge {name} is there twice, the second time in {folder}: leave one out.")
        result.setdefault("judges", []).append(
            {**summary, "rubric": (Path(folder) / "rubric.txt").read_text(encoding="utf-8")}
        )
        inputs[f"judge {name}"] = manifest.digest
    return result, inputs


def _check(folder: str | Path, manifest: Manifest, evaluations: Mapping[str, Manifest]) -> None:
    test = evaluations[BASE].inputs["test"]
    if manifest.inputs["test"] != test:
        raise UserError(
            f"{folder} was made on test set {manifest.inputs['test'][:16]}, the evaluations on {test[:16]}: give one "
            "made on these evaluations."
        )
    for name, evaluation in evaluations.items():
        used = manifest.inputs.get(f"completions of {name}")
        path = completions_in(evaluation).get(name)
        if used is not None and (path is None or evaluation.files[path].sha256 != used):
            raise UserError(
                f"{folder} was made on other completions of {name} ({used[:16]}) than those evaluated: make it again "
                "on these."
            )


def tables(summary: dict[str, Any]) -> dict[str, str]:
    """Files for the comparison beside its own: study.csv and judges.csv, each only where there is one."""
    result = {}
    if "study" in summary:
        rows = []
        for kind in ("systems", "categories"):
            for name, f in summary["study"][kind].items():
                row = {"kind": kind, "name": name, **{k: f[k] for k in ("n", "mean", "sd", "z_mean")}}
                for key in ("difference", "z_difference"):
                    d = f.get(key, {})
                    row |= {f"{key}_{k}".removesuffix("_mean"): d.get(k) for k in ("mean", "low", "high", "p_holm")}
                published = summary["study"]["published"]["categories"]
                row["published"] = published.get(name) if kind == "categories" else None
                rows.append(row)
        result["study.csv"] = _csv(rows)
    if "judges" in summary:
        rows = [
            {
                "judge": judge["judge"]["name"],
                **{k: d[k] for k in ("system", "against", "papers", "wins", "ties", "losses", "flipped", "score")},
                **{f"win_rate_{k}".removesuffix("_mean"): d["win_rate"].get(k) for k in ("mean", "low", "high")},
                "p_holm": d["win_rate"].get("p_holm"),
            }
            for judge in summary["judges"]
            for d in judge["duels"]
        ]
        result["judges.csv"] = _csv(rows)
    return result


def appendix(summary: dict[str, Any]) -> str:
    """The sections of table.md on the study and the judges; empty where there are none."""
    text = ""
    if "study" in summary:
        text += "\n## Study\n\n" + summary["study_markdown"]
    if "judges" in summary:
        text += "\n## Judges\n\n| judge | system | against | papers | win rate (95 %) | Holm p | flipped |\n"
        text += "|---|---|---|---:|---:|---:|---:|\n"
        for judge in summary["judges"]:
            for d in judge["duels"]:
                w = d["win_rate"]
                rate = "" if w["low"] is None else f"{w['mean']:.0%} [{w['low']:.0%}, {w['high']:.0%}]"
                p = "" if w.get("p_holm") is None else f"{w['p_holm']:.2g}"
                text += f"| {judge['judge']['name']} | {d['system']} | {d['against']} | {d['papers']} | {rate} | {p} "
                text += f"| {d['flipped']} |\n"
    return text


def page(summary: dict[str, Any]) -> dict[str, Any]:
    """What people.html.jinja shows: sentences, table rows, and the positions of the charts' marks in percent."""
    result: dict[str, Any] = {"study": None, "judges": [], "how_judged": HOW_JUDGED}
    if "study" in summary:
        study = summary["study"]
        none = {"difference": None, "z_difference": None}  # the base's
        rows = []
        for name, f in study["systems"].items():
            published = study["published"]["categories"][BASE] if name == BASE else None
            rows.append({"name": name, "published": published, **none, **f})
        groups = [
            {"name": name, "published": study["published"]["categories"].get(name), **none, **f}
            for name, f in study["categories"].items()
        ]
        bars = [(r["name"], r["difference"]) for r in rows if r["name"] != BASE]
        agreement = [a for a in study["agreement"].values() if isinstance(a, dict)]
        result["study"] = {
            "figures": study,
            "rows": rows,
            "groups": groups,
            "agreement": agreement,
            "chart": _chart(bars, 0.0),
            "sentences": _study_sentences(study),
        }
    for judge in summary.get("judges", []):
        bars = [
            (d["system"] if d["against"] == BASE else f"{d['system']} against {d['against']}", d["win_rate"])
            for d in judge["duels"]
        ]
        result["judges"].append({**judge, "chart": _chart(bars, 0.5), "sentences": _judge_sentences(judge)})
    return result


def _chart(bars: list[tuple[str, Mapping[str, Any]]], null: float) -> dict[str, Any] | None:
    """Means with intervals around `null`."""
    bars = [(name, b) for name, b in bars if b["low"] is not None]
    if not bars:
        return None
    ends = [null, *(b[k] for _, b in bars for k in ("low", "high"))]
    room = 0.05 * (max(ends) - min(ends)) or 0.05
    low, high = min(ends) - room, max(ends) + room
    at = lambda value: round(100 * (value - low) / (high - low), 2)
    return {
        "null": at(null),
        "ticks": [(at(t), t) for t in ticks(low, high)],
        "rows": [
            {"name": name, "value": b, **{k: at(b[k]) for k in ("low", "mean", "high")}, "method": _method(name)}
            for name, b in bars
        ],
    }


def _method(name: str) -> str:
    return "all" if name.endswith("/lora-all") else "qkv" if name.endswith("/lora-qkv") else "other"


def _study_sentences(study: dict[str, Any]) -> list[str]:
    raters = sum(r["scored"] > 0 for r in study["raters"].values())
    sentences = [
        f"{raters} rater{'s' if raters != 1 else ''} scored {study['scored']:,} of {study['of']:,} completions of "
        f"{study['papers']} papers from 1 to 10, in random order and without knowing whose they were."
    ]
    better = [n for n, f in study["systems"].items() if n != BASE and _significant(f["difference"], 0.0)]
    worse = [n for n, f in study["systems"].items() if n != BASE and _significant(f["difference"], 0.0, -1)]
    others = len(study["systems"]) - 1
    sentences.append(
        f"{len(better)} of {others} system{'s' if others != 1 else ''} scored significantly above the base"
        + (f", {len(worse)} significantly below it" if worse else "")
        + " (95 % CI, Holm-adjusted p < 0.05)."
    )
    smallest = others * 2.0 ** (1 - study["papers"])  # all papers agree, the least likely of all signs
    if smallest >= 0.05:
        sentences.append(
            f"{study['papers']} papers are too few for any significant result: if all of them agreed, p would still be "
            f"{min(1.0, smallest):.2f}."
        )
    icc = study["agreement"]["icc"]["value"]
    if icc is not None:
        word = "poor" if icc < 0.5 else "moderate" if icc < 0.75 else "good"
        sentences.append(
            f"Raters' agreement is {word} (ICC {icc:.2f}; below 0.5 is called poor, Koo & Li 2016): differences of a "
            "few tenths between systems should not be read as a ranking unless their intervals say so."
        )
    return sentences


def _judge_sentences(judge: dict[str, Any]) -> list[str]:
    about, position, unusable = judge["judge"], judge["position"], judge["unusable"]
    answers = f"{about['answers']:,} of {about['questions']:,} questions were answered"
    sentences = [f"{answers}, {unusable['count']:,} gave no usable judgment; they cost {about['cost']:.4g}."]
    if about["stopped"]:
        sentences.append(f"The judge {about['stopped']}.")
    share = position["share_first"]
    if share["low"] is not None:
        biased = share["low"] > 0.5 or share["high"] < 0.5
        sentences.append(
            f"The text shown first won {share['mean']:.0%} of the decided answers ({share['low']:.0%} to "
            f"{share['high']:.0%}): {'a position bias' if biased else 'no significant position bias'}; each paper is "
            "judged in both orders, so it does not favor a system."
        )
    if about["judges_itself"]:
        sentences.append(f"The judge is the model of {', '.join(about['judges_itself'])}: it may favor its own texts.")
    return sentences


def _significant(difference: dict[str, Any], null: float, sign: int = 1) -> bool:
    if difference["low"] is None or (difference.get("p_holm") or 0) >= 0.05:
        return False
    return difference["low"] > null if sign > 0 else difference["high"] < null


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
