"""The Kubeflow component of the ingest step."""

from typing import List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def ingest(
    source: str,
    until: str,
    categories: List[str],  # noqa: UP006
    fingerprint: str,
    corpus: dsl.Output[dsl.Dataset],
):
    """Read papers from a source into a canonical corpus. `fingerprint` makes a changed source or code a new task."""
    from components.ingest.ingest import ingest

    manifest = ingest(source, corpus.path, until=until or None, categories=categories)
    corpus.metadata["digest"] = manifest.digest
