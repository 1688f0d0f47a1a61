"""Upload the compiled pipelines to a Kubeflow Pipelines host, start runs there, and follow them.

Idempotent: a pipeline is made once, each release once as a version of it.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from feyntune.constants import VERSION
from feyntune.environment import is_sendable
from feyntune.errors import UserError
from feyntune.kubeflow.adapt import COMPILED, Settings, adapt, check_type, read_settings
from feyntune.kubeflow.preflight import choose_variants, refuse_null
from feyntune.network import certificates_file, checked_address, describe_failure, proxy_for
from feyntune.recipe import check_recipe
from feyntune.telemetry import log

PIPELINES = ("suite", "variant")
EXPERIMENT = "feyntune"


class Unreachable(UserError):
    """Kubeflow does not answer now; a later try may."""


def upload(
    host: str,
    version: str,
    images: str | None = None,
    namespace: str | None = None,
    flavor: str = "gpu",
    token_file: str | None = None,
    settings: str | None = None,
) -> dict[str, str]:
    """Upload the compiled pipelines to Kubeflow Pipelines; returns the ID of each one's version.

    Args:
        images: prefix of the images in your registry, such as `registry.example/team`; `feyntune` by default.
        namespace: profile namespace of a multi-user Kubeflow.
        flavor: `cpu` for a cluster without GPUs.
        token_file: file with a bearer token, as a mounted ServiceAccount token is.
        settings: file with the cluster's own values (see adapt.py); `images` and `flavor` are then left to it.

    Raises:
        UserError: the host does not answer, or refuses.
    """
    ids = {}
    prefix = read_settings(settings).name if settings else "feyntune"
    with kubeflow_client(host, namespace, token_file) as client:
        for name in PIPELINES:
            with _package(name, images, flavor, settings) as package:
                pipeline = _pipeline_id(client, f"{prefix}-{name}", package, namespace)
                ids[name] = _version_id(client, pipeline, version, package)
    return ids


def submit(
    host: str,
    pipeline: str,
    arguments: dict[str, Any],
    images: str | None = None,
    namespace: str | None = None,
    flavor: str = "gpu",
    token_file: str | None = None,
    settings: str | None = None,
) -> str:
    """Start a run of `suite` or `variant` and return its ID. Arguments and errors as for `upload`.

    The run belongs to the newest uploaded version of the pipeline; with `images`, `settings` or `flavor`, to a version
    with those values, which is uploaded unless it is there.

    Raises:
        UserError: also where the pipeline has no such parameter, or one has a value that a run would refuse.
    """
    prefix = read_settings(settings).name if settings else "feyntune"
    own = bool(images or settings or flavor != "gpu")
    if arguments.get("mixtures"):
        arguments = {"variants": [], **arguments}  # all of theirs, in place of the catalog's twenty
    with _package(pipeline, images, flavor, settings) as package:
        text = package.read_text(encoding="utf-8")
        check_arguments(pipeline, next(yaml.load_all(text, Loader=yaml.CSafeLoader)), arguments)
        with kubeflow_client(host, namespace, token_file) as client:
            pipeline_id = _pipeline_id(client, f"{prefix}-{pipeline}", package, namespace)
            version_id = None if own else _newest_version(client, pipeline_id)
            if version_id is None:
                version = f"{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if own else VERSION
                version_id = _version_id(client, pipeline_id, version, package)
            experiment = client.create_experiment(EXPERIMENT, "Runs of feyntune.", namespace=namespace)
            run = client.run_pipeline(
                experiment.experiment_id,
                _run_name(pipeline, arguments),
                params=arguments,
                pipeline_id=pipeline_id,
                version_id=version_id,
            )
    if not run.run_id:
        raise UserError(f"{host} accepted the run but gave it no ID: is it the Kubeflow Pipelines API (--host)?")
    log.info("run %s: %s", run.run_id, run_page(host, str(run.run_id)))
    return str(run.run_id)


def run_page(host: str, run_id: str) -> str:
    """Address of the run in the web UI, where `host` is the UI's; else what to open in it."""
    import requests

    host, page = _api_host(host), f"#/runs/details/{run_id}"
    with suppress(requests.RequestException):
        front = requests.get(host, timeout=10, headers={"Accept": "text/html"})
        if front.ok and "html" in front.headers.get("content-type", ""):
            return f"{host.rstrip('/')}/{page}"
    return f"{page} of the Kubeflow Pipelines UI ({host} is its API)"


def check_arguments(pipeline: str, spec: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Refuse what the server or the run's first step would refuse.

    Raises:
        UserError: an unknown parameter, a value of the wrong type, an unknown variant or setting.
    """
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in arguments.items():
        if name not in parameters:
            raise UserError(f"{pipeline} has no parameter {name!r}: it has {', '.join(sorted(parameters))}.")
        refuse_null(value, name)
        check_type(name, value, parameters[name]["parameterType"])
    given = {name: arguments.get(name, p.get("defaultValue")) for name, p in parameters.items()}
    choose_variants(given["variants"] if "variants" in given else [given["variant"]], given.get("mixtures"))
    check_recipe(given["recipe"], devices=int(given["devices"]))


def _run_name(pipeline: str, arguments: dict[str, Any]) -> str:
    names = [arguments["variant"]] if "variant" in arguments else arguments.get("variants", [])
    what = names[0] if names else pipeline
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{what}{more}, {datetime.now():%Y-%m-%d %H:%M}"


@contextmanager
def kubeflow_client(host: str, namespace: str | None, token_file: str | None) -> Iterator[Any]:
    """A client of `host`, whose errors become one sentence."""
    import requests
    import urllib3
    from kfp import Client
    from kfp_server_api import ApiException

    host = _api_host(host)
    token = _token_in(token_file) if token_file else None
    proxy, bundle = proxy_for(host), certificates_file()
    try:
        # The client itself asks five times over 25 seconds and then hides the answer.
        health = requests.get(
            f"{host.rstrip('/')}/apis/v2beta1/healthz",
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=30,
            verify=bundle or True,
            proxies={"http": proxy or "", "https": proxy or ""},  # "": none, whatever the environment says
        )
        _refuse_login_page(host, health)
        # The client warns about versions of Kubeflow, and prints addresses of the API as if they were the UI's.
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield Client(
                host=host, namespace=namespace or "kubeflow", existing_token=token, proxy=proxy, ssl_ca_cert=bundle
            )
    except ApiException as e:
        kind = Unreachable if e.status >= 500 else UserError
        raise kind(_sentence(host, e.status, e.reason, e.body)) from e
    except (urllib3.exceptions.HTTPError, OSError) as e:
        cause = e.args[0] if isinstance(e, requests.RequestException) and e.args else e  # urllib3's, in its wrapping
        why = describe_failure(cause if isinstance(cause, Exception) else e, host)
        raise Unreachable(f"Kubeflow Pipelines at {host} does not answer ({why}): check --host.") from e


def _api_host(host: str) -> str:
    """The host's address, of which a browser shows more: `#/pipelines` is a page of the UI.

    Raises:
        UserError: it is none.
    """
    return checked_address(host.partition("#")[0].rstrip("/"), "--host http://localhost:8888")


def _token_in(file: str) -> str:
    """A bearer token.

    Raises:
        UserError: there is none in the file, or what no header can carry.
    """
    try:
        token = Path(file).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--token-file {file} cannot be read ({type(e).__name__}): correct it.") from None
    if not is_sendable(token):
        raise UserError(f"--token-file {file} does not hold one token alone: correct it.")
    return token


def _refuse_login_page(host: str, health: Any) -> None:
    """The API answers in JSON; a proxy that wants a login sends its page, often with status 200."""
    if not health.ok:
        kind = Unreachable if health.status_code >= 500 else UserError
        raise kind(_sentence(host, health.status_code, health.reason, health.text))
    try:
        answer = health.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        where = f" (sent to {health.url.partition('?')[0]})" if health.history else ""
        raise UserError(
            f"{host} answered with a web page, not with Kubeflow's API{where}: if it asks for a login, give "
            "--token-file a token that it accepts, or forward the port of service/ml-pipeline and use that as --host."
        )


def _sentence(host: str, status: int, reason: str, body: str | bytes | None) -> str:
    """What the server refused and why, from the bodies that its API and its upload page send."""
    why = reason
    with suppress(ValueError, TypeError, AttributeError):
        answer = json.loads(body or "")
        details = [d["message"] for d in answer.get("details", []) if isinstance(d, dict) and d.get("message")]
        why = (details or [answer.get("message") or answer.get("error_message") or answer.get("error") or reason])[0]
    why = " ".join(str(why).split())[:300].rstrip(".")
    if status in (401, 403):
        hint = "give a token it accepts (--token-file)"
    elif status == 400:
        hint = "correct the value, or see the log of the ml-pipeline pod"
    else:
        hint = "see the log of the ml-pipeline pod"
    return f"Kubeflow Pipelines at {host} answered {status}, {why}: {hint}."


@contextmanager
def _package(pipeline: str, images: str | None, flavor: str, settings: str | None) -> Iterator[Path]:
    given = read_settings(settings) if settings else Settings(images=images or "", gpus=0 if flavor == "cpu" else None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"feyntune-{pipeline}.yaml"
        path.write_text(adapt((COMPILED / f"{pipeline}.yaml").read_text(encoding="utf-8"), given), encoding="utf-8")
        yield path


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def _pipeline_id(client: Any, name: str, package: Path, namespace: str | None) -> str:
    """The pipeline, made without a version when it is missing: an upload would add one named after the pipeline."""
    from kfp_server_api import ApiException, PipelineServiceApi, V2beta1Pipeline

    # get_pipeline_id of the client looks among shared pipelines only.
    listed = client.list_pipelines(filter=_named(name), namespace=namespace).pipelines
    if not listed:
        info = next(yaml.load_all(package.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))["pipelineInfo"]
        new = V2beta1Pipeline(display_name=name, name=name, description=info["description"], namespace=namespace)
        try:
            created = PipelineServiceApi(client._pipelines_api.api_client).pipeline_service_create_pipeline(new)
            return str(created.pipeline_id)
        except ApiException as e:
            if e.status != 409:
                raise
        listed = client.list_pipelines(filter=_named(name), namespace=namespace).pipelines
    return str(listed[0].pipeline_id)


def _version_id(client: Any, pipeline_id: str, version: str, package: Path) -> str:
    from kfp_server_api import ApiException

    listed = client.list_pipeline_versions(pipeline_id, filter=_named(version)).pipeline_versions
    if not listed:
        description = f"feyntune {VERSION}"
        try:
            made = client.upload_pipeline_version(
                str(package), version, pipeline_id=pipeline_id, description=description
            )
            return str(made.pipeline_version_id)
        except ApiException as e:
            if e.status != 409:  # uploaded by another client meanwhile
                raise
        listed = client.list_pipeline_versions(pipeline_id, filter=_named(version)).pipeline_versions
    return str(listed[0].pipeline_version_id)


def _newest_version(client: Any, pipeline_id: str) -> str | None:
    listed = client.list_pipeline_versions(pipeline_id, page_size=1, sort_by="created_at desc").pipeline_versions
    return str(listed[0].pipeline_version_id) if listed else None
