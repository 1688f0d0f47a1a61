"""The components around the steps: preflight, check-cache, fail-if-any-failed."""

from typing import List, NamedTuple  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def preflight(
    source: str,
    until: str,
    categories: List[str],  # noqa: UP006
    max_bad: float,
    after: str,
    mixtures: list,
    variants: List[str],  # noqa: UP006
    variant: str,
    base: str,
    recipe: dict,
    devices: int,
    store: str,
    registry: str,
    serving: dict,
) -> NamedTuple(  # type: ignore[misc,valid-type]
    "Pinned", variants=list[str], base=str, fingerprint=str, gpus=str, cpus=str, memory=str, memory_limit=str
):
    """Check all parameters before anything starts; pin base model and source; size the training pods."""
    from feyntune.kubeflow.preflight import preflight
    from feyntune.telemetry import one_sentence

    with one_sentence():
        selected = [variant] if variant else variants
        days = {"until": until, "after": after}
        return preflight(
            source, selected, base, recipe, devices, store, registry, serving, days, categories, mixtures, max_bad
        )


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def check_cache(
    data: dsl.Input[dsl.Dataset],
    variants: List[str],  # noqa: UP006
    base: str,
    recipe: dict,
    store: str,
    plan: dsl.Output[dsl.Markdown],
) -> NamedTuple("Pending", base=list[str], variants=list[str]):  # type: ignore[misc,valid-type]
    """List the systems that no earlier run finished: ["base"] or [], and variants. `plan` names each iteration."""
    from pathlib import Path

    from feyntune.kubeflow.preflight import check_cache, plan_table
    from feyntune.telemetry import one_sentence

    with one_sentence():
        pending = check_cache(data.path, ["base", *variants], base, recipe, store)
        to_train = [name for name in pending if name != "base"]
        Path(plan.path).write_text(plan_table(variants, to_train), encoding="utf-8")
        return (pending[: len(pending) - len(to_train)], to_train)  # type: ignore[return-value]


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def fail_if_any_failed(comparison: dsl.Input[dsl.Dataset]):
    """Fail the run if a variant failed; all other results and the report are already stored."""
    from feyntune.kubeflow.preflight import fail_if_any_failed
    from feyntune.telemetry import one_sentence

    with one_sentence():
        fail_if_any_failed(comparison.path)
