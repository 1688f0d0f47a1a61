"""Hold every variant against the base on the same abstracts, and write the verdict, the tables and the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, read_manifest, write_artifact
from feyntune.errors import UserError
from feyntune.evaluation import completion_stats as completed
from feyntune.evaluation import report_sections as heard
from feyntune.evaluation import statistics
from feyntune.evaluation.config import CompareConfig, decisive
from feyntune.evaluation.evaluate import category_of
from feyntune.evaluation.report import budget, render, verdict
from feyntune.names import BASE, slug

# Perplexity on the hep-th test set, mean over abstracts (FeynTune, arXiv 2508.03716).
PUBLISHED = {BASE: 11.20, "hep-th+hep-ph+gr-qc/lora-all": 9.83}

HOW = {
    "abstract_mean": "exp of the mean loss over an abstract's text tokens, averaged over abstracts (FeynTune's)",
    "token": "exp of the mean loss over the text tokens of all abstracts together",
    "special_tokens": "BOS before every abstract; EOS is not counted, except in the figures named with_eos",
    "delta": "variant minus base, paired by abstract: mean of the differences of per-abstract perplexity",
    "interval": "95 %, percentiles of a bootstrap that draws abstracts in pairs",
    "p_holm": "two-sided, from the same bootstrap, after Holm's correction over the variants",
    "effect": "mean of the paired differences over their standard deviation",
}


def compare(
    evaluations: Sequence[str | Path],
    adapters: Mapping[str, str | Path],
    data: str | Path,
    out: str | Path,
    corpus: str | Path | None = None,
    failures: Sequence[str | Path] = (),
    config: CompareConfig | None = None,
    places: Mapping[str, str] | None = None,
    people: str | Path | None = None,
    judges: Sequence[str | Path] = (),
) -> Manifest:
    """Compare all measured systems into a sealed `comparison`: summary.json, table.md, table.csv, report.html.

    Where they completed texts, completions.csv holds every measure on those.

    Args:
        evaluations: sealed `evaluation` folders that together hold the base and every variant once.
        adapters: the sealed `adapter` of every variant, by name.
        data: the sealed `split` they were scored on.
        corpus: the sealed `corpus` of the split, for its figures in the report.
        failures: sealed `failure` folders of branches that gave no result.
        places: where each adapter is kept in the store, by name; goes into the summary for `register`.
        people, judges: a sealed `study-result` and `judgement`s made on completions in these evaluations.

    Raises:
        UserError: the base or a variant is missing or there twice; a variant was measured on another test set, on
            another base or with other settings, or is not the adapter given; people or a judge saw other completions.
        ArtifactError: a folder is damaged or of another kind.
    """
    config = config or CompareConfig()
    out = Path(out)
    split = open_artifact(data, "split")
    systems = _systems(evaluations, split.digest)
    variants = [name for name in systems if name != BASE]
    sealed = {name: _adapter_of(systems[name], adapters) for name in variants}
    base = systems[BASE]
    failed = [_failure(folder) for folder in failures]

    inputs = {"split": split.digest, "base": base.manifest.inputs["base"], "test": base.manifest.inputs["test"]}
    inputs |= {f"evaluation of {name}": s.manifest.digest for name, s in systems.items()}
    inputs |= {f"adapter of {name}": m.digest for name, m in sealed.items()}
    said, digests = heard.attach({name: s.manifest for name, s in systems.items()}, people, judges)
    inputs |= digests
    counts: dict[str, Any] = {}
    if corpus is not None:
        inputs["corpus"] = open_artifact(corpus, "corpus").digest
        counts = json.loads((Path(corpus) / "counts.json").read_text())
    stored = {**config.model_dump(mode="json"), "failures": failed, "places": dict(places or {})}
    if (out / MANIFEST).is_file():
        done = open_artifact(out, "comparison")
        if (done.inputs, done.config) == (inputs, stored):
            return done
        raise UserError(f"{out} holds a comparison of something else: choose another folder.")

    groups = _groups(base, config)
    summary: dict[str, Any] = {
        **_measure(systems, groups, config),
        "failures": failed,
        "champion": None,  # the register step decides
        "corpus": {"digest": inputs.get("corpus", split.inputs.get("corpus", ""))},
        "split": {"digest": split.digest},
        "how": {**HOW, **{k: base.manifest.stats.get(k) for k in ("precision", "attention", "hardware")}},
    }
    summary["how"] |= {"resamples": config.resamples, "seed": config.seed}
    summary["base"]["digest"] = inputs["base"]
    for name, manifest in sealed.items():
        variant = summary["variants"][name]
        variant |= {"promoted": None, "adapter_sha256": manifest.files["adapter_model.safetensors"].sha256}
        variant |= {key: manifest.stats.get(key) for key in ("train_tokens", "seconds")}
        if places and name in places:
            variant["adapter"] = places[name]
    summary |= said
    curves = {name: json.loads((Path(adapters[name]) / "curve.json").read_text()) for name in variants}
    summary["budget"] = _budget(systems, groups.decisive, summary["variants"], curves, config)
    tables = completed.read({n: s.folder for n, s in systems.items()}, {n: s.manifest for n, s in systems.items()})
    if tables is not None:
        summary["completions"] = completed.figures(tables, {n: s.manifest for n, s in systems.items()}, config)
        for name, found in summary["completions"]["memorisation"].items():
            (summary["base"] if name == BASE else summary["variants"][name])["memorisation"] = found["test"]["share"]
    rows = table(summary)
    summary["verdict"] = _verdict(systems, groups.decisive, rows, config)
    if tables is not None:
        decoding = summary["completions"]["settings"]["decodings"][0]
        summary["completions"]["examples"] = completed.examples(tables, [r["system"] for r in rows], decoding)

    with write_artifact(out, "comparison", inputs, stored) as folder:
        (folder.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (folder.path / "table.csv").write_text(completed.to_csv(rows))
        if "completions" in summary:
            long = completed.rows(summary["completions"])
            (folder.path / "completions.csv").write_text(completed.to_csv(long))
        (folder.path / "table.md").write_text(_markdown(rows, summary) + heard.appendix(summary))
        for name, text in heard.tables(summary).items():
            (folder.path / name).write_text(text)
        audit = json.loads((Path(data) / "audit.json").read_text())
        manifests = {"split": split, "evaluation": base.manifest, **sealed}
        if corpus is not None:
            manifests["corpus"] = read_manifest(corpus)
        page = render(summary, rows, curves, counts, audit, manifests, heard.page(summary))
        (folder.path / "report.html").write_text(page)
    return open_artifact(out, "comparison")


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
                "published": PUBLISHED.get(name) if summary["test"]["category"] == "hep-th" else None,
                **_of_completions(summary.get("completions"), name),
                "memorisation": system.get("memorisation"),
                "adapter_sha256": system.get("adapter_sha256"),
            }
        )
    return rows


def _of_completions(completions: dict[str, Any] | None, system: str) -> dict[str, float | None]:
    """The columns of the table that come from the first decoding's completions of test papers; None without any."""
    found: dict[str, float | None] = {}
    for stop, before in completed.STOPS.items():
        for measure in ("similarity", "similarity_with_prompt", "distinct_2", "repeated_4", "compression", "stopped"):
            if (stop, measure) == ("fair", "stopped"):
                continue
            figure: dict[str, Any] = {}
            if completions is not None:
                decoding = completions["settings"]["decodings"][0]
                figure = completions["figures"]["test"][decoding][stop][system].get(measure, {})
            found[before + measure] = figure.get("mean")
            if measure == "similarity":
                delta = figure.get("delta", {})
                found |= {f"{before}{measure}_delta{end}": delta.get(k) for end, k in _ENDS.items()}
                found[f"{before}{measure}_p_holm"] = figure.get("p_holm")
    return found


_ENDS = {"": "mean", "_low": "low", "_high": "high"}


@dataclass
class _System:
    """One system's evaluation and scores: columns of feyntune.evaluation.evaluate.SCHEMA, sorted by id."""

    name: str
    folder: Path
    manifest: Manifest
    scores: dict[str, np.ndarray]

    def only(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {column: values[rows] for column, values in self.scores.items()}


def _systems(evaluations: Sequence[str | Path], split: str) -> dict[str, _System]:
    """The base first, then the variants by name; all on the same abstracts in the same order."""
    found: dict[str, _System] = {}
    for folder in map(Path, evaluations):
        manifest = open_artifact(folder, "evaluation")
        names = sorted(manifest.inputs.keys() - {"split", "base", "test"})
        for name in ([BASE] if manifest.config["include_base"] else []) + names:
            if name in found:
                raise UserError(f"{name} is measured twice, the second time in {folder}: leave one out.")
            scores = pq.read_table(folder / "scores" / f"{slug(name)}.parquet").sort_by("id")
            found[name] = _System(name, folder, manifest, {c: scores[c].to_numpy() for c in scores.column_names})
    if BASE not in found:
        raise UserError("The base model was not measured: add its evaluation, every variant is compared with it.")
    base = found.pop(BASE)
    if base.manifest.inputs["split"] != split:
        raise UserError(
            f"The base was measured on split {base.manifest.inputs['split'][:16]}, not on {split[:16]}: "
            "give the split it was measured on."
        )
    for name in found:
        _check_like(base, found[name])
    return {BASE: base, **{name: found[name] for name in sorted(found)}}


def _check_like(base: _System, other: _System) -> None:
    mine, theirs = base.manifest, other.manifest
    for what, key in (("test set", "test"), ("base model", "base")):
        if mine.inputs[key] != theirs.inputs[key]:
            raise UserError(
                f"{other.name} was measured on {what} {theirs.inputs[key][:16]}, the base on {mine.inputs[key][:16]}: "
                "measure both alike."
            )
    for setting in mine.config.keys() - {"include_base"}:
        if mine.config[setting] != theirs.config.get(setting):
            raise UserError(
                f"{other.name} was measured with {setting} {theirs.config.get(setting)}, the base with "
                f"{mine.config[setting]}: measure both alike."
            )
    if base.scores["id"].tolist() != other.scores["id"].tolist():
        raise UserError(f"{other.name} was not measured on the abstracts of the base: evaluate it again.")


def _adapter_of(system: _System, adapters: Mapping[str, str | Path]) -> Manifest:
    if system.name not in adapters:
        raise UserError(f"{system.name} was measured but its adapter is not given: add it.")
    manifest = open_artifact(adapters[system.name], "adapter")
    if manifest.digest != system.manifest.inputs[system.name]:
        raise UserError(
            f"{adapters[system.name]} is not the adapter {system.name} that was measured "
            f"({system.manifest.inputs[system.name][:16]}): give that one."
        )
    return manifest


def _failure(folder: str | Path) -> dict[str, str]:
    open_artifact(folder, "failure")
    outcome = json.loads((Path(folder) / "outcome.json").read_text())
    return {k: outcome[k] for k in ("variant", "step", "error")}


@dataclass
class _Groups:
    """Masks over the scored abstracts: those that decide, the hold-out beside them, and each category's test set."""

    category: str
    decisive: np.ndarray
    holdout: np.ndarray
    categories: dict[str, np.ndarray]


def _groups(base: _System, config: CompareConfig) -> _Groups:
    scored: list[str] = base.manifest.config["categories"]
    category = decisive(scored, config.category)
    if category not in (*scored, None):
        raise UserError(f"No abstract of {category} was scored, only {', '.join(scored)}: choose one of those.")
    of = np.array([category_of(primary, scored) for primary in base.scores["primary"]])
    test, mine = base.scores["split"] == "test", np.ones(len(of), bool) if category is None else of == category
    by_category = {c: test & (of == c) for c in scored}
    return _Groups(category or "+".join(scored), test & mine, ~test & mine, by_category)


def _measure(systems: dict[str, _System], groups: _Groups, config: CompareConfig) -> dict[str, Any]:
    """All figures of all systems on each group that has at least two abstracts."""
    base = systems[BASE]
    figures = _figures(systems, groups.decisive, config)
    found: dict[str, Any] = {"base": figures.pop(BASE), "variants": figures}
    found["test"] = {
        "digest": base.manifest.inputs["test"],
        "abstracts": int(groups.decisive.sum()),
        "tokens": int(base.scores["n_tokens"][groups.decisive].sum()),
        "category": groups.category,
        "categories": list(groups.categories),
    }
    if groups.holdout.sum() >= 2:
        systems_there = _figures(systems, groups.holdout, config)
        found["holdout"] = {"abstracts": int(groups.holdout.sum()), "systems": systems_there}
    if len(groups.categories) > 1:
        found["transfer"] = {
            category: {"abstracts": int(rows.sum()), "systems": _figures(systems, rows, config)}
            for category, rows in groups.categories.items()
            if rows.sum() >= 2
        }
    return found


def _figures(systems: dict[str, _System], rows: np.ndarray, config: CompareConfig) -> dict[str, dict[str, Any]]:
    """By system, over the abstracts `rows` (a mask)."""
    scores = {name: system.only(rows) for name, system in systems.items()}
    found: dict[str, dict[str, Any]] = {
        name: {
            "perplexity": statistics.perplexity(s),
            "bits_per_byte": statistics.bits_per_byte(s),
            "entropy": statistics.entropy(s),
        }
        for name, s in scores.items()
    }
    base = scores.pop(BASE)
    for name, difference in statistics.paired_bootstrap(base, scores, config.resamples, config.seed).items():
        found[name] |= difference
    return found


def _verdict(
    systems: dict[str, _System], rows: np.ndarray, ranked: list[dict[str, Any]], config: CompareConfig
) -> dict[str, Any]:
    """The best variant surely below the base, and whether it is surely ahead of the next one."""
    better = [r["system"] for r in ranked[1:] if r["delta_high"] < 0 and r["p_holm"] < 0.05]
    found: dict[str, Any] = {"best": better[0] if better else None, "better_than_base": len(better), "lead": None}
    if len(better) > 1:
        first, second = better[:2]
        pair = {first: systems[first].only(rows)}
        lead = statistics.paired_bootstrap(systems[second].only(rows), pair, config.resamples, config.seed)
        found["lead"] = {"over": second, **lead[first]["delta"]}
    return found


def _budget(
    systems: dict[str, _System],
    rows: np.ndarray,
    variants: dict[str, Any],
    curves: Mapping[str, Any],
    config: CompareConfig,
) -> dict[str, Any]:
    """How much each variant was trained, and the comparisons in which that is no excuse.

    `matched`: whether all variants saw the same number of tokens, within 5 %. `groups`: variants that did among
    themselves, the best first, each other one minus the best paired by abstract. `steps`: those of the variant with
    the fewest tokens; a suite run with them compares mixtures at equal compute.
    """
    known = {n: v["train_tokens"] for n, v in variants.items() if v.get("train_tokens")}
    if not known:
        return {"matched": False, "groups": [], "smallest": None, "steps": None}
    smallest = min(known, key=known.__getitem__)
    groups: list[list[str]] = []
    for name in sorted(known, key=lambda n: (known[n], n)):
        if groups and known[name] <= 1.05 * known[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    found = []
    for names in (g for g in groups if len(g) > 1):
        best = min(names, key=lambda n: variants[n]["delta"]["mean"])
        others = {n: systems[n].only(rows) for n in names if n != best}
        behind = statistics.paired_bootstrap(systems[best].only(rows), others, config.resamples, config.seed)
        ranked = sorted(behind, key=lambda n: behind[n]["delta"]["mean"])
        found.append(
            {
                "tokens": [min(known[n] for n in names), max(known[n] for n in names)],
                "best": best,
                "behind": [{"system": n, **{k: behind[n][k] for k in ("delta", "p_holm")}} for n in ranked],
            }
        )
    return {
        "matched": len(groups) == 1 and len(known) > 1,
        "spread": max(known.values()) / min(known.values()),
        "groups": found,
        "smallest": smallest,
        "steps": len(curves[smallest]["loss"]),
    }


def _markdown(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    head = ["system", "perplexity (mean over abstracts)", "token-weighted", "bits per byte", "minus base (95 %)"]
    head += ["Holm p", "train tokens", "published"]
    lines = [*verdict(summary), "", *_head(head)]
    for r in rows:
        cells = [r["system"], _show(r["abstract_mean"], ".3f"), _show(r["token"], ".3f")]
        cells.append(_show(r["bits_per_byte"], ".4f"))
        cells.append(f"{r['delta']:+.3f} [{r['delta_low']:+.3f}, {r['delta_high']:+.3f}]" if r["p_holm"] else "")
        cells += [_show(r["p_holm"], ".2g"), _show(r["train_tokens"], ","), _show(r["published"], ".2f")]
        lines.append("| " + " | ".join(cells) + " |")
    for f in summary["failures"]:
        lines.append(f"| {f['variant']} | failed in {f['step']}: {f['error']} |" + "  |" * 6)
    test = summary["test"]
    lines += ["", f"{test['abstracts']:,} test abstracts of {test['category']}, test set {test['digest'][:16]}."]
    lines += ["", budget(summary)] if budget(summary) else []
    if "completions" in summary:
        lines += _markdown_completions([r["system"] for r in rows], summary["completions"])
    return "\n".join(lines) + "\n"


def _markdown_completions(systems: list[str], completions: dict[str, Any]) -> list[str]:
    lines = []
    for split, by_decoding in completions["figures"].items():
        for decoding, by_stop in by_decoding.items():
            for stop, figures in by_stop.items():
                measures = list(figures[BASE])
                lines += [
                    "",
                    f"Completions of {completions['papers'][split]} {split} papers, {decoding}, {stop} stop",
                    "",
                ]
                lines += _head(["system", *measures])
                for name in systems:
                    cells = [_show(figures[name][m]["mean"], ".3f") for m in measures]
                    lines.append("| " + " | ".join([name, *cells]) + " |")
                own = completions["reference"][split]
                lines.append("| true rest | " + " | ".join(_show(own.get(m), ".3f") for m in measures) + " |")
    if "missing" in completions["similarity"]:
        lines += ["", f"No semantic similarity: {completions['similarity']['missing']}"]
    return lines


def _head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
