"""The Kubeflow component of the deploy step: what is served of the registry."""

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def deploy(champion: str, base: str, registry: str, serving: dict) -> str:
    """Bring the registry to the KServe endpoint that `serving` describes, if it does. Returns its address."""
    from feyntune.deployment.step import deploy_registry

    return deploy_registry(champion, base, registry, serving)
