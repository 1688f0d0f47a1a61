"""The deploy step of a suite: behind the gate, deploy what is registered."""

from typing import Any

from feyntune.deployment.deploy import deploy, serving_of_run
from feyntune.telemetry import log, setup


def deploy_registry(champion: str, base: str, registry: str, serving: dict[str, Any]) -> str:
    """Deploy `registry` as `serving` (fields of ServingSpec) says; returns the endpoint's address.

    Nothing is deployed, and "" returned, without a description or while nothing has passed the gate.

    Raises:
        DeployError: it did not come to answer for every adapter, and was rolled back.
    """
    setup()
    if not serving or not champion:
        log.info("nothing is deployed: %s", "nothing passed the gate" if serving else "no serving description is given")
        return ""
    return deploy(serving_of_run(serving, base, registry)).url
