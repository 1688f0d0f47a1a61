"""The Kubeflow component of the register step: the registry and its gate."""

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def register(
    comparison: dsl.Input[dsl.Dataset],
    store: str,
    registry: str,
    registration: dsl.Output[dsl.Dataset],
) -> str:
    """Register the measured adapters, check each against the gate, and promote the best one that passes.

    Args:
        comparison: artifact of kind comparison, from compare.
        store: folder or s3://BUCKET/PREFIX with the run's adapters.
        registry: folder or s3://BUCKET/PREFIX of the registry.
        registration: artifact with the registered versions and the gate's results.

    Returns:
        The champion's name, "" if no version passed the gate.
    """
    from feyntune.registry.step import register_branches
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return register_branches(comparison.path, store, registry, registration.path)
