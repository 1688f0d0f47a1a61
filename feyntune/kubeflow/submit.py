"""Upload the compiled pipelines to a Kubeflow Pipelines host, and start runs there.

Idempotent: a pipeline is uploaded once, each release once as a version of it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from feyntune.errors import UserError
from feyntune.kubeflow.adapt import COMPILED, adapt, read_settings
from feyntune.kubeflow.preflight import refuse_null

PIPELINES = ("suite", "variant")


def upload(
    host: str,
    version: str,
    images: str | None = None,
    namespace: str | None = None,
    flavour: str = "gpu",
    token_file: str | None = None,
    settings: str | None = None,
) -> dict[str, str]:
    """Make the pipelines stand in the Kubeflow UI; returns the id of each one's version.

    Args:
        images: prefix of the images in your registry, such as `registry.example/team`; `feyntune` by default.
        namespace: profile namespace of a multi-user Kubeflow.
        token_file: file with a bearer token, as a mounted ServiceAccount token is.
        settings: file with the cluster's own values (see adapt.py); `images` is then left to it.

    Raises:
        UserError: the host does not answer, or refuses.
    """
    ids = {}
    prefix = read_settings(settings).name if settings else "feyntune"
    with _client(host, namespace, token_file) as client:
        for name in PIPELINES:
            with _package(name, images, flavour, settings) as package:
                ids[name] = _upload_once(client, f"{prefix}-{name}", version, package, namespace)
    return ids


def submit(
    host: str,
    pipeline: str,
    arguments: dict[str, Any],
    images: str | None = None,
    namespace: str | None = None,
    flavour: str = "gpu",
    token_file: str | None = None,
    settings: str | None = None,
) -> str:
    """Start a run of `suite` or `variant` and return its id. Arguments and errors as for `upload`.

    Raises:
        UserError: also where the pipeline has no such parameter, or its value is null.
    """
    with _package(pipeline, images, flavour, settings) as package:
        parameters = next(yaml.safe_load_all(package.read_text()))["root"]["inputDefinitions"]["parameters"]
        for name, value in arguments.items():
            if name not in parameters:
                raise UserError(f"{pipeline} has no parameter {name!r}: it has {', '.join(sorted(parameters))}.")
            refuse_null(value, name)
        with _client(host, namespace, token_file) as client:
            run = client.create_run_from_pipeline_package(str(package), arguments=arguments, namespace=namespace)
            return str(run.run_id)


def with_images(text: str, images: str | None) -> str:
    """The compiled YAML with its images taken from the prefix `images` instead of `feyntune`."""
    if not images:
        return text
    documents = list(yaml.safe_load_all(text))
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = executor["container"]
        container["image"] = f"{images.rstrip('/')}/{container['image'].rpartition('/')[2]}"
    return str(yaml.safe_dump_all(documents, sort_keys=True))


@contextmanager
def _client(host: str, namespace: str | None, token_file: str | None) -> Iterator[Any]:
    """A client of `host`, whose errors become one sentence."""
    import requests
    import urllib3
    from kfp import Client
    from kfp_server_api import ApiException

    token = Path(token_file).read_text().strip() if token_file else None
    try:
        # The client itself asks five times over 25 seconds and then hides the answer.
        health = requests.get(
            f"{host.rstrip('/')}/apis/v2beta1/healthz",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=30,
        )
        if not health.ok:
            raise ApiException(status=health.status_code, reason=health.reason)
        yield Client(host=host, namespace=namespace or "kubeflow", existing_token=token)
    except ApiException as e:
        hint = "give a token it accepts (--token-file)" if e.status in (401, 403) else "see its logs"
        raise UserError(f"Kubeflow Pipelines at {host} answered {e.status} {e.reason}: {hint}.") from e
    except (urllib3.exceptions.HTTPError, OSError) as e:
        raise UserError(f"Kubeflow Pipelines at {host} does not answer ({type(e).__name__}): check --host.") from e


@contextmanager
def _package(pipeline: str, images: str | None, flavour: str, settings: str | None) -> Iterator[Path]:
    compiled = COMPILED / f"{pipeline}{'' if flavour == 'gpu' else '-cpu'}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"feyntune-{pipeline}.yaml"
        text = compiled.read_text()
        path.write_text(adapt(text, read_settings(settings)) if settings else with_images(text, images))
        yield path


def _upload_once(client: Any, name: str, version: str, package: Path, namespace: str | None) -> str:
    # get_pipeline_id of the client looks among shared pipelines only.
    wanted = json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})
    found = client.list_pipelines(filter=wanted, namespace=namespace).pipelines
    if found:
        pipeline = found[0].pipeline_id
    else:
        pipeline = client.upload_pipeline(str(package), pipeline_name=name, namespace=namespace).pipeline_id
        # Kubeflow names the first version after the pipeline; ours are named after the release.
    for known in client.list_pipeline_versions(pipeline, page_size=100).pipeline_versions or []:
        if known.display_name == version:
            return str(known.pipeline_version_id)
    return str(client.upload_pipeline_version(str(package), version, pipeline_id=pipeline).pipeline_version_id)
