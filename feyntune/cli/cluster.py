"""Commands for a Kubernetes cluster: compile, upload, submit, deploy, push-base."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from feyntune.cli.options import (
    DEFAULT_WORKDIR,
    Changes,
    Json,
    Out,
    RecipeFile,
    parse_object,
    print_result,
    recipe_of,
    setup_logging,
    shown_path,
    warn,
)
from feyntune.cli.steps import result_rows
from feyntune.errors import UserError

app = typer.Typer()

Flavor = Annotated[Literal["gpu", "cpu"], typer.Option(help="cpu: steps request no GPUs.")]
Host = Annotated[str, typer.Option(help="URL of Kubeflow Pipelines.")]
Images = Annotated[str | None, typer.Option(help="Prefix of the images in your registry.")]
Namespace = Annotated[str | None, typer.Option(help="Profile namespace (multi-user Kubeflow).")]
TokenFile = Annotated[str | None, typer.Option(help="File with a bearer token for the host.")]
ClusterSettings = Annotated[
    str | None,
    typer.Option(
        "--settings",
        help="File with the cluster's values (images, GPU pool, defaults), see feyntune/kubeflow/adapt.py.",
    ),
]


@app.command("compile", epilog="Example: feyntune compile --settings cluster.yaml --out build")
def compile_(out: Out, settings: ClusterSettings = None, as_json: Json = False) -> None:
    """Write the pipelines' YAML with a cluster's settings, for a manual upload."""
    from feyntune.kubeflow.adapt import COMPILED, Settings, adapt, read_settings

    values = read_settings(settings) if settings else Settings()
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for source in sorted(COMPILED.glob("*.yaml")):
        sizes[str(out / source.name)] = (out / source.name).write_text(
            adapt(source.read_text(encoding="utf-8"), values), encoding="utf-8"
        )
    print_result(sizes, as_json, "\n".join(f"{path}  {size:,} bytes" for path, size in sizes.items()))


@app.command(epilog="Example: feyntune upload --host http://localhost:8888 --images registry.example/team")
def upload(
    host: Host,
    version: Annotated[str | None, typer.Option(help="Name of the version; the package's by default.")] = None,
    images: Images = None,
    namespace: Namespace = None,
    flavor: Flavor = "gpu",
    token_file: TokenFile = None,
    settings: ClusterSettings = None,
    as_json: Json = False,
) -> None:
    """Upload the compiled pipelines to Kubeflow Pipelines."""
    from feyntune import __version__
    from feyntune.kubeflow.submit import upload

    setup_logging(quiet=as_json)
    ids = upload(host, version or __version__, images, namespace, flavor, token_file, settings)
    print_result(ids, as_json, "\n".join(f"feyntune-{name}: version {i}" for name, i in ids.items()))


@app.command(
    epilog='Example: feyntune submit --host http://localhost:8888 --arguments "$(cat manifests/samples/run.json)"'
)
def submit(
    host: Host,
    pipeline: Annotated[str, typer.Option(help="suite or variant.")] = "suite",
    arguments: Annotated[str, typer.Option(help="The run's parameters, as JSON.")] = "{}",
    recipe: RecipeFile = None,
    changes: Changes = None,
    images: Images = None,
    namespace: Namespace = None,
    flavor: Flavor = "gpu",
    token_file: TokenFile = None,
    settings: ClusterSettings = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the run, fetch its report, and end with its exit code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start a run on a Kubeflow host."""
    from feyntune.kubeflow.submit import submit

    setup_logging(quiet=as_json)
    if pipeline not in ("suite", "variant"):
        raise UserError(f"--pipeline {pipeline}: choose suite or variant.")
    values = parse_object(arguments, "--arguments", '{"variants": ["hep-th/lora-all"]}')
    if recipe or changes:
        if "recipe" in values:
            raise UserError("--arguments holds a recipe too: give it there or by --recipe and --set.")
        values["recipe"] = recipe_of(recipe, changes, str(values.get("base", "")), as_json)
    run_id = submit(host, pipeline, values, images, namespace, flavor, token_file, settings)
    if not wait:
        print_result({"run": run_id}, as_json, f"started run {run_id}")
        return
    from feyntune.kubeflow.follow import follow

    ended = follow(host, run_id, namespace, token_file)
    while ended.lost_driver and _can_ask() and typer.confirm(f"{ended.message}\nStart it again?", err=True):
        run_id = submit(host, pipeline, values, images, namespace, flavor, token_file, settings)
        ended = follow(host, run_id, namespace, token_file)
    report = _fetched(ended.store, run_id) if ended.reported else None
    result = {"run": run_id, "exit_code": ended.code, "report": str(report) if report else None}
    print_result(result, as_json, _run_text(run_id, report))
    if ended.code:
        print(f"error: {ended.message}", file=sys.stderr)
        sys.exit(ended.code)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _fetched(store: str, run_id: str) -> Path | None:
    """The report's file on this machine; None, with the reason, where the store cannot be read from here."""
    from feyntune.kubeflow.follow import fetch_report

    try:
        return fetch_report(store, run_id, DEFAULT_WORKDIR / run_id)
    except UserError as e:
        warn(f"the report stays on the cluster, in the run's compare step: {e}")
        return None


def _run_text(run_id: str, report: Path | None) -> str:
    if report is None:
        return f"run     {run_id}"
    summary = json.loads(report.with_name("summary.json").read_text(encoding="utf-8"))
    rows = "\n".join("  ".join(row).rstrip() for row in result_rows(summary))
    return f"{rows}\nreport  {shown_path(report)}"


@app.command("push-base", epilog="Example: feyntune push-base llama-3.1-8b s3://feyntune/bases/llama-3.1-8b")
def push_base(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model: config, tokenizer, safetensors.")],
    address: Annotated[str, typer.Argument(help="Address to copy it to: s3://BUCKET/FOLDER.")],
    precision: Annotated[
        Literal["nf4"] | None, typer.Option(help="nf4: also a quantized copy, which steps in NF4 load directly.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a base model into the store, so that every step and endpoint can read it from there."""
    from feyntune.model.base import check_base, folder_digest

    setup_logging(quiet=as_json)
    if precision == "nf4":
        from feyntune.model.quantize import push_quantized as push
    else:
        from feyntune.model.base import push_base as push
    folder_digest(folder)  # says what is wrong with it
    check_base(str(folder))
    pinned = push(folder, address)
    print_result({"base": pinned}, as_json, pinned)


@app.command(epilog="Example: feyntune deploy serving.yaml --timeout 900")
def deploy(
    spec: Annotated[Path, typer.Argument(help="YAML file that describes the endpoint (docs/operate.md).")],
    url: Annotated[str | None, typer.Option(help="URL at which this machine reaches the endpoint.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with one of the endpoint's bearer keys, if it requires one (keys_secret)."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it to answer.")] = 1800,
    as_json: Json = False,
) -> None:
    """Deploy the registry's adapters to KServe; roll back if a smoke test fails."""
    for path in (spec, key_file):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: there is no such file.")
    import yaml
    from pydantic import SecretStr

    from feyntune.deployment.deploy import deploy, parse_spec

    setup_logging(quiet=as_json)
    key = SecretStr(key_file.read_text(encoding="utf-8").strip()) if key_file is not None else None
    try:
        description = yaml.safe_load(spec.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{spec} is not YAML ({' '.join(str(e).split())}): correct it.") from e
    if not isinstance(description, dict):
        raise UserError(f"{spec} describes no endpoint: write its fields, as docs/operate.md shows.")
    done = deploy(parse_spec(description), url, key, timeout=timeout)
    print_result(done.model_dump(mode="json"), as_json, f"{done.service} answers at {done.url}")
