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
    """Train one variant's adapter on all devices of the pod; a retry resumes from the newest checkpoint.

    Args:
        data: artifact of kind split.
        variant: MIXTURE/METHOD, such as hep-th/lora-qkv.
        base: base model with its digest (LOCATION@DIGEST), from preflight.
        recipe: training and evaluation settings that differ from the defaults.
        devices: number of GPUs of the pod to use.
        store: folder or s3://BUCKET/PREFIX for checkpoints and the finished adapter.
        adapter: artifact of kind adapter: adapter_model.safetensors, adapter_config.json, curve.json.
        metrics: losses, tokens and seconds, for the Kubeflow UI.
    """
    from feyntune.telemetry import one_sentence
    from feyntune.training.step import train_branch

    with one_sentence():
        for name, value in train_branch(data.path, variant, base, recipe, devices, store, adapter.path).items():
            metrics.log_metric(name, value)
