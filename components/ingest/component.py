"""The Kubeflow component of the ingest step."""

from typing import List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def ingest(
    source: str,
    until: str,
    categories: List[str],  # noqa: UP006
    fingerprint: str,
    store: str,
    corpus: dsl.Output[dsl.Dataset],
):
    """Read papers from a source into a canonical corpus. `fingerprint` makes a changed source or code a new task."""
    import hashlib

    from feyntune.artifacts.store import FolderStore, open_store
    from feyntune.ingestion.ingest import ingest
    from feyntune.telemetry import one_sentence

    with one_sentence():
        artifacts, harvest = open_store(store), None
        if isinstance(
            artifacts, FolderStore
        ):  # on this machine's disk: it outlives the step, and a later run resumes it
            harvest = artifacts.root / "harvests" / hashlib.sha256(source.encode()).hexdigest()[:16]
        manifest = ingest(source, corpus.path, until=until or None, categories=categories, state=harvest)
        corpus.metadata["digest"] = manifest.digest
