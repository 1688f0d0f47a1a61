"""The register step of a suite: fetch the measured adapters from the store and register them."""

import json
from pathlib import Path

from components.common.branches import scratch
from components.common.sealed import read_manifest, seal
from components.common.store import open_store, pull
from components.common.telemetry import setup
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
