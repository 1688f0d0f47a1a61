"""What is missing on this machine or cluster, one sentence each with its fix."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

from feyntune.constants import DEFAULT_BASE
from feyntune.errors import UserError


class Check(NamedTuple):
    what: str
    state: Literal["ok", "missing", "optional"]
    sentence: str


def run_checks(store: str | None = None, host: str | None = None) -> Iterator[Check]:
    """Check this machine; with `store` and `host` given, also the store and the Kubeflow Pipelines host."""
    yield _python()
    yield _memory()
    yield _disk()
    yield _gpu()
    for module, extra in (("kfp", "pipeline"), ("torch", "train"), ("bitsandbytes", "train"), ("kserve", "serve")):
        installed = importlib.util.find_spec(module) is not None
        fix = f"{module} is not installed: run `make env`, or pip install 'feyntune[{extra}]'."
        yield Check(module, "ok" if installed else "missing", f"{module} {version(module)}." if installed else fix)
    yield _store_keys(store)
    yield _store(store)
    yield _kubeflow(host)
    yield from _cluster()
    yield _hub_token()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    return Check(
        "Python", "ok" if fits else "missing", f"Python {version}{'' if fits else ': 3.11, 3.12 or 3.13 is needed'}."
    )


def _memory() -> Check:
    gib = _available_memory() / 2**30
    fits = gib >= 4
    need = "" if fits else ": the tiny run needs 4"
    return Check("memory", "ok" if fits else "missing", f"{gib:.0f} GiB free{need}.")


def _available_memory() -> int:
    """Bytes that programs can have, the page cache included; on macOS, which does not tell, all of them."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kib = re.search(r"^MemAvailable: +(\d+) kB", text, re.M) or re.search(r"^MemFree: +(\d+) kB", text, re.M)
    return int(kib[1]) * 1024 if kib else 0


def _disk() -> Check:
    gib = shutil.disk_usage(".").free / 2**30
    return Check("disk", "ok" if gib >= 5 else "missing", f"{gib:.0f} GiB free{'' if gib >= 5 else ': free 5 GiB'}.")


def _gpu() -> Check:
    if not shutil.which("nvidia-smi"):
        return Check("GPU", "optional", "No NVIDIA driver: training the 8B model needs one; the tiny run does not.")
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        return Check("GPU", "missing", "nvidia-smi finds no GPU: load or reinstall the NVIDIA driver.")
    cards = "; ".join(asked.stdout.strip().splitlines())
    if importlib.util.find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            fix = "torch cannot use it: install torch's CUDA build, made for this driver or an older one"
            return Check("GPU", "missing", f"{cards}; but {fix}.")
    return Check("GPU", "ok", f"{cards}.")


_KEYS = ("S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_OTHER_KEYS = ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_PROFILE")


def _store_keys(store: str | None) -> Check:
    from feyntune.aws_profile import read_profile
    from feyntune.environment import variable
    from feyntune.settings import ENDPOINTS

    absent = [name for name in _KEYS if not variable(*(ENDPOINTS if name == _KEYS[0] else (name,)))]
    if not absent:
        return Check("store keys", "ok", f"{', '.join(_KEYS)} are set.")
    if source := next((name for name in _OTHER_KEYS if variable(name)), None):
        return Check("store keys", "ok", f"Keys come from {source}.")
    try:
        profile = read_profile()
    except UserError as e:
        return Check("store keys", "missing", str(e))
    if profile and profile.gives_keys:
        return Check("store keys", "ok", f"Keys come from AWS's profile {profile.name}.")
    needed = store is not None and store.startswith("s3://")
    return Check(
        "store keys", "missing" if needed else "optional", f"{', '.join(absent)} not set: an s3:// store needs them."
    )


def _store(store: str | None) -> Check:
    if store is None:
        return Check("store", "optional", "Not checked: give --store s3://BUCKET/PREFIX or a folder.")
    from feyntune.kubeflow.preflight import writable

    try:
        writable(store)
    except UserError as e:
        return Check("store", "missing", str(e))
    return Check("store", "ok", f"{store} can be written and read.")


def _kubeflow(host: str | None) -> Check:
    if host is None:
        return Check("Kubeflow", "optional", "Not checked: give --host URL of your Kubeflow Pipelines.")
    import requests

    try:
        requests.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=10).raise_for_status()
    except requests.RequestException as e:
        return Check(
            "Kubeflow", "missing", f"{host} does not answer ({type(e).__name__}): check the address and token."
        )
    return Check("Kubeflow", "ok", f"{host} answers.")


# What a cluster's API groups tell: name, whether the platform needs it, and what to do without.
_GROUPS = {
    "serving.kserve.io": (
        "KServe",
        True,
        "apply manifests/prerequisites/kserve, or install with serving.kind=Deployment",
    ),
    "argoproj.io": ("Kubeflow Pipelines", True, "apply manifests/prerequisites/pipelines"),
    "monitoring.coreos.com": ("Prometheus operator", False, "without it there are no monitors and alerts"),
    "kueue.x-k8s.io": ("Kueue", False, "without it trainings are not queued"),
}


def _cluster() -> Iterator[Check]:
    if not os.environ.get("KUBECONFIG") and not (Path.home() / ".kube" / "config").exists():
        yield Check("cluster", "optional", "No KUBECONFIG: installing on a cluster needs one.")
        return
    from kubernetes import client, config

    try:
        config.load_kube_config()
        groups = {g.name for g in client.ApisApi().get_api_versions(_request_timeout=10).groups}
    except Exception as e:
        yield Check("cluster", "missing", f"The cluster does not answer ({type(e).__name__}): check KUBECONFIG.")
        return
    yield Check("cluster", "ok", "The cluster answers.")
    for group, (name, needed, fix) in _GROUPS.items():
        if group in groups:
            yield Check(name, "ok", f"The cluster has {name} ({group}).")
        else:
            yield Check(name, "missing" if needed else "optional", f"The cluster has no {group}: {fix}.")


def _hub_token() -> Check:
    """Whether the hub token opens the gated base model; the token itself is never shown."""
    token = os.environ.get("HF_TOKEN")
    if not token:
        return Check("hub token", "optional", f"HF_TOKEN is not set: gated models such as {DEFAULT_BASE} need it.")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Check("hub token", "ok", "HF_TOKEN is set; whether it opens the base is not checked offline.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().auth_check(DEFAULT_BASE, token=token)
    except GatedRepoError:
        fix = f"accept its license at https://huggingface.co/{DEFAULT_BASE} with the token's account"
        return Check("hub token", "missing", f"HF_TOKEN does not open {DEFAULT_BASE}: {fix}.")
    except RepositoryNotFoundError:
        return Check("hub token", "missing", "HF_TOKEN is not valid: make a new one in the hub's settings.")
    except (HfHubHTTPError, OSError) as e:
        return Check("hub token", "optional", f"HF_TOKEN is set, but the hub does not answer ({type(e).__name__}).")
    return Check("hub token", "ok", f"HF_TOKEN opens {DEFAULT_BASE}.")
