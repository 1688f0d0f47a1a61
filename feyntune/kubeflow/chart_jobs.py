"""What the chart's Jobs and tests run in the worker image: `python3 -m feyntune.kubeflow.chart_jobs VERB ARGUMENT`.

    bucket NAME                 make the bucket, unless it is there
    restrict-namespace NAME     label a namespace so that Pod Security admits only restricted pods
    check-store s3://BUCKET     copy an artifact to the store and back, and compare every byte
    check-kubeflow URL          the Kubeflow Pipelines API answers
    check-endpoint URL          the endpoint completes a prompt, in the version of this image
    check-rollout JSON          the endpoint's Deployment runs the image and arguments asked for, and no old pods

Exit codes: 0 done, 2 with one sentence that says what is wrong.
"""

import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

import requests

from feyntune.artifacts.artifact import MANIFEST, write_artifact
from feyntune.artifacts.s3 import make_bucket
from feyntune.artifacts.store import open_store, pull, push
from feyntune.constants import RELEASE_HEADER
from feyntune.errors import EXIT_BAD_INPUT, UserError
from feyntune.telemetry import log, setup

KEYS = Path("/etc/feyntune/keys/keys")
LEVEL = "restricted"


def bucket(name: str) -> None:
    """Make the bucket `name` on the S3 server of the environment, unless it exists.

    Raises:
        UserError: the server does not answer or refuses.
    """
    log.info("bucket %s %s", name, "was created" if make_bucket(name) else "exists")


def restrict_namespace(name: str) -> None:
    """Label namespace `name` for Pod Security (enforce, audit and warn: restricted)."""
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    config.load_incluster_config()
    labels = {f"pod-security.kubernetes.io/{mode}": LEVEL for mode in ("enforce", "audit", "warn")}
    try:
        client.CoreV1Api().patch_namespace(name, {"metadata": {"labels": labels}})
    except ApiException as e:
        raise UserError(
            f"Namespace {name} cannot be labeled ({e.reason}): set podSecurity.labelNamespace=false."
        ) from e
    log.info("namespace %s admits only %s pods", name, LEVEL)


def check_store(uri: str) -> None:
    """Seal a folder, push it, pull it and compare; what was written is deleted again.

    Raises:
        UserError: the store refuses, does not answer, or gives back other bytes.
    """
    store = open_store(uri)
    name = f"tests/{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as tmp:
        with write_artifact(Path(tmp) / "out", kind="check") as folder:
            (folder.path / "small.txt").write_text("feyntune", encoding="utf-8")
            (folder.path / "large.bin").write_bytes(secrets.token_bytes(6 << 20))  # more than one part of an upload
        sent = push(store, Path(tmp) / "out", name)
        try:
            back = pull(store, name, Path(tmp) / "back", kind="check")
            if back.digest != sent.digest:
                raise UserError(f"{store.uri} gave back digest {back.digest[:16]} for {sent.digest[:16]}.")
        finally:
            for file in (*sent.files, MANIFEST):
                store.delete(f"{name}/{file}")
    log.info("%s: %d files there and back, digest %s", store.uri, len(sent.files), sent.digest[:16])


def check_kubeflow(host: str) -> None:
    """The health page of the Kubeflow Pipelines API answers.

    Raises:
        UserError: it does not.
    """
    answer = _answer("GET", f"{host.rstrip('/')}/apis/v2beta1/healthz")
    log.info("Kubeflow Pipelines answers at %s: %s", host, answer.text.strip()[:200])


def check_endpoint(url: str) -> None:
    """The endpoint lists its models and the base completes a prompt.

    Raises:
        UserError: it does not answer, refuses, or completes nothing.
    """
    base = f"{url.rstrip('/')}/openai/v1"
    headers = {}
    if KEYS.is_file():
        headers = {"Authorization": f"Bearer {KEYS.read_text(encoding='utf-8').split()[0]}"}
    models = [m["id"] for m in _answer("GET", f"{base}/models", headers=headers).json()["data"]]
    request = {"model": "base", "prompt": "We study", "max_tokens": 8, "temperature": 0}
    answer = _answer("POST", f"{base}/completions", headers=headers, json=request)
    made = answer.json()
    version = answer.headers.get(RELEASE_HEADER, "")
    expected = os.environ.get("FEYNTUNE_EXPECT_VERSION", "")
    if expected and version != expected:
        answered = f"feyntune {version}" if version else "a server that does not name its version"
        raise UserError(f"{url} is answered by {answered}, not {expected}: by old pods, or another image.")
    if made["usage"]["completion_tokens"] < 1:
        raise UserError(f"{url} completed no token: see the endpoint's log.")
    log.info("%s serves %s; it completed %d tokens", url, ", ".join(models), made["usage"]["completion_tokens"])


def check_rollout(expected: str) -> None:
    """The Deployment runs the pods asked for, all of them; KServe's Ready does not say so.

    Args:
        expected: JSON with namespace, deployment, replicas and container (name, image, args).

    Raises:
        UserError: it does not after three minutes, or cannot be read.
    """
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    from feyntune.deployment.rollout import unfinished

    spec = json.loads(expected)
    config.load_incluster_config()
    deadline = time.monotonic() + 180
    while True:
        try:
            read = client.AppsV1Api().read_namespaced_deployment(spec["deployment"], spec["namespace"])
        except ApiException as e:
            raise UserError(f"Deployment {spec['deployment']} cannot be read ({e.status} {e.reason}).") from e
        why = unfinished(client.ApiClient().sanitize_for_serialization(read), spec["container"], spec["replicas"])
        if why is None:
            log.info("%s runs %s, %d replicas", spec["deployment"], spec["container"]["image"], spec["replicas"])
            return
        if time.monotonic() > deadline:
            raise UserError(f"Deployment {spec['deployment']}: {why}: see its pods' events (kubectl describe pods).")
        time.sleep(5)


def _answer(method: str, url: str, **request: object) -> requests.Response:
    try:
        answer = requests.request(method, url, timeout=120, **request)  # type: ignore[arg-type]
    except requests.RequestException as e:
        raise UserError(
            f"{url} does not answer ({type(e).__name__}): is it up, and does the network let it through?"
        ) from e
    if answer.status_code != 200:
        raise UserError(f"{url} answered {answer.status_code}: {' '.join(answer.text.split())[:200]}")
    return answer


VERBS = {
    "bucket": bucket,
    "restrict-namespace": restrict_namespace,
    "check-store": check_store,
    "check-kubeflow": check_kubeflow,
    "check-endpoint": check_endpoint,
    "check-rollout": check_rollout,
}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in VERBS:
        print(f"usage: python3 -m feyntune.kubeflow.chart_jobs {'|'.join(VERBS)} ARGUMENT", file=sys.stderr)
        return EXIT_BAD_INPUT
    setup()
    try:
        VERBS[arguments[0]](arguments[1])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
