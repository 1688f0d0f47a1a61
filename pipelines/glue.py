"""The small components between the rooms: check before anything starts, skip what is done, say how it ended."""

from typing import List, NamedTuple  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def preflight(
    source: str,
    until: str,
    categories: List[str],  # noqa: UP006
    after: str,
    variants: List[str],  # noqa: UP006
    variant: str,
    base: str,
    recipe: dict,
    devices: int,
    store: str,
    registry: str,
    serving: dict,
) -> NamedTuple("Pinned", variants=list[str], base=str, fingerprint=str, code=str):  # type: ignore[misc,valid-type]
    """Fail in seconds on what would fail after hours; pin the base, the source and the code."""
    from feyntune.kubeflow.preflight import preflight

    chosen = [variant] if variant else variants
    days = {"until": until, "after": after}
    return preflight(source, chosen, base, recipe, devices, store, registry, serving, days, categories)


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def todo(
    variant: str,
    variants: List[str],  # noqa: UP006
    split: str,
    base: str,
    recipe: dict,
    code: str,
    store: str,
) -> str:
    """Where this branch keeps its results in the store; "" if it was not chosen or is finished already.

    One output, not two: the local runner resolves conditions on a task's only output.
    """
    if variant != "base" and variant not in variants:
        return ""
    from feyntune.kubeflow.preflight import todo

    return todo(variant, split, base, recipe, code, store)


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def verdict(comparison: dsl.Input[dsl.Dataset]):
    """Fail the run, with every result and the report already there, when a branch failed."""
    from feyntune.kubeflow.preflight import verdict

    verdict(comparison.path)
