"""The Kubeflow components of the evaluate step: the scores of one system, and the comparison of all."""

from typing import List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl

from feyntune.constants import TRAINER_IMAGE, WORKER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def evaluate(
    data: dsl.Input[dsl.Dataset],
    adapter: dsl.Input[dsl.Model],
    variant: str,
    base: str,
    recipe: dict,
    store: str,
    scores: dsl.Output[dsl.Dataset],
):
    """Score one variant's adapter on the test abstracts."""
    from feyntune.evaluation.step import evaluate_branch
    from feyntune.telemetry import one_sentence

    with one_sentence():
        evaluate_branch(data.path, variant, adapter.path, base, recipe, store, scores.path)


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def evaluate_base(
    data: dsl.Input[dsl.Dataset],
    variant: str,
    base: str,
    recipe: dict,
    store: str,
    scores: dsl.Output[dsl.Dataset],
):
    """Score the base model (named `variant`) on the test abstracts."""
    from feyntune.evaluation.step import evaluate_branch
    from feyntune.telemetry import one_sentence

    with one_sentence():
        evaluate_branch(data.path, variant, None, base, recipe, store, scores.path)


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def compare(
    corpus: dsl.Input[dsl.Dataset],
    data: dsl.Input[dsl.Dataset],
    variants: List[str],  # noqa: UP006
    base: str,
    recipe: dict,
    store: str,
    comparison: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Compare all variants with the base, paired over abstracts, and write the report."""
    import shutil

    from feyntune.evaluation.step import compare_branches
    from feyntune.telemetry import one_sentence

    with one_sentence():
        values = compare_branches(corpus.path, data.path, variants, base, recipe, store, comparison.path)
        shutil.copyfile(f"{comparison.path}/report.html", report.path)
        shutil.copyfile(f"{comparison.path}/table.md", table.path)
        for name, value in values.items():
            metrics.log_metric(name, value)
