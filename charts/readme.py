"""Writes feyntune/README.md from the comments of feyntune/values.yaml: `python charts/readme.py` (a test compares).

A comment that begins with `# --` describes the key on the next line that is not a comment.
"""

import re
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "feyntune"
HEAD = """# The feyntune chart

<!-- Made by charts/readme.py from values.yaml; edit there. -->

Install one release in its own namespace (or in a Kubeflow profile's): object store, bucket, Secrets, the pipelines in
Kubeflow, the endpoint, network policies, monitoring. Kubernetes 1.20 or later, Helm 3.6 or later (Helm 4 too).

```sh
helm install feyntune charts/feyntune -n feyntune --create-namespace --timeout 30m \\
  --set images.prefix=registry.example/team
helm test feyntune -n feyntune --timeout 10m
```

`helm test` checks more than `--wait`: the endpoint's Deployment runs the image and arguments of this release, no old
pod is left, and the endpoint answers. With `--wait`, Helm 3 waits for the chart's own workloads and not for KServe's
InferenceService, so run `helm test` after every upgrade; Helm 4 waits for both. `feyntune deploy` does not use Helm: it
applies a rendering of this chart's InferenceService, `feyntune/deployment/predictor.yaml`, with the fields of its
description filled in. So the InferenceService has one template.

The chart detects missing requirements and names them: Kubeflow Pipelines (not needed with `kubeflow.enabled=false`),
KServe (not needed with `serving.kind=Deployment`), Kueue if enabled. Without the Prometheus operator the monitoring
objects are left out, and the installation notes say so.

| environment | values |
|---|---|
| a cluster without GPUs | `kubeflow.flavor=cpu`, `serving.gpus=0`, `serving.precision=fp32` |
| your own S3 server | `objectStore.kind=external`, `.endpoint`, Secret `feyntune-s3`, `.credentials.existing=true` |
| a Kubeflow profile | `kubeflow.mode=profile`, `podSecurity.labelNamespace=false` |
| OpenShift | nothing: `podSecurity.fixedIds=auto` leaves the user ids out; `podSecurity.labelNamespace=false` |
| pods with IPv6 addresses only | `listen=::` |
| proxies, a private CA | `extraEnv`, `caBundle.pem` or `caBundle.configMap` |
| GPU nodes with CDI | `serving.writableRoot=true` |
| ArgoCD, Flux | `objectStore.credentials.existing=true` (keys are generated at installation only), `assumeAPIs` |
| two releases beside one Kubeflow | two release names: Secrets and pipelines include them |
| no internet access | `images.prefix`, and the images of `manifests/airgap/images.txt` in your registry |

## Rights

| account | may | because |
|---|---|---|
| `…-namespace` | patch this one namespace | the Job that labels it for Pod Security |
| `…-test` | get the endpoint's Deployment | `helm test` checks that the new pods run |
| `…-upload` (profile mode) | get, list, create `pipelines` | the Job that puts the pipelines into Kubeflow |
| `…-serving`, `…-store`, `…-jobs` | nothing; no token is mounted | they do not call the Kubernetes API |

## What is kept

Upgrade and rollback keep the volume, the bucket and the generated keys. `helm uninstall` keeps the bundled store's
volume and its Secrets, `RELEASE-s3` (in the runs' namespace too) and `RELEASE-s3-read`
(`objectStore.persistence.keep=false` deletes the volume); a new release of the same name reuses them. It also leaves
the uploaded pipelines in Kubeflow, the Pod Security labels of the namespace, and the Job or test pod of a
hook that failed: a Job for a day, a test pod until the next `helm test`. Hooks that succeeded are deleted.

## Values

"""


def document(values: str) -> str:
    """The whole README for the text of values.yaml.

    Raises:
        ValueError: a value without a comment.
    """
    rows = []
    for path, default in _leaves(yaml.safe_load(values), values):
        meaning = _meaning(values, path)
        if not meaning:
            raise ValueError(f"{'.'.join(path)} has no `# --` comment above it in values.yaml")
        shown = yaml.safe_dump(default, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
        rows.append(f"| `{'.'.join(path)}` | `{shown}` | {meaning} |")
    return HEAD + "| value | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _leaves(value: Any, text: str, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Keys that are commented on, or end; with their defaults."""
    if isinstance(value, dict) and (not path or not _meaning(text, path)):
        return [leaf for k, v in value.items() for leaf in _leaves(v, text, (*path, k))]
    return [(path, value)]


def _meaning(text: str, path: tuple[str, ...]) -> str:
    comment: list[str] = []
    where: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"( *)# ?(-- )?(.*)", line):
            comment = [match[3]] if match[2] else ([*comment, match[3]] if comment else [])
            continue
        if match := re.match(r"( *)([\w]+):", line):
            where = [*where[: len(match[1]) // 2], match[2]]
            if tuple(where) == path:
                return " ".join(comment).replace("|", "\\|")
        comment = []
    return ""


if __name__ == "__main__":
    (CHART / "README.md").write_text(document((CHART / "values.yaml").read_text()))
