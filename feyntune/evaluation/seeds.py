"""Several trainings of one variant that differ in their seed: the spread between them, and what it allows to rank.

A variant's other seeds are systems of their own (`hep-th/lora-qkv/seed1`). Here they become one variant again: one of
them, the median by validation perplexity, stands for it in the tables and in the registry, and all of them say how far
a figure moves by the luck of a seed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from feyntune.evaluation.statistics import seeds_and_abstracts, t_interval
from feyntune.names import split_seed
from feyntune.statistics import against_the_best, holm

Members = dict[str, dict[int, str]]  # variant -> seed -> system

HOW = (
    "The mean of a variant's seeds minus the mean of the other's. Its variance adds the variance between seeds of each "
    "side (s²/seeds, seeds as the unit) and the variance between abstracts of the paired differences (s²/abstracts, "
    "what the bootstrap over abstracts estimates); the interval is Student's t with the degrees of freedom of Welch "
    "(1947) and Satterthwaite (1946). As in every sum over two crossed samples the noise of a seed on an abstract "
    "counts twice, which errs to the wide side (Owen 2007, Annals of Applied Statistics 1, 386)."
)


def group(systems: Mapping[str, int]) -> Members:
    """`systems` with the seed each was trained with, by variant and seed.

    A name without a seed is the variant's first.
    """
    members: Members = {}
    for name, seed in systems.items():
        variant, named = split_seed(name)
        members.setdefault(variant, {})[seed if named is None else named] = name
    return {variant: dict(sorted(by_seed.items())) for variant, by_seed in sorted(members.items())}


def representative(by_seed: Mapping[int, str], validation: Mapping[str, float | None]) -> int:
    """The seed with the median validation perplexity (of two middle ones the worse); the first where one has none.

    The test set has no say in it, and the best seed would be luck that a reader cannot repeat.
    """
    figures = [(v, seed) for seed, name in by_seed.items() if (v := validation.get(name)) is not None]
    if len(figures) < len(by_seed):
        return next(iter(by_seed))
    return sorted(figures)[len(figures) // 2][1]


def figures(
    members: Members,
    chosen: Mapping[str, int],
    base: np.ndarray,
    each: Mapping[str, np.ndarray],
    validation: Mapping[str, float | None],
) -> dict[str, Any]:
    """The `seeds` of a summary.

    Args:
        base, each: per-abstract perplexities [abstracts] of the base, and of every system.
        validation: final validation perplexity of every system.

    Returns:
        `variants[NAME]`: every seed's figures; `sd`, `lowest`, `highest` and `interval` (t, seeds alone) of the mean
        perplexity minus the base's; `minus_base` over seeds and abstracts. `best`: the lowest mean that is
        significantly below the base. `behind`: every other variant minus the best, with p_adjusted over all pairs;
        `tied`: those of them that seeds and abstracts do not tell from it (p_adjusted of 0.05 or more).
    """
    stacked = {v: np.stack([each[name] for name in by_seed.values()]) for v, by_seed in members.items()}
    variants: dict[str, Any] = {}
    for name, rows in stacked.items():
        means = rows.mean(1) - base.mean()
        variants[name] = {
            "seeds": {
                str(seed): {
                    "perplexity": float(row.mean()),
                    "minus_base": float(mean),
                    "validation": validation.get(members[name][seed]),
                }
                for seed, row, mean in zip(members[name], rows, means, strict=True)
            },
            "registered": chosen[name],
            "perplexity": float(rows.mean()),
            "sd": float(means.std(ddof=1)) if len(means) > 1 else None,
            "lowest": float(means.min()),
            "highest": float(means.max()),
            "interval": t_interval(means),
            "minus_base": seeds_and_abstracts(rows, base[None]),
        }
    _adjust([v["minus_base"] for v in variants.values()])
    better = [n for n, v in variants.items() if _below(v["minus_base"])]
    best = min(better, key=lambda n: variants[n]["perplexity"], default=None)
    behind: dict[str, Any] = {}
    if best is not None:
        behind = {n: seeds_and_abstracts(rows, stacked[best]) for n, rows in stacked.items() if n != best}
    compared = [d for d in behind.values() if d["p"] is not None]
    for d, p in zip(compared, against_the_best([d["p"] for d in compared]), strict=True):
        d["p_adjusted"] = p
    tied = [n for n, d in behind.items() if d.get("p_adjusted", 1.0) >= 0.05]
    return {
        "variants": variants,
        "best": best,
        "better_than_base": len(better),
        "behind": dict(sorted(behind.items(), key=lambda item: float(item[1]["mean"] or 0))),
        "tied": sorted(tied, key=lambda n: variants[n]["perplexity"]),
        "how": HOW,
    }


def _adjust(differences: list[dict[str, Any]]) -> None:
    """Holm's correction over those that have a p."""
    known = [d for d in differences if d["p"] is not None]
    for d, p in zip(known, holm([d["p"] for d in known]), strict=True):
        d["p_holm"] = p


def _below(difference: Mapping[str, Any]) -> bool:
    return difference["p_holm"] is not None and difference["p_holm"] < 0.05 and difference["high"] < 0


def sentences(seeds: Mapping[str, Any], base: float, abstracts: str) -> list[str]:
    """What the seeds allow to say, for the report's first lines; no ranking of what they cannot tell apart.

    Args:
        base: the base's perplexity.
        abstracts: "1,000 test abstracts of hep-th".
    """
    variants, best, tied = seeds["variants"], seeds["best"], seeds["tied"]
    counts = sorted({len(v["seeds"]) for v in variants.values()})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if best is None:
        return [
            f"None of {len(variants)} variant{'s' if len(variants) > 1 else ''} is significantly better than the base "
            f"model on {abstracts}, over {number} seeds (95 % CI over seeds and abstracts, Holm-adjusted p < 0.05).",
            _spread(variants),
        ]
    same = [best, *tied]
    second: list[str] = []
    if tied:
        means = ", ".join(f"{variants[n]['perplexity']:.2f}" for n in same)
        first = (
            f"{number} seeds cannot tell {_and(same)} apart: their perplexities on {abstracts}, {means} as means over "
            f"seeds against {base:.2f} of the base model, differ by no more than seeds and abstracts explain."
        )
    else:
        d = variants[best]["minus_base"]
        first = (
            f"{best} lowers the perplexity of the base model from {base:.2f} to {variants[best]['perplexity']:.2f} on "
            f"{abstracts}, as the mean of {len(variants[best]['seeds'])} seeds."
        )
        second = [
            f"The difference is {_signed(d['mean'])} (95 % CI over seeds and abstracts {_signed(d['low'])} to "
            f"{_signed(d['high'])}; Holm-adjusted p {d['p_holm']:.2g})."
        ]
    result = [first, *second, _spread(variants)]
    behind = next(iter(seeds["behind"].items()), None)
    if behind is not None:
        name, d = behind
        where = "no interval, one seed" if d["low"] is None else f"95 % CI {_signed(d['low'])} to {_signed(d['high'])}"
        result.append(
            f"{name} minus {best} is {_signed(d['mean'])} ({where})"
            + (": not told apart." if name in tied else ": more than seeds and abstracts explain.")
        )
    result.append(
        f"{seeds['better_than_base']} of {len(variants)} variants are significantly better than the base (over seeds "
        "and abstracts, Holm-adjusted p < 0.05)."
    )
    return result


def _spread(variants: Mapping[str, Any]) -> str:
    known = [v["sd"] for v in variants.values() if v["sd"] is not None]
    widest = max(v["highest"] - v["lowest"] for v in variants.values())
    pooled = float(np.sqrt(np.mean(np.square(known))))
    return (
        f"Between seeds of one variant the perplexity has a standard deviation of {pooled:.3g} and a range of up to "
        f"{widest:.3g}."
    )


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−")


def _and(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def appendix(summary: Mapping[str, Any]) -> str:
    """The section of table.md; empty where every variant has one seed."""
    if "seeds" not in summary:
        return ""
    lines = ["", "## Seeds", ""]
    lines.append(
        "| variant | seeds | minus base by seed | SD | over seeds and abstracts (95 %) | minus the best (95 %) |"
    )
    lines.append("|---|---|---|---:|---:|---:|")
    for name, v in summary["seeds"]["variants"].items():
        by_seed = ", ".join(f"{s['minus_base']:+.3f}" for s in v["seeds"].values())
        behind = summary["seeds"]["behind"].get(name)
        sd = "" if v["sd"] is None else f"{v['sd']:.3f}"
        cells = [name, ", ".join(v["seeds"]), by_seed, sd, _cell(v["minus_base"]), _cell(behind) if behind else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(d: Mapping[str, Any]) -> str:
    return f"{d['mean']:+.3f}" + ("" if d["low"] is None else f" [{d['low']:+.3f}, {d['high']:+.3f}]")
