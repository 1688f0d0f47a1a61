"""The Kubeflow component of the train step."""

from kfp import dsl


@dsl.component(base_image="feyntune/trainer:0.1.0", install_kfp_package=False)
def train(
    data: dsl.Input[dsl.Dataset],
    variant: str,
    base: str,
    recipe: dict,
    devices: int,
    store: str,
    branch: str,
    adapter: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train one variant's adapter on all devices of this pod; exit code 75 asks for a retry, which resumes."""
    from feyntune.training.step import train_branch

    for name, value in train_branch(data.path, variant, base, recipe, devices, store, branch, adapter.path).items():
        metrics.log_metric(name, value)
