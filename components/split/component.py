"""The Kubeflow component of the split step."""

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def split(
    corpus: dsl.Input[dsl.Dataset], after: str, mixtures: list, fingerprint: str, data: dsl.Output[dsl.Dataset]
) -> str:
    """Assign papers to train, validation and test, draw the mixtures, and audit the result for leaks.

    Args:
        corpus: artifact of kind corpus, from ingest.
        after: date (YYYY-MM-DD); later papers form the hold-out. "" makes no hold-out.
        mixtures: mixtures in place of the catalog's, as the list of a mixtures file; [] takes the catalog's.
        fingerprint: of the source and the code, from preflight; a change makes Kubeflow run the step again.
        data: artifact of kind split: papers.parquet, mixtures.parquet, audit.json.

    Returns:
        The digest of the split.
    """
    from feyntune.splitting.split import split
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return split(corpus.path, data.path, after=after or None, mixtures=mixtures or None).digest
