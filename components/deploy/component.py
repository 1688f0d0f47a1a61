"""The Kubeflow component of the deploy step."""

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def deploy(champion: str, base: str, registry: str, serving: dict) -> str:
    """Deploy the registry's adapters to the KServe endpoint that `serving` describes; roll back on failure.

    Args:
        champion: the champion's name, from register; nothing is deployed if it is "".
        base: base model with its digest (LOCATION@DIGEST), from preflight.
        registry: folder or s3://BUCKET/PREFIX of the registry.
        serving: fields of feyntune/deployment/spec.py; nothing is deployed if it is empty.

    Returns:
        The endpoint's address, "" if nothing was deployed.
    """
    from feyntune.deployment.step import deploy_registry
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return deploy_registry(champion, base, registry, serving)
