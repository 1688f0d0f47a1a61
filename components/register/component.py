"""The Kubeflow components of the register step: the registry and its gate, and what is served of it."""

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def register(
    comparison: dsl.Input[dsl.Dataset],
    store: str,
    registry: str,
    registration: dsl.Output[dsl.Dataset],
) -> str:
    """Put the adapters that were measured into the registry, promote the best one past the gate. Returns it."""
    from components.register.step import register_branches

    return register_branches(comparison.path, store, registry, registration.path)


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def deploy(champion: str, base: str, registry: str, serving: dict) -> str:
    """Bring the registry to the KServe endpoint that `serving` describes, if it does. Returns its address."""
    from components.register.step import deploy_registry

    return deploy_registry(champion, base, registry, serving)
