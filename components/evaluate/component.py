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
    """Score one variant's adapter on the test abstracts.

    Args:
        data: artifact of kind split.
        adapter: artifact of kind adapter, from train.
        variant: MIXTURE/METHOD, such as hep-th/lora-qkv.
        base: base model with its digest (LOCATION@DIGEST), from preflight.
        recipe: training and evaluation settings that differ from the defaults.
        store: folder or s3://BUCKET/PREFIX where finished evaluations are cached.
        scores: artifact of kind evaluation: scores and completions of the system.
    """
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
    """Score the base model on the test abstracts.

    Args:
        data: artifact of kind split.
        variant: the name of the base among the systems: base.
        base: base model with its digest (LOCATION@DIGEST), from preflight.
        recipe: training and evaluation settings that differ from the defaults.
        store: folder or s3://BUCKET/PREFIX where finished evaluations are cached.
        scores: artifact of kind evaluation: scores and completions of the system.
    """
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
    run: str,
    comparison: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Compare all variants with the base, paired over abstracts, and write the report.

    Args:
        corpus: artifact of kind corpus, for the report's counts.
        data: artifact of kind split.
        variants: the variants of the run.
        base: base model with its digest (LOCATION@DIGEST), from preflight.
        recipe: training and evaluation settings that differ from the defaults.
        store: folder or s3://BUCKET/PREFIX with the run's adapters and evaluations.
        run: ID of the run; the comparison is also kept under comparisons/ID in the store.
        comparison: artifact of kind comparison: summary.json, table.csv, report.html.
        report: the report as one HTML page.
        table: the result table as Markdown.
        metrics: perplexities and differences, for the Kubeflow UI.
    """
    import shutil

    from feyntune.evaluation.step import compare_branches
    from feyntune.telemetry import one_sentence

    with one_sentence():
        values = compare_branches(corpus.path, data.path, variants, base, recipe, store, comparison.path, run)
        shutil.copyfile(f"{comparison.path}/report.html", report.path)
        shutil.copyfile(f"{comparison.path}/table.md", table.path)
        for name, value in values.items():
            metrics.log_metric(name, value)
