"""What is missing on this machine or cluster, one sentence each with its fix."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from components.common.errors import UserError


class Finding(NamedTuple):
    what: str
    state: Literal["ok", "missing", "optional"]
    sentence: str


def examine(store: str | None = None, host: str | None = None) -> Iterator[Finding]:
    """Check this machine; with `store` and `host` given, also the store and the Kubeflow Pipelines host."""
    yield _python()
    yield _memory()
    yield _disk()
    yield _gpu()
    for module, extra in (("kfp", "pipeline"), ("torch", "train"), ("bitsandbytes", "train"), ("kserve", "serve")):
        found = importlib.util.find_spec(module) is not None
        fix = f"{module} is not installed: run `make env`, or pip install 'feyntune[{extra}]'."
        yield Finding(module, "ok" if found else "missing", f"{module} is installed." if found else fix)
    yield _store(store)
    yield _kubeflow(host)
    yield _cluster()
    token = bool(os.environ.get("HF_TOKEN"))
    yield Finding(
        "hub token",
        "ok" if token else "optional",
        "HF_TOKEN is set." if token else "HF_TOKEN is not set: gated models such as Llama-3.1-8B need it.",
    )


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "Python", "ok" if fits else "missing", f"Python {version}{'' if fits else ': 3.11 or 3.12 is needed'}."
    )


def _memory() -> Finding:
    gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    fits = gib >= 4
    need = "" if fits else ": the tiny run needs 4"
    return Finding("memory", "ok" if fits else "missing", f"{gib:.0f} GiB free{need}.")


def _disk() -> Finding:
    gib = shutil.disk_usage(".").free / 2**30
    return Finding("disk", "ok" if gib >= 5 else "missing", f"{gib:.0f} GiB free{'' if gib >= 5 else ': free 5 GiB'}.")


def _gpu() -> Finding:
    if shutil.which("nvidia-smi"):
        return Finding("GPU", "ok", "The NVIDIA driver is here (nvidia-smi).")
    return Finding("GPU", "optional", "No NVIDIA driver: training the 8B model needs one; the tiny run does not.")


def _store(store: str | None) -> Finding:
    if store is None:
        return Finding("store", "optional", "Not checked: give --store s3://BUCKET/PREFIX or a folder.")
    from pipelines.preflight import writable

    try:
        writable(store)
    except UserError as e:
        return Finding("store", "missing", str(e))
    return Finding("store", "ok", f"{store} can be written and read.")


def _kubeflow(host: str | None) -> Finding:
    if host is None:
        return Finding("Kubeflow", "optional", "Not checked: give --host URL of your Kubeflow Pipelines.")
    import requests

    try:
        requests.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=10).raise_for_status()
    except requests.RequestException as e:
        return Finding(
            "Kubeflow", "missing", f"{host} does not answer ({type(e).__name__}): check the address and token."
        )
    return Finding("Kubeflow", "ok", f"{host} answers.")


def _cluster() -> Finding:
    if not os.environ.get("KUBECONFIG") and not (Path.home() / ".kube" / "config").exists():
        return Finding("cluster", "optional", "No KUBECONFIG: installing on a cluster needs one.")
    from kubernetes import client, config

    try:
        config.load_kube_config()
        groups = {g.name for g in client.ApisApi().get_api_versions(_request_timeout=10).groups}
    except Exception as e:
        return Finding("cluster", "missing", f"The cluster does not answer ({type(e).__name__}): check KUBECONFIG.")
    if "serving.kserve.io" not in groups:
        return Finding("cluster", "missing", "The cluster has no KServe: install it, see manifests/prerequisites.")
    return Finding("cluster", "ok", "The cluster answers and has KServe.")
