"""The register step of a suite: register the measured adapters, behind the gate."""

import json
from pathlib import Path

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.artifacts.cache import scratch
from feyntune.artifacts.store import open_store, pull
from feyntune.registry.register import register
from feyntune.telemetry import setup


def register_branches(comparison: str, store: str, registry: str, out: str) -> str:
    """Register every adapter of `comparison`; returns the champion's name, or "" where none passed the gate."""
    setup()
    summary = json.loads((Path(comparison) / "summary.json").read_text(encoding="utf-8"))
    source = open_store(store)
    with scratch() as folder:
        adapters = {}
        for i, (name, variant) in enumerate(summary["variants"].items()):
            pull(source, variant["adapter"], folder / f"adapter-{i}", kind="adapter")
            adapters[name] = folder / f"adapter-{i}"
        registration = register(comparison, adapters, registry)
    with write_artifact(out, kind="registration", inputs={"comparison": read_manifest(comparison).digest}) as writer:
        (writer.path / "registration.json").write_text(registration.model_dump_json(indent=1), encoding="utf-8")
    return registration.champion or ""
