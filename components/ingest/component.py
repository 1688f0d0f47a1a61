"""The Kubeflow component of the ingest step."""

from typing import List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def ingest(
    source: str,
    until: str,
    categories: List[str],  # noqa: UP006
    max_bad: float,
    converted_text: bool,
    fingerprint: str,
    store: str,
    corpus: dsl.Output[dsl.Dataset],
):
    """Read papers from a source into a canonical corpus.

    Args:
        source: kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.
        until: date (YYYY-MM-DD); only papers first submitted up to it are read. "" reads all.
        categories: primary categories (hep-th) or archives (cs) to read.
        max_bad: share of unusable records above which the step stops.
        converted_text: accept a source whose server turns TeX into Unicode (the Atom API).
        fingerprint: of the source and the code, from preflight; a change makes Kubeflow run the step again.
        store: folder or s3://BUCKET/PREFIX; in a folder, a harvest keeps its pages there and resumes from them.
        corpus: artifact of kind corpus: papers.parquet, counts.json.
    """
    import hashlib

    from feyntune.artifacts.store import FolderStore, open_store
    from feyntune.ingestion.ingest import ingest
    from feyntune.telemetry import one_sentence

    with one_sentence():
        artifacts, harvest = open_store(store), None
        if isinstance(artifacts, FolderStore):  # a local folder outlives the step, so a later run can resume
            harvest = artifacts.root / "harvests" / hashlib.sha256(source.encode()).hexdigest()[:16]
        manifest = ingest(
            source,
            corpus.path,
            until=until or None,
            categories=categories,
            max_bad=max_bad,
            converted_text=converted_text,
            state=harvest,
        )
        corpus.metadata["digest"] = manifest.digest
