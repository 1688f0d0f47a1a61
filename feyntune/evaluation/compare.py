"""Hold every variant against the base on the same abstracts, and write the conclusion, the tables and the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, read_manifest, write_artifact
from feyntune.artifacts.names import split_pin
from feyntune.conditions import CONDITIONS, Conditions, differences, read_conditions
from feyntune.errors import UserError
from feyntune.evaluation import completion_stats, extraction, human_and_judge_sections, seeds, statistics, task_sections
from feyntune.evaluation.config import CompareConfig, ExtractionConfig, primary_category
from feyntune.evaluation.equal_tokens import equal_tokens
from feyntune.evaluation.evaluate import category_of
from feyntune.evaluation.report import render
from feyntune.evaluation.retention import SPLIT as RETENTION
from feyntune.evaluation.tables import table, to_markdown
from feyntune.names import BASE, slug
from feyntune.statistics import against_the_best

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
    adapter_uris: Mapping[str, str] | None = None,
    people: str | Path | None = None,
    judges: Sequence[str | Path] = (),
    tasks: Sequence[str | Path] = (),
) -> Manifest:
    """Compare all measured systems into a sealed `comparison`: summary.json, table.md, table.csv, report.html.

    Where they completed texts, completions.csv holds every measure on those.

    Args:
        evaluations: sealed `evaluation` folders that together hold the base and every variant once.
        adapters: the sealed `adapter` of every variant, by name.
        data: the sealed `split` they were scored on.
        corpus: the sealed `corpus` of the split, for its figures in the report.
        failures: sealed `failure` folders of branches that gave no result.
        adapter_uris: where each adapter lies in the store, by name; goes into the summary for `register`.
        people, judges: a sealed `study-result` and `judgment`s made on completions in these evaluations.

        tasks: sealed `tasks` of the same base and adapters.

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
    opinions, digests = human_and_judge_sections.attach(
        {name: s.manifest for name, s in systems.items()}, people, judges
    )
    inputs |= digests
    digest_of = {name: m.digest for name, m in sealed.items()}
    benchmarks, digests = task_sections.attach(tasks, inputs["base"], digest_of, config.resamples, config.seed)
    inputs |= digests
    counts: dict[str, Any] = {}
    if corpus is not None:
        inputs["corpus"] = open_artifact(corpus, "corpus").digest
        counts = json.loads((Path(corpus) / "counts.json").read_text(encoding="utf-8"))
    settings = {**config.model_dump(mode="json"), "failures": failed, "adapter_uris": dict(adapter_uris or {})}
    if (out / MANIFEST).is_file():
        done = open_artifact(out, "comparison")
        if (done.inputs, done.config) == (inputs, settings):
            return done
        raise UserError(f"{out} holds another comparison: choose another folder.")

    groups = _groups(base, config)
    curves = {name: json.loads((Path(adapters[name]) / "curve.json").read_text(encoding="utf-8")) for name in variants}
    members = seeds.group({name: int(m.config.get("seed", 0)) for name, m in sealed.items()})
    validation = {name: _last_validation(curve) for name, curve in curves.items()}
    chosen = {variant: seeds.representative(by_seed, validation) for variant, by_seed in members.items()}
    of_seeds = None
    if any(len(by_seed) > 1 for by_seed in members.values()):
        each = {name: statistics.per_abstract(s.only(groups.primary)) for name, s in systems.items()}
        of_seeds = seeds.figures(members, chosen, each[BASE], each, validation)
    # From here on a variant is the one of its seeds that stands for it.
    measured_as = {BASE: BASE, **{variant: members[variant][seed] for variant, seed in chosen.items()}}
    systems = {name: systems[system] for name, system in measured_as.items()}
    sealed, curves = ({v: kind[measured_as[v]] for v in members} for kind in (sealed, curves))
    summary: dict[str, Any] = {
        **_measure(systems, groups, config),
        **({} if of_seeds is None else {"seeds": of_seeds}),
        "failures": failed,
        "champion": None,  # the register step decides
        "corpus": {"digest": inputs.get("corpus", split.inputs.get("corpus", ""))},
        "split": {"digest": split.digest},
        "conditions": base.conditions.model_dump() if base.conditions else None,
        "how": {**HOW, "hardware": base.manifest.stats.get("hardware")},
    }
    summary["how"] |= {k: (summary["conditions"] or {}).get(k) for k in ("precision", "attention")}
    summary["how"] |= {"resamples": config.resamples, "seed": config.seed}
    summary["base"] |= {"digest": inputs["base"], "name": _base_name(adapters, variants)}
    for name, manifest in sealed.items():
        variant = summary["variants"][name]
        variant |= {
            "promoted": None,
            "seed": chosen[name],
            "adapter_sha256": manifest.files["adapter_model.safetensors"].sha256,
        }
        variant |= {key: manifest.stats.get(key) for key in ("train_tokens", "seconds")}
        if adapter_uris and measured_as[name] in adapter_uris:
            variant["adapter"] = adapter_uris[measured_as[name]]
    summary |= opinions | benchmarks
    summary["budget"] = _budget(systems, groups.primary, summary["variants"], curves, config)
    summary["budget"]["validation"] = equal_tokens(
        curves, {n: v["train_tokens"] for n, v in summary["variants"].items()}
    )
    completions = completion_stats.read(
        {n: s.folder for n, s in systems.items()}, {n: s.manifest for n, s in systems.items()}, measured_as
    )
    if completions is not None:
        summary["completions"] = completion_stats.figures(
            completions, {n: s.manifest for n, s in systems.items()}, measured_as, config
        )
        for name, measured in summary["completions"]["memorization"].items():
            system = summary["base"] if name == BASE else summary["variants"][name]
            system["memorization"] = measured["test"]["share"]
    summary |= _extraction(systems, measured_as, config)
    summary |= _as_served(systems, measured_as)
    rows = table(summary)
    summary["conclusion"] = _conclusion(systems, groups.primary, rows, config)
    if of_seeds is not None:
        best = None if of_seeds["tied"] else of_seeds["best"]
        summary["conclusion"] = {"best": best, "better_than_base": of_seeds["better_than_base"], "lead": None}
    if completions is not None:
        decoding = summary["completions"]["settings"]["decodings"][0]
        summary["completions"]["examples"] = completion_stats.examples(
            completions, [r["system"] for r in rows], decoding
        )

    with write_artifact(out, "comparison", inputs, settings) as folder:
        (folder.path / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (folder.path / "table.csv").write_text(completion_stats.to_csv(rows), encoding="utf-8")
        if "completions" in summary:
            long = completion_stats.rows(summary["completions"])
            (folder.path / "completions.csv").write_text(completion_stats.to_csv(long), encoding="utf-8")
        (folder.path / "table.md").write_text(
            to_markdown(rows, summary)
            + seeds.appendix(summary)
            + extraction.appendix(summary)
            + task_sections.appendix(summary)
            + human_and_judge_sections.appendix(summary),
            encoding="utf-8",
        )
        for name, text in human_and_judge_sections.tables(summary).items():
            (folder.path / name).write_text(text, encoding="utf-8")
        audit = json.loads((Path(data) / "audit.json").read_text(encoding="utf-8"))
        manifests = {"split": split, "evaluation": base.manifest, **sealed}
        if corpus is not None:
            manifests["corpus"] = read_manifest(corpus)
        page = render(summary, rows, curves, counts, audit, manifests, human_and_judge_sections.page(summary))
        (folder.path / "report.html").write_text(page, encoding="utf-8")
    return open_artifact(out, "comparison")


@dataclass
class _System:
    """One system's evaluation and scores: columns of feyntune.evaluation.evaluate.SCHEMA, sorted by id."""

    name: str
    folder: Path
    manifest: Manifest
    conditions: Conditions | None
    scores: dict[str, np.ndarray]

    def only(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {column: values[rows] for column, values in self.scores.items()}


def _systems(evaluations: Sequence[str | Path], split: str) -> dict[str, _System]:
    """The base first, then the variants by name; all on the same abstracts in the same order."""
    result: dict[str, _System] = {}
    for folder in map(Path, evaluations):
        manifest = open_artifact(folder, "evaluation")
        names = sorted(manifest.inputs.keys() - {"split", "base", "test", "retention"})
        record = (folder / CONDITIONS).read_bytes() if CONDITIONS in manifest.files else None
        for name in ([BASE] if manifest.config["include_base"] else []) + names:
            if name in result:
                raise UserError(f"{name} is measured twice, the second time in {folder}: leave one out.")
            scores = pq.read_table(folder / "scores" / f"{slug(name)}.parquet").sort_by("id")
            columns = {c: scores[c].to_numpy() for c in scores.column_names}
            result[name] = _System(name, folder, manifest, read_conditions(record), columns)
    if BASE not in result:
        raise UserError("The base model was not measured: add its evaluation, every variant is compared with it.")
    base = result.pop(BASE)
    if base.manifest.inputs["split"] != split:
        raise UserError(
            f"The base was measured on split {base.manifest.inputs['split'][:16]}, not on {split[:16]}: "
            "give the split it was measured on."
        )
    for name in result:
        _check_like(base, result[name])
    return {BASE: base, **{name: result[name] for name in sorted(result)}}


def _check_like(base: _System, other: _System) -> None:
    expected, actual = base.manifest, other.manifest
    for what, key in (("test set", "test"), ("base model", "base"), ("retention texts", "retention")):
        own, of_base = (m.inputs.get(key, "none")[:16] for m in (actual, expected))
        if own != of_base:
            raise UserError(
                f"{other.name} was measured on {what} {own}, the base on {of_base}: measure both in the same way."
            )
    if other.conditions != base.conditions or other.conditions is None:
        unlike = ", ".join(differences(other.conditions, base.conditions))
        raise UserError(f"{other.name} was measured differently from the base, in {unlike}: evaluate both alike.")
    for setting in expected.config.keys() - {"include_base"}:
        if expected.config[setting] != actual.config.get(setting):
            raise UserError(
                f"{other.name} was measured with {setting} {actual.config.get(setting)}, the base with "
                f"{expected.config[setting]}: measure both in the same way."
            )
    if base.scores["id"].tolist() != other.scores["id"].tolist():
        raise UserError(f"{other.name} was not measured on the abstracts of the base: evaluate it again.")


def _last_validation(curve: dict[str, Any]) -> float | None:
    """Perplexity on the validation papers at the end of a training; None where there were none."""
    return curve["validation"][-1]["perplexity"] if curve["validation"] else None


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


def _base_name(adapters: Mapping[str, str | Path], variants: Sequence[str]) -> str:
    """The base model as the adapters name it: a hub id, or the name of its folder; "" where there is no adapter."""
    for name in variants:
        config = json.loads((Path(adapters[name]) / "adapter_config.json").read_text(encoding="utf-8"))
        location, _ = split_pin(str(config.get("base_model_name_or_path") or ""))
        return Path(location).name if location.startswith("/") else location
    return ""


def _failure(folder: str | Path) -> dict[str, str]:
    open_artifact(folder, "failure")
    outcome = json.loads((Path(folder) / "outcome.json").read_text(encoding="utf-8"))
    return {k: outcome[k] for k in ("variant", "step", "error")}


@dataclass
class _Groups:
    """Masks over the scored texts: the primary category's test set, its hold-out, each category's test set, and the
    retention sets."""

    category: str
    primary: np.ndarray
    holdout: np.ndarray
    categories: dict[str, np.ndarray]
    retention: dict[str, np.ndarray]


def _groups(base: _System, config: CompareConfig) -> _Groups:
    scored: list[str] = base.manifest.config["categories"]
    category = primary_category(scored, config.category)
    if category not in (*scored, None):
        raise UserError(f"No abstract of {category} was scored, only {', '.join(scored)}: choose one of those.")
    of = np.array([category_of(primary, scored) for primary in base.scores["primary"]])
    split, chosen = base.scores["split"], np.ones(len(of), bool) if category is None else of == category
    test, holdout, distant = split == "test", split == "holdout", split == RETENTION
    by_category = {c: test & (of == c) for c in scored}
    sets = {name: distant & (base.scores["primary"] == name) for name in sorted(set(base.scores["primary"][distant]))}
    return _Groups(category or "+".join(scored), test & chosen, holdout & chosen, by_category, sets)


def _measure(systems: dict[str, _System], groups: _Groups, config: CompareConfig) -> dict[str, Any]:
    """All figures of all systems on each group that has at least two abstracts."""
    base = systems[BASE]
    figures = _figures(systems, groups.primary, config)
    result: dict[str, Any] = {"base": figures.pop(BASE), "variants": figures}
    result["test"] = {
        "digest": base.manifest.inputs["test"],
        "abstracts": int(groups.primary.sum()),
        "tokens": int(base.scores["n_tokens"][groups.primary].sum()),
        "category": groups.category,
        "categories": list(groups.categories),
    }
    if groups.holdout.sum() >= 2:
        holdout_figures = _figures(systems, groups.holdout, config)
        result["holdout"] = {"abstracts": int(groups.holdout.sum()), "systems": holdout_figures}
    if groups.retention:
        result["retention"] = {
            name: {"abstracts": int(rows.sum()), "systems": _figures(systems, rows, config)}
            for name, rows in groups.retention.items()
        }
    if len(groups.categories) > 1:
        result["transfer"] = {
            category: {"abstracts": int(rows.sum()), "systems": _figures(systems, rows, config)}
            for category, rows in groups.categories.items()
            if rows.sum() >= 2
        }
    return result


def _figures(systems: dict[str, _System], rows: np.ndarray, config: CompareConfig) -> dict[str, dict[str, Any]]:
    """By system, over the abstracts `rows` (a mask)."""
    scores = {name: system.only(rows) for name, system in systems.items()}
    result: dict[str, dict[str, Any]] = {
        name: {
            "perplexity": statistics.perplexity(s),
            "bits_per_byte": statistics.bits_per_byte(s),
            "entropy": statistics.entropy(s),
        }
        for name, s in scores.items()
    }
    base = scores.pop(BASE)
    for name, difference in statistics.paired_bootstrap(base, scores, config.resamples, config.seed).items():
        result[name] |= difference
    return result


def _extraction(
    systems: Mapping[str, _System], measured_as: Mapping[str, str], config: CompareConfig
) -> dict[str, Any]:
    """`extraction` for the summary, where it was measured."""
    settings = systems[BASE].manifest.config.get("extraction")
    if not settings:
        return {}
    tables, missing = {}, {}
    for name, system in systems.items():
        path = system.folder / "extraction" / f"{slug(measured_as[name])}.parquet"
        if path.is_file():
            tables[name] = pq.read_table(path)
        elif name != BASE:
            why = system.manifest.stats.get("extraction", {}).get(measured_as[name], {})
            missing[name] = why.get("missing", "its evaluation holds none")
    parsed = ExtractionConfig.model_validate(settings)
    return {"extraction": extraction.figures(tables, missing, parsed, config.resamples, config.seed)}


def _as_served(systems: Mapping[str, _System], measured_as: Mapping[str, str]) -> dict[str, Any]:
    """`as_served` for the summary: of every system, how far the endpoint's arithmetic is from that of its scores."""
    every = {n: s.manifest.stats.get("as_served", {}).get(measured_as[n]) for n, s in systems.items()}
    known = {n: difference for n, difference in every.items() if difference}
    return {"as_served": known} if known else {}


def _conclusion(
    systems: dict[str, _System], rows: np.ndarray, ranked: list[dict[str, Any]], config: CompareConfig
) -> dict[str, Any]:
    """The best variant significantly better than the base, and its difference from the next one."""
    better = [r["system"] for r in ranked[1:] if r["delta_high"] < 0 and r["p_holm"] < 0.05]
    result: dict[str, Any] = {"best": better[0] if better else None, "better_than_base": len(better), "lead": None}
    if len(better) > 1:
        first, second = better[:2]
        pair = {first: systems[first].only(rows)}
        lead = statistics.paired_bootstrap(systems[second].only(rows), pair, config.resamples, config.seed)
        result["lead"] = {"over": second, **lead[first]["delta"]}
    return result


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
    result = []
    for names in (g for g in groups if len(g) > 1):
        best = min(names, key=lambda n: variants[n]["delta"]["mean"])
        others = {n: systems[n].only(rows) for n in names if n != best}
        behind = statistics.paired_bootstrap(systems[best].only(rows), others, config.resamples, config.seed)
        ranked = sorted(behind, key=lambda n: behind[n]["delta"]["mean"])
        adjusted = against_the_best([behind[n]["p"] for n in ranked])
        result.append(
            {
                "tokens": [min(known[n] for n in names), max(known[n] for n in names)],
                "best": best,
                "behind": [
                    {"system": n, "delta": behind[n]["delta"], "p_adjusted": p}
                    for n, p in zip(ranked, adjusted, strict=True)
                ],
            }
        )
    return {
        "matched": len(groups) == 1 and len(known) > 1,
        "spread": max(known.values()) / min(known.values()),
        "groups": result,
        "smallest": smallest,
        "steps": len(curves[smallest]["loss"]),
    }
