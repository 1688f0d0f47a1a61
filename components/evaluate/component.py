"""The Kubeflow components of the evaluate step: one branch's scores, and the comparison of all of them."""

from typing import List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl


@dsl.component(base_image="feyntune/trainer:0.1.0", install_kfp_package=False)
def evaluate(
    data: dsl.Input[dsl.Dataset],
    adapter: dsl.Input[dsl.Model],
    variant: str,
    base: str,
    recipe: dict,
    store: str,
    branch: str,
    scores: dsl.Output[dsl.Dataset],
):
    """Score one variant's adapter on the test abstracts."""
    from feyntune.evaluation.step import evaluate_branch

    evaluate_branch(data.path, variant, adapter.path, base, recipe, store, branch, scores.path)


@dsl.component(base_image="feyntune/trainer:0.1.0", install_kfp_package=False)
def evaluate_base(
    data: dsl.Input[dsl.Dataset],
    base: str,
    recipe: dict,
    store: str,
    branch: str,
    scores: dsl.Output[dsl.Dataset],
):
    """Score the base model on the test abstracts."""
    from feyntune.evaluation.step import evaluate_branch

    evaluate_branch(data.path, "base", None, base, recipe, store, branch, scores.path)


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def compare(
    corpus: dsl.Input[dsl.Dataset],
    data: dsl.Input[dsl.Dataset],
    variants: List[str],  # noqa: UP006
    base: str,
    recipe: dict,
    code: str,
    store: str,
    comparison: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Compare all branches with the base, paired over abstracts, and write the report."""
    import shutil

    from feyntune.evaluation.step import compare_branches

    found = compare_branches(corpus.path, data.path, variants, base, recipe, code, store, comparison.path)
    shutil.copyfile(f"{comparison.path}/report.html", report.path)
    shutil.copyfile(f"{comparison.path}/table.md", table.path)
    for name, value in found.items():
        metrics.log_metric(name, value)
