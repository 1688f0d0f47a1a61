"""The Kubeflow component of the split step."""

from kfp import dsl


@dsl.component(base_image="feyntune/worker:0.1.0", install_kfp_package=False)
def split(corpus: dsl.Input[dsl.Dataset], after: str, fingerprint: str, data: dsl.Output[dsl.Dataset]) -> str:
    """Assign papers to train, validation and test, draw the mixtures, audit for leaks. Returns the split's digest.

    `fingerprint` makes changed code a new task.
    """
    from feyntune.splitting.split import split

    return split(corpus.path, data.path, after=after or None).digest
