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
    """Put the adapters that were measured into the registry, promote the best one past the gate. Returns it."""
    from feyntune.registry.step import register_branches
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return register_branches(comparison.path, store, registry, registration.path)
