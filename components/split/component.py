"""The Kubeflow component of the split step."""

from kfp import dsl

from feyntune.constants import WORKER_IMAGE


@dsl.component(base_image=WORKER_IMAGE, install_kfp_package=False)
def split(corpus: dsl.Input[dsl.Dataset], after: str, fingerprint: str, data: dsl.Output[dsl.Dataset]) -> str:
    """Assign papers to train, validation and test, draw the mixtures, audit for leaks. Returns the split's digest.

    `fingerprint` makes changed code a new task.
    """
    from feyntune.splitting.split import split
    from feyntune.telemetry import one_sentence

    with one_sentence():
        return split(corpus.path, data.path, after=after or None).digest
