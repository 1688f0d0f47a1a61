"""The Kubeflow component of the train step."""

from kfp import dsl

from feyntune.constants import TRAINER_IMAGE


@dsl.component(base_image=TRAINER_IMAGE, install_kfp_package=False)
def train(
    data: dsl.Input[dsl.Dataset],
    variant: str,
    base: str,
    recipe: dict,
    devices: int,
    store: str,
    adapter: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train one variant's adapter on all devices of this pod; a retry resumes from the newest checkpoint."""
    from feyntune.telemetry import one_sentence
    from feyntune.training.step import train_branch

    with one_sentence():
        for name, value in train_branch(data.path, variant, base, recipe, devices, store, adapter.path).items():
            metrics.log_metric(name, value)
