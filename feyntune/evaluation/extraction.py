"""How much of its training papers a variant can be made to repeat, held against papers it was not trained on.

A paper is extractable with k tokens of context when a model that is given its first k tokens continues with its next S
tokens exactly, decoding greedily (Carlini et al. 2023, "Quantifying memorization across neural language models",
arXiv 2202.07646, §3.1). No text is generated for it: in one pass over the paper the most likely token at every position
is compared with the paper's own. The greedy continuation of k tokens equals the paper as long as every prediction from
position k agrees, so one pass answers every k.

Physics abstracts share phrases, so a model repeats some of any paper. Every training paper therefore has a partner: a
test paper of the same mixture and category, first submitted at about the same time, which differs in nothing but that
the variant was not trained on it. The base model, trained on neither, reads the same pairs.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feyntune.evaluation import statistics
from feyntune.evaluation.config import ExtractionConfig
from feyntune.evaluation.prompts import sample_papers
from feyntune.statistics import holm

SCHEMA = pa.schema(
    [
        pa.field("pair", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train, or test: the partner
        pa.field("id", pa.string(), nullable=False),
        pa.field("date", pa.date32(), nullable=False),
        # For each of the first tokens of the text, BOS not among them: whether it is the most likely one after those
        # before it (a tie counts), and its loss in nats.
        pa.field("greedy", pa.list_(pa.bool_()), nullable=False),
        pa.field("nll", pa.list_(pa.float32()), nullable=False),
        pa.field("base_greedy", pa.list_(pa.bool_()), nullable=False),
        pa.field("base_nll", pa.list_(pa.float32()), nullable=False),
    ]
)
MEASURES = {
    "matches": "share of tokens that are the model's most likely ones, given the paper up to them",
    "run": "longest run of such tokens",
    "loss": "mean loss, nats a token",
}
DAYS = 92  # how far apart in time the papers of a pair may be: a quarter
_EPOCH = date(1970, 1, 1)


def pairs(data: str | Path, mixture: str, most: int) -> pa.Table:
    """At most `most` pairs of a training and a test paper of `mixture`: columns pair, split, id, date, abstract.

    The test papers are drawn by the hash of their ids; each takes the training paper of its primary
    category that is nearest in date and not taken yet, at most DAYS away. Near-duplicates lie in one split
    (feyntune.splitting), so a partner is none of a training paper.
    """
    columns = ["id", "primary", "date", "abstract", "withdrawn"]
    papers = pq.read_table(Path(data) / "papers.parquet", columns=columns)
    readable = pc.and_(pc.invert(papers["withdrawn"]), pc.not_equal(papers["abstract"], ""))
    papers = papers.filter(readable).drop_columns("withdrawn").sort_by("id")
    drawn = pq.read_table(Path(data) / "mixtures.parquet", columns=["mixture", "split", "id"])
    drawn = drawn.filter(pc.equal(drawn["mixture"], mixture))
    of = lambda split: papers.filter(
        pc.is_in(papers["id"], drawn.filter(pc.equal(drawn["split"], split))["id"].combine_chunks())
    )
    training, test = of("train"), of("test")
    days, primary = training["date"].cast(pa.int32()).to_numpy().copy(), training["primary"].to_numpy()
    free = np.ones(len(days), bool)
    rows: list[dict[str, Any]] = []
    for partner in sample_papers(test, most).to_pylist():
        day = (partner["date"] - _EPOCH).days
        candidates = np.flatnonzero(free & (primary == partner["primary"]) & (np.abs(days - day) <= DAYS))
        if len(candidates):
            nearest = candidates[np.argmin(np.abs(days[candidates] - day))]
            free[nearest] = False
            pair = len(rows) // 2
            paper = training.slice(int(nearest), 1).to_pylist()[0]
            rows += [{**paper, "pair": pair, "split": "train"}, {**partner, "pair": pair, "split": "test"}]
    fields = [SCHEMA.field(c) for c in ("pair", "split", "id", "date")]
    return pa.Table.from_pylist(rows, pa.schema([*fields, pa.field("abstract", pa.string())]))


def reproduced(greedy: Sequence[bool], prompt: int, continuation: int) -> bool | None:
    """Whether `prompt` tokens make the model write the next `continuation` greedily; None where a text is too short."""
    part = greedy[prompt : prompt + continuation]
    return all(part) if len(part) == continuation else None


def longest_run(greedy: Sequence[bool]) -> int:
    best = run = 0
    for agrees in greedy:
        run = run + 1 if agrees else 0
        best = max(best, run)
    return best


def figures(
    tables: Mapping[str, pa.Table], missing: Mapping[str, str], settings: ExtractionConfig, resamples: int, seed: int
) -> dict[str, Any]:
    """The `extraction` of a summary.

    Args:
        tables: of SCHEMA, by variant.
        missing: why others were not measured.

    Returns:
        `variants[NAME].prompts`: for every prompt length the pairs long enough for it, how many training and test
        papers are reproduced (with Clopper's and Pearson's exact 95 % intervals), by the base too, and the difference
        of the two shares. `variants[NAME].measures[MEASURE]`: means over training and test papers, the paired
        difference, the same of the base, and `beyond_base`, the one minus the other, with p (two-sided bootstrap) and
        p_holm over the variants.
    """
    variants = {name: _of_variant(table, settings, resamples, seed) for name, table in tables.items()}
    for measure in MEASURES:
        known = [v["measures"][measure] for v in variants.values() if v["measures"][measure]["p"] is not None]
        for f, p in zip(known, holm([f["p"] for f in known]), strict=True):
            f["p_holm"] = p
    return {
        "settings": settings.model_dump(mode="json"),
        "definitions": MEASURES,
        "variants": variants,
        "missing": dict(missing),
    }


def _of_variant(table: pa.Table, settings: ExtractionConfig, resamples: int, seed: int) -> dict[str, Any]:
    rows = table.sort_by([("pair", "ascending"), ("split", "descending")]).to_pylist()  # train before test
    both = list(zip(rows[::2], rows[1::2], strict=True))
    apart = [abs((a["date"] - b["date"]).days) for a, b in both]
    prompts = []
    for k in settings.prompts:
        outcomes = [
            [reproduced(row[of], k, settings.continuation) for row in pair for of in ("greedy", "base_greedy")]
            for pair in both
        ]
        long_enough = [o for o in outcomes if None not in o]
        n = len(long_enough)
        training, base_training, test, base_test = (sum(o[i] for o in long_enough) for i in range(4))  # type: ignore[misc]
        if n:
            counts = {"training": training, "test": test, "base_training": base_training, "base_test": base_test}
            shares = {name: _share(count, n) for name, count in counts.items()}
            prompts.append({"prompt": k, "pairs": n, **shares, "difference": newcombe(training, n, test, n)})
    measures = {}
    for measure in MEASURES:
        own, base = (np.array([[_measure(row, measure, of) for row in p] for p in both]) for of in ("", "base_"))
        differences = {"difference": own[:, 0] - own[:, 1], "base_difference": base[:, 0] - base[:, 1]}
        differences["beyond_base"] = differences["difference"] - differences["base_difference"]
        paired = statistics.paired_means(np.zeros(len(both)), differences, resamples, seed)
        measures[measure] = {
            "training": float(own[:, 0].mean()),
            "test": float(own[:, 1].mean()),
            **{name: f["delta"] for name, f in paired.items()},
            "p": paired["beyond_base"]["p"] if paired else None,
            "p_holm": None,
        }
    days = {"median": float(np.median(apart)), "largest": max(apart)}
    return {"pairs": len(both), "days_apart": days, "prompts": prompts, "measures": measures}


def _measure(row: Mapping[str, Any], measure: str, of: str) -> float:
    if measure == "loss":
        return float(np.mean(row[f"{of}nll"]))
    greedy = row[f"{of}greedy"]
    return float(longest_run(greedy)) if measure == "run" else float(np.mean(greedy))


def _share(count: int, n: int) -> dict[str, float]:
    """{count, share, low, high}: Clopper's and Pearson's interval (1934), which holds for zero of n too."""
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(0.95, "exact")
    return {"count": count, "share": count / n, "low": float(interval.low), "high": float(interval.high)}


def newcombe(a: int, n: int, b: int, m: int) -> dict[str, float]:
    """{mean, low, high} of a / n - b / m, by Wilson's intervals of both (Newcombe 1998, Statistics in Medicine 17, 873,
    method 10). It has a width where both counts are zero, where a bootstrap has none; the two samples count as
    independent, which for pairs that are alike errs to the wide side."""
    from scipy.stats import binomtest

    p, q = a / n, b / m
    one, other = (binomtest(count, of).proportion_ci(0.95, "wilson") for count, of in ((a, n), (b, m)))
    low = p - q - np.hypot(p - one.low, other.high - q)
    high = p - q + np.hypot(one.high - p, q - other.low)
    return {"mean": p - q, "low": float(low), "high": float(high)}


def sentences(extraction: Mapping[str, Any]) -> list[str]:
    """The result in sentences, those of the variant that repeats most."""
    variants, settings = extraction["variants"], extraction["settings"]
    result = []
    each = [(name, p) for name, v in variants.items() for p in v["prompts"]]
    if each:
        name, most = max(each, key=lambda e: (e[1]["training"]["share"], e[1]["training"]["high"]))
        continued = f"continued by their next {settings['continuation']} tokens exactly"
        t, test, d = most["training"], most["test"], most["difference"]
        if t["count"] == 0:
            prompts = _listed(sorted({p["prompt"] for _, p in each}))
            fewest = min(p["pairs"] for _, p in each)
            result.append(
                f"No variant repeats a training paper: of {fewest} or more each, prompted with their first {prompts} "
                f"tokens, 0 are {continued} (95 % interval up to {_percent(t['high'])} %)."
            )
        else:
            more = "more often than" if d["low"] > 0 else "not significantly more often than"
            result.append(
                f"{name} repeats training papers {more} test papers of the same age: prompted with their first "
                f"{most['prompt']} tokens, {t['count']} of {most['pairs']} training papers are {continued} "
                f"({_percent(t['share'])} %, 95 % interval {_percent(t['low'])} to {_percent(t['high'])}), and "
                f"{test['count']} of the test papers (difference {_percent(d['mean'])} points, {_percent(d['low'])} to "
                f"{_percent(d['high'])}). It is the variant and the prompt with the most."
            )
    known = {n: f for n, v in variants.items() if (f := v["measures"]["matches"])["p"] is not None}
    if known:
        name = max(known, key=lambda n: known[n]["beyond_base"]["mean"])
        f, beyond = known[name], known[name]["beyond_base"]
        result.append(
            f"Given a paper so far, {name} predicts {_percent(f['training'])} % of the next tokens of training papers "
            f"and {_percent(f['test'])} % of those of test papers. Beyond the difference that the base shows on the "
            f"same papers, this is {beyond['mean'] * 100:+.2g} points (95 % CI {beyond['low'] * 100:+.2g} to "
            f"{beyond['high'] * 100:+.2g}; Holm-adjusted p {f['p_holm']:.2g})."
        )
    return result


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if abs(share) < 0.1 else f"{100 * share:.0f}"


def appendix(summary: Mapping[str, Any]) -> str:
    """The section of table.md; empty where nothing was measured."""
    variants = summary.get("extraction", {}).get("variants")
    if not variants:
        return ""
    lines = ["", "## Training papers reproduced", "", *sentences(summary["extraction"]), ""]
    lines.append("| variant | prompt, tokens | training and test papers |")  # as narrow as the other tables
    lines.append("|---|---:|---:|")
    for name, v in variants.items():
        for p in v["prompts"]:
            counts = f"{p['training']['count']} and {p['test']['count']} of {p['pairs']}"
            lines.append(f"| {name} | {p['prompt']} | {counts} |")
    return "\n".join(lines) + "\n"
