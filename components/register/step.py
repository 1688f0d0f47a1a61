"""The register step of a suite: register the measured adapters; and, behind the gate, deploy what is registered."""

import json
from pathlib import Path
from typing import Any

from components.common.branches import scratch
from components.common.sealed import read_manifest, seal
from components.common.store import open_store, pull
from components.common.telemetry import log, setup
from components.register.register import register


def register_branches(comparison: str, store: str, registry: str, out: str) -> str:
    """Register every adapter of `comparison`; returns the champion's name, or "" where none passed the gate."""
    setup()
    summary = json.loads((Path(comparison) / "summary.json").read_text())
    kept = open_store(store)
    with scratch() as folder:
        adapters = {}
        for i, (name, variant) in enumerate(summary["variants"].items()):
            pull(kept, variant["adapter"], folder / f"adapter-{i}", kind="adapter")
            adapters[name] = folder / f"adapter-{i}"
        registration = register(comparison, adapters, registry)
    with seal(out, kind="registration", inputs={"comparison": read_manifest(comparison).digest}) as sealed:
        (sealed.path / "registration.json").write_text(registration.model_dump_json(indent=1))
    return registration.champion or ""


def deploy_registry(champion: str, base: str, registry: str, serving: dict[str, Any]) -> str:
    """Deploy `registry` as `serving` (fields of ServingSpec) says; returns the endpoint's address.

    Nothing is deployed, and "" returned, without a description or while nothing has passed the gate.

    Raises:
        DeployError: it did not come to answer for every adapter, and was taken back.
    """
    setup()
    if not serving or not champion:
        log.info("nothing is deployed: %s", "nothing passed the gate" if serving else "no serving description is given")
        return ""
    from components.register.deploy import deploy, serving_of_run

    return deploy(serving_of_run(serving, base, registry)).url
