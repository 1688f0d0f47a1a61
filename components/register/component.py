"""The Kubeflow component of the register step: the registry and its gate."""

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def register(
    comparison: dsl.Input[dsl.Dataset],
    store: str,
    registry: str,
    registration: dsl.Output[dsl.Dataset],
) -> str:
    """Put the adapters that were measured into the registry, promote the best one past the gate. Returns it."""
    from feyntune.registry.step import register_branches

    return register_branches(comparison.path, store, registry, registration.path)
