"""The evaluate step of a suite: score one branch; and, when all branches have ended, compare them."""

import json
import shutil
from pathlib import Path
from typing import Any

from feyntune.artifacts.artifact import MANIFEST, read_manifest, write_artifact
from feyntune.artifacts.cache import capture_failure, is_finished, newest_failure, scratch
from feyntune.artifacts.store import open_store, pull, push
from feyntune.conditions import CONDITIONS, differences, read_conditions
from feyntune.constants import EVALUATE_RETRIES
from feyntune.errors import UserError
from feyntune.keys import last_attempt, variant_keys
from feyntune.names import BASE
from feyntune.telemetry import setup


def evaluate_branch(
    data: str,
    variant: str,
    adapter: str | None,
    base: str,
    recipe: dict[str, Any],
    store: str,
    out: str,
) -> None:
    """Score `variant` (its adapter, or the base itself) into `out` and the store; a failed branch stays failed."""
    setup()
    if adapter is not None and read_manifest(adapter).kind == "failure":
        shutil.copytree(adapter, out, dirs_exist_ok=True)
        return
    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.evaluation.evaluate import evaluate

    artifacts = open_store(store)
    _, branch = variant_keys(read_manifest(data).digest, base, recipe, variant)
    with capture_failure(artifacts, branch, "evaluate", variant, out, last_attempt(EVALUATE_RETRIES)):
        config = EvaluateConfig.model_validate({**recipe.get("evaluate", {}), "include_base": adapter is None})
        evaluate(data, base, {} if adapter is None else {variant: adapter}, out, config)
        push(artifacts, out, f"{branch}/evaluation")


def _unlike(base: Path, other: Path) -> list[str]:
    """What keeps one system's scores from being compared with the base's."""
    a, b = (read_conditions(p.read_bytes() if p.is_file() else None) for p in (other / CONDITIONS, base / CONDITIONS))
    return differences(a, b)


def _incomparable(variant: str, unlike: list[str], out: Path) -> Path:
    """The `failure` of a variant that was measured on other hardware than the base, say; the others are compared."""
    error = f"It was measured differently from the base, in {', '.join(unlike)}: evaluate both on the same hardware."
    outcome = {"variant": variant, "step": "evaluate", "error": error, "traceback": ""}
    with write_artifact(out, kind="failure", config=outcome) as folder:
        (folder.path / "outcome.json").write_text(json.dumps(outcome), encoding="utf-8")
    return out


def compare_branches(
    corpus: str,
    data: str,
    variants: list[str],
    base: str,
    recipe: dict[str, Any],
    store: str,
    out: str,
    run: str = "",
) -> dict[str, float]:
    """Compare what the branches of this campaign left in the store; returns metrics for the Kubeflow form.

    Raises:
        UserError: the base was not scored, so there is nothing to compare with.
    """
    from feyntune.evaluation.compare import compare

    setup()
    artifacts = open_store(store)
    split = read_manifest(data).digest
    evaluations: list[str | Path] = []
    failures: list[str | Path] = []
    adapters: dict[str, str | Path] = {}
    adapter_uris: dict[str, str] = {}
    with scratch() as folder:
        for i, name in enumerate([BASE, *variants]):
            training, branch = variant_keys(split, base, recipe, name)
            if is_finished(artifacts, branch):
                pull(artifacts, f"{branch}/evaluation", folder / f"evaluation-{i}", kind="evaluation")
                unlike = _unlike(folder / "evaluation-0", folder / f"evaluation-{i}")
                if unlike:
                    failures.append(_incomparable(name, unlike, folder / f"failure-{i}"))
                    continue
                evaluations.append(folder / f"evaluation-{i}")
                if training is not None:
                    pull(artifacts, f"{training}/adapter", folder / f"adapter-{i}", kind="adapter")
                    adapters[name] = folder / f"adapter-{i}"
                    adapter_uris[name] = f"{training}/adapter"
            else:
                failure = newest_failure(artifacts, branch, folder / f"failure-{i}")
                if failure is None:
                    raise UserError(
                        f"{name} has neither a result nor a failure under {artifacts.uri}/{branch}: run it again."
                    )
                if name == BASE:
                    why = json.loads((failure / "outcome.json").read_text(encoding="utf-8"))
                    raise UserError(f"The base model could not be scored, so nothing can be compared: {why['error']}")
                failures.append(failure)
        compare(evaluations, adapters, data, out, corpus=corpus, failures=failures, adapter_uris=adapter_uris)
    # `feyntune submit --wait` fetches it from there; a second attempt of this step leaves the first one's.
    if run and not artifacts.exists(f"comparisons/{run}/{MANIFEST}"):
        push(artifacts, out, f"comparisons/{run}")
    summary = json.loads((Path(out) / "summary.json").read_text(encoding="utf-8"))
    metrics = {"base perplexity": summary["base"]["perplexity"]["abstract_mean"]}
    for name, variant in summary["variants"].items():
        metrics[f"{name} perplexity"] = variant["perplexity"]["abstract_mean"]
        delta = variant["delta"]
        metrics |= {f"{name} minus base": delta["mean"], f"{name} 95 % CI low": delta["low"]}
        metrics[f"{name} 95 % CI high"] = delta["high"]
    return metrics
