"""`feyntune doctor`."""

import json
import sys
from typing import Annotated

import typer

from feyntune.cli.options import Json, print_table, setup_logging

app = typer.Typer()


@app.command(epilog="Example: feyntune doctor --store s3://feyntune --host http://localhost:8888")
def doctor(
    store: Annotated[str | None, typer.Option(help="Store to check: a folder or s3://BUCKET/PREFIX.")] = None,
    host: Annotated[str | None, typer.Option(help="URL of Kubeflow Pipelines to check.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Check the cluster of KUBECONFIG, read-only.")] = False,
    release: Annotated[str, typer.Option(help="Release to check for, with --cluster.")] = "feyntune",
    namespace: Annotated[str, typer.Option(help="Its namespace.")] = "feyntune",
    runs: Annotated[str, typer.Option(help="Namespace of its runs.")] = "kubeflow",
    kubeflow: Annotated[str, typer.Option(help="Namespace of Kubeflow Pipelines.")] = "kubeflow",
    as_json: Json = False,
) -> None:
    """Report what is missing on this machine or cluster, one sentence each."""
    from feyntune.doctor import run_checks

    setup_logging(quiet=as_json)
    if cluster:
        from feyntune.deployment.cluster import connect
        from feyntune.doctor_cluster import check_cluster

        checks = list(check_cluster(release, namespace, runs, connect(), kubeflow))
    else:
        checks = list(run_checks(store, host))
    if as_json:
        print(json.dumps([c._asdict() for c in checks]))
    else:
        marks = {"ok": "ok", "missing": "MISSING", "optional": "optional"}
        print_table([[marks[c.state], c.what, c.sentence] for c in checks], ["", "", ""])
    if any(c.state == "missing" for c in checks):
        sys.exit(1)
