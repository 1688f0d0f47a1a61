"""The Kubeflow component of the deploy step: what is served of the registry."""

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def deploy(champion: str, base: str, registry: str, serving: dict) -> str:
    """Bring the registry to the KServe endpoint that `serving` describes, if it does. Returns its address."""
    from feyntune.deployment.step import deploy_registry
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return deploy_registry(champion, base, registry, serving)
