"""The `feyntune` command. Verbs mirror the rooms; each step can be used without Kubeflow. Exit codes: EXIT_CODES."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from feyntune.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED_BRANCH,
    EXIT_INTERRUPTED,
    Interrupted,
    UserError,
)
from feyntune.telemetry import setup

EXIT_CODES = {
    0: "done",
    1: "a fault, with its traceback; or `doctor` found something missing",
    EXIT_BAD_INPUT: "bad input, said in one sentence",
    EXIT_FAILED_BRANCH: "a branch of the run failed; the others are in the report",
    EXIT_INTERRUPTED: "interrupted and saved: start again to go on",
}

app = typer.Typer(
    help="From arXiv abstracts to a family of domain-adapted language models behind one endpoint.\n\n"
    "Begin with `feyntune run`; `feyntune doctor` says what is missing here.\n\nExit codes: "
    + ". ".join(f"{code} is {meaning}" for code, meaning in EXIT_CODES.items())
    + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
registry_app = typer.Typer(help="What is registered, and what is served.", no_args_is_help=True)
app.add_typer(registry_app, name="registry")

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object and nothing else.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")]
Data = Annotated[Path, typer.Option(help="Folder of a split.")]
Base = Annotated[str, typer.Option(help="Base model: a folder, s3://BUCKET/FOLDER, or a hub id such as ORG/NAME.")]
RegistryUri = Annotated[str, typer.Option("--registry", help="Folder or s3:// address of the registry.")]
Flavour = Annotated[Literal["gpu", "cpu"], typer.Option(help="With or without GPUs.")]
TokenFile = Annotated[Optional[str], typer.Option(help="File with a bearer token for the host.")]  # noqa: UP045
ClusterSettings = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--settings",
        help="File with a cluster's own values (images, GPU pool, defaults), see feyntune/kubeflow/adapt.py.",
    ),
]
Recipe = Annotated[
    str,
    typer.Option(help="Settings to change, as JSON, such as '{\"epochs\": 2}'; docs/reference/settings.md lists them."),
]
DEFAULT_WORKDIR = Path("runs")
DEFAULT_REGISTRY = "runs/registry"


def main() -> None:
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as e:
        print(f"interrupted: {e or 'stopped'}; start again to go on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _say(result: dict[str, Any], as_json: bool, line: str) -> None:
    print(json.dumps(result) if as_json else line)


@app.command(epilog="Example: feyntune run --source kaggle:arxiv-metadata-oai-snapshot.json.zip --variants all")
def run(
    source: Annotated[str, typer.Option(help="kaggle:FILE, oai:URL, atom:FILE or synthetic:N.")] = "synthetic:1200",
    variants: Annotated[
        str, typer.Option(help="Variants, separated by commas (`all` for all twenty).")
    ] = "hep-th/lora-qkv,hep-th/lora-all",
    workdir: Annotated[Path, typer.Option(help="Folder that keeps runs, and what they need not do again.")] = (
        DEFAULT_WORKDIR
    ),
    base: Annotated[Optional[str], typer.Option(help="Base model; a tiny one is made by default.")] = None,  # noqa: UP045
    until: Annotated[str, typer.Option(help="Only papers first submitted up to this date (YYYY-MM-DD).")] = "",
    after: Annotated[str, typer.Option(help="Papers first submitted after this date are held out for testing.")] = "",
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='Settings as JSON: {"train": {…}, "evaluate": {…}}.'),
    ] = None,
    devices: Annotated[int, typer.Option(help="Training processes, one a GPU.")] = 1,
    as_json: Json = False,
) -> None:
    """Run the compiled suite on this machine, from abstracts to a registry."""
    from feyntune.kubeflow import local
    from feyntune.variants import load_variants

    setup(quiet=as_json)
    names = load_variants().names() if variants == "all" else [v.strip() for v in variants.split(",") if v.strip()]
    failed = None
    try:
        folder = local.run(
            source,
            names,
            workdir,
            until=until,
            after=after,
            base=base,
            recipe=_settings(recipe) if recipe else None,
            devices=devices,
        )
    except local.RunFailed as e:
        failed, folder = e, (workdir / "latest").resolve()
    summary = folder / "summary.json"
    if failed is None or failed.reported:
        if as_json:
            print(summary.read_text())
        else:
            local.show(folder, workdir)
    if failed is not None:
        print(f"error: {failed}", file=sys.stderr)
        sys.exit(EXIT_FAILED_BRANCH)


@app.command(epilog="Example: feyntune ingest oai:https://oaipmh.arxiv.org/oai --oai-set physics:hep-th --out corpus")
def ingest(
    source: Annotated[str, typer.Argument(help="kaggle:FILE, oai:URL, atom:FILE or synthetic:N.")],
    out: Out,
    until: Annotated[Optional[str], typer.Option(help="Only papers first submitted up to this date.")] = None,  # noqa: UP045
    categories: Annotated[str | None, typer.Option(help="Archives or categories to keep, by commas.")] = None,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable records at which to stop.")] = 0.001,
    converted_text: Annotated[
        bool, typer.Option(help="Accept formats that turn TeX into Unicode (never mix them with others).")
    ] = False,
    oai_set: Annotated[Optional[str], typer.Option(help="OAI set, such as physics:hep-th.")] = None,  # noqa: UP045
    prefix: Annotated[str, typer.Option(help="OAI metadata prefix.")] = "arXivRaw",
    since: Annotated[Optional[str], typer.Option(help="OAI: only records changed since this date.")] = None,  # noqa: UP045
    delay: Annotated[float, typer.Option(help="OAI: seconds between requests (arXiv asks for 3).")] = 3.0,
    state: Annotated[Optional[Path], typer.Option(help="OAI: folder that lets a harvest resume.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Read papers from a source into a canonical corpus."""
    from feyntune.ingestion.ingest import ingest

    setup(quiet=as_json)
    manifest = ingest(
        source,
        out,
        until=until,
        categories=_names(categories),
        max_bad=max_bad,
        converted_text=converted_text,
        oai_set=oai_set,
        prefix=prefix,
        since=since,
        delay=delay,
        state=state,
    )
    counts = json.loads((out / "counts.json").read_text())
    _say(
        {**counts, "digest": manifest.digest},
        as_json,
        f"{out}: {counts['kept']:,} papers, digest {manifest.digest[:16]}",
    )


@app.command(epilog="Example: feyntune split corpus --out split --after 2024-01-01")
def split(
    corpus: Annotated[Path, typer.Argument(help="Folder of a corpus.")],
    out: Out,
    after: Annotated[str | None, typer.Option(help="Papers after this date are held out for testing.")] = None,
    previous: Annotated[Path | None, typer.Option(help="An earlier split, whose papers stay where they are.")] = None,
    mixtures: Annotated[Optional[Path], typer.Option(help="Your own mixtures file.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Assign papers to train, validation and test; draw the mixtures; audit for leaks."""
    from feyntune.splitting.split import split

    setup(quiet=as_json)
    manifest = split(corpus, out, after=after, previous=previous, mixtures=mixtures)
    audit = json.loads((out / "audit.json").read_text())
    _say({**audit, "digest": manifest.digest}, as_json, f"{out}: digest {manifest.digest[:16]}; see audit.json")


@app.command(
    epilog="Example: feyntune train --data split --mix hep-th --method lora-qkv --base runs/base --out adapter"
)
def train(
    data: Data,
    mixture: Annotated[str, typer.Option("--mix", help="Mixture, such as hep-th.")],
    method: Annotated[str, typer.Option(help="lora-qkv or lora-all.")],
    base: Base,
    out: Out,
    recipe: Recipe = "{}",
    checkpoints: Annotated[str | None, typer.Option(help="Folder or s3:// address for checkpoints.")] = None,
    as_json: Json = False,
) -> None:
    """Train one adapter. Started again after an interruption, it goes on from its newest checkpoint."""
    from feyntune.model.base import pin_base
    from feyntune.training.launch import launch

    setup(quiet=as_json)
    place = checkpoints or str(out.with_name(f".{out.name}.state"))
    manifest = launch(
        data=str(data), mixture=mixture, method=method, base=pin_base(base), out=str(out), config=_settings(recipe),
        checkpoints=place,
    )  # fmt: skip
    line = f"{out}: {manifest.stats['train_tokens']:,} tokens in {manifest.stats['seconds']:.0f} s"
    _say({**manifest.stats, "digest": manifest.digest}, as_json, line)


@app.command(
    epilog="Example: feyntune evaluate --data split --base runs/base --adapter hep-th/lora-qkv=adapter --out measured"
)
def evaluate(
    data: Data,
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder to write: scores/ and comparison/.")],
    adapter: Annotated[Optional[list[str]], typer.Option(help="NAME=DIR; repeat for more.")] = None,  # noqa: UP045
    recipe: Annotated[
        str,
        typer.Option(
            help="Settings to change, as JSON, such as '{\"tokens_per_batch\": 2048}'; see docs/reference/settings.md."
        ),
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Score the base and adapters on the test abstracts, and compare them."""
    from feyntune.evaluation.compare import compare
    from feyntune.evaluation.config import EvaluateConfig
    from feyntune.evaluation.evaluate import evaluate
    from feyntune.model.base import pin_base

    setup(quiet=as_json)
    adapters = dict(_pair(item, "--adapter NAME=DIR") for item in adapter or [])
    config = _checked(EvaluateConfig, _settings(recipe))
    evaluate(str(data), pin_base(base), adapters, out / "scores", config)
    compare([out / "scores"], adapters, str(data), out / "comparison")
    summary = json.loads((out / "comparison" / "summary.json").read_text())
    _say(summary, as_json, (out / "comparison" / "table.md").read_text())


@app.command(epilog="Example: feyntune register measured/comparison --adapter hep-th/lora-qkv=adapter")
def register(
    comparison: Annotated[Path, typer.Argument(help="Folder of a comparison.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=DIR; repeat for more.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    policy: Annotated[Optional[Path], typer.Option(help="Gate policy file.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Register measured adapters and promote the best one past the gate."""
    from feyntune.registry.register import register

    setup(quiet=as_json)
    adapters = dict(_pair(item, "--adapter NAME=DIR") for item in adapter)
    done = register(str(comparison), adapters, registry, policy=policy)
    _say(done.model_dump(mode="json"), as_json, f"champion: {done.champion or 'none'}")


@app.command(epilog="Example: feyntune serve --base runs/base --registry runs/registry --port 8080")
def serve(
    base: Base,
    registry: RegistryUri = DEFAULT_REGISTRY,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8081,
    precision: Annotated[str, typer.Option(help="Of the base in memory: bf16, fp32 or nf4.")] = "fp32",
    max_adapters: Annotated[int, typer.Option(help="Most adapters in memory.")] = 40,
    max_rank: Annotated[int, typer.Option(help="Largest LoRA rank.")] = 16,
    canary_share: Annotated[
        float, typer.Option(help="Share (0 to 1) of the champion's requests for the newest version in staging.")
    ] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="Time for running requests after SIGTERM.")] = 60.0,
    linger_seconds: Annotated[float, typer.Option(help="Time to take new requests after SIGTERM.")] = 0.0,
    keys_file: Annotated[Optional[Path], typer.Option(help="Bearer keys, one a line; without it all may ask.")] = None,  # noqa: UP045
    workbench: Annotated[bool, typer.Option(help="Show browsers a page to compare completions on, at /.")] = True,
) -> None:
    """Serve the base and every registered adapter from one endpoint."""
    from feyntune.serving.serve import serve

    setup()
    if precision not in ("bf16", "fp32", "nf4"):
        raise UserError(f"--precision {precision}: choose bf16, fp32 or nf4.")
    serve(
        registry,
        base,
        host=host,
        port=port,
        grpc_port=grpc_port,
        precision=precision,  # type: ignore[arg-type]
        max_adapters=max_adapters,
        max_rank=max_rank,
        canary_share=canary_share,
        drain_seconds=drain_seconds,
        linger_seconds=linger_seconds,
        keys_file=keys_file,
        workbench=workbench,
    )


@app.command("compile", epilog="Example: feyntune compile --settings cluster.yaml --out build")
def compile_(
    out: Out,
    settings: ClusterSettings = None,
    as_json: Json = False,
) -> None:
    """Write the pipelines' YAML, with a cluster's own values in it, to upload by hand."""
    from feyntune.kubeflow.adapt import COMPILED, Settings, adapt, read_settings

    values = read_settings(settings) if settings else Settings()
    out.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for source in sorted(COMPILED.glob("*.yaml")):
        sizes[str(out / source.name)] = (out / source.name).write_text(adapt(source.read_text(), values))
    _say(sizes, as_json, "\n".join(f"{path}  {size:,} bytes" for path, size in sizes.items()))


@app.command(epilog="Example: feyntune promote hep-th/lora-qkv --registry s3://feyntune/registry")
def promote(
    name: Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    alias: Annotated[str, typer.Option(help="champion, or champion:MIXTURE.")] = "champion",
    as_json: Json = False,
) -> None:
    """Put a version that passed the gate into production; endpoints follow by themselves."""
    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    version = Registry.open(registry).promote(name, alias)
    _say(version.model_dump(mode="json"), as_json, f"{alias} is {version.name}")


@app.command(epilog="Example: feyntune rollback --registry s3://feyntune/registry")
def rollback(
    registry: RegistryUri = DEFAULT_REGISTRY,
    alias: Annotated[str, typer.Option(help="champion, or champion:MIXTURE.")] = "champion",
    as_json: Json = False,
) -> None:
    """Give an alias back to the version that held it before."""
    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    version = Registry.open(registry).rollback(alias)
    _say(version.model_dump(mode="json"), as_json, f"{alias} is {version.name}")


@app.command(
    epilog="Example: feyntune plan --variants hep-th/lora-qkv,hep-th/lora-all --hardware h100 --devices 1 --price 2.5"
)
def plan(
    variants: Annotated[
        str, typer.Option(help="Variants, separated by commas (`all` for the paper's twenty).")
    ] = "all",
    hardware: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100 or h200.")] = "a100-40gb",
    devices: Annotated[int, typer.Option(help="Devices of one training.")] = 3,
    tokens_per_second: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Measured useful tokens a second of one device; stated from --utilisation otherwise."),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the device's peak that is assumed.")] = 0.35,
    price: Annotated[Optional[float], typer.Option(help="Of one device for one hour.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Tokens, steps, memory, GPU-hours and money of variants before any is run, beside the published recipe's."""
    from dataclasses import asdict

    from rich.table import Table

    from feyntune.training.estimate import paper_variants, plan_variants, totals
    from feyntune.variants import select_variants

    setup(quiet=as_json)
    papers = paper_variants()
    names = list(papers) if variants == "all" else select_variants([v.strip() for v in variants.split(",")])
    rows = plan_variants(
        {name: papers[name] for name in names},
        hardware,
        devices,
        tokens_per_second=tokens_per_second,
        utilisation=utilisation,
        price=price,
    )
    whole = totals(rows)
    if as_json:
        print(json.dumps({"variants": [asdict(r) for r in rows], "totals": whole}))
        return
    rate = f"{tokens_per_second:,.0f} tokens/s measured" if tokens_per_second else f"{utilisation:.0%} of peak, assumed"
    table = Table(title=f"{devices} x {hardware}, {rate}", title_justify="left")
    table.add_column("variant")
    for column in ("tokens", "steps", "GiB", "GPU-hours", "hours", "published GPU-hours", "published hours"):
        table.add_column(column, justify="right")
    for name, r in [*((r.variant, asdict(r)) for r in rows), ("all", whole)]:
        table.add_row(
            name,
            f"{r['tokens']:,}",
            f"{r['steps']:,}",
            f"{r['memory_bytes'] / 2**30:.1f}",
            *(f"{r[key]:,.1f}" for key in ("gpu_hours", "hours", "published_gpu_hours", "published_hours")),
        )
    _print(table)
    if price is not None:
        print(f"money: {whole['money']:,.2f}; the published recipe's: {whole['published_money']:,.2f}")


@app.command("push-base", epilog="Example: feyntune push-base llama-3.1-8b s3://feyntune/bases/llama-3.1-8b")
def push_base(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model: config, tokenizer, safetensors.")],
    address: Annotated[str, typer.Argument(help="Where to put it: s3://BUCKET/FOLDER.")],
    as_json: Json = False,
) -> None:
    """Put a base model into the store, sealed, so that every step and endpoint can take it from there."""
    from feyntune.model.base import push_base

    setup(quiet=as_json)
    pinned = push_base(folder, address)
    _say({"base": pinned}, as_json, pinned)


@app.command(epilog="Example: feyntune deploy serving.yaml --timeout 900")
def deploy(
    spec: Annotated[Path, typer.Argument(help="YAML file of what is to be served (feyntune/deployment/deploy.py).")],
    url: Annotated[Optional[str], typer.Option(help="Where this machine reaches the endpoint.")] = None,  # noqa: UP045
    key_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File with one of the endpoint's bearer keys, where it asks for one (keys_secret)."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until it must answer.")] = 1800,
    as_json: Json = False,
) -> None:
    """Bring the registry's adapters to answer on a cluster; put everything back if they do not."""
    import yaml
    from pydantic import SecretStr

    from feyntune.deployment.deploy import deploy, parse_spec

    setup(quiet=as_json)
    if not spec.is_file():
        raise UserError(f"{spec}: there is no such file.")
    if key_file is not None and not key_file.is_file():
        raise UserError(f"--key-file {key_file}: there is no such file.")
    key = SecretStr(key_file.read_text().strip()) if key_file is not None else None
    done = deploy(parse_spec(yaml.safe_load(spec.read_text())), url, key, timeout=timeout)
    _say(done.model_dump(mode="json"), as_json, f"{done.service} answers at {done.url}")


@registry_app.command("ls", epilog="Example: feyntune registry ls --registry s3://feyntune/registry")
def registry_ls(registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """All versions, their stage, what they measured, and which alias they hold."""
    from rich.table import Table

    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    state = Registry.open(registry).snapshot()
    if as_json:
        versions = [v.model_dump(mode="json") for v in state.versions.values()]
        print(json.dumps({"versions": versions, "aliases": state.aliases}))
        return
    table = Table()
    for column in ("version", "stage", "minus base [95 %]", "aliases", "added"):
        table.add_column(column)
    for v in state.versions.values():
        delta = v.measured.delta
        aliases = ", ".join(a for a, name in state.aliases.items() if name == v.name)
        table.add_row(
            v.name, v.stage, f"{delta.mean:+.2f} [{delta.low:+.2f}, {delta.high:+.2f}]", aliases, v.added[:19]
        )
    _print(table)


@registry_app.command("show", epilog="Example: feyntune registry show champion")
def registry_show(
    name: Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """One version: its lineage, its verdict, and its model card."""
    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    opened = Registry.open(registry)
    version = opened.resolve(name)
    _say(version.model_dump(mode="json"), as_json, opened.card(version.name))


@registry_app.command("history", epilog="Example: feyntune registry history")
def registry_history(registry: RegistryUri = DEFAULT_REGISTRY, as_json: Json = False) -> None:
    """Every decision, oldest first, rejected ones included."""
    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    entries = Registry.open(registry).history()
    if as_json:
        print(json.dumps([e.model_dump(mode="json") for e in entries]))
        return
    for e in entries:
        names = ", ".join([v.name for v in e.event.add] or e.event.versions)
        moves = ", ".join(f"{alias}: {m.old or 'nobody'} -> {m.new or 'nobody'}" for alias, m in e.event.moves.items())
        note = f"  (rejected: {e.rejected})" if e.rejected else ""
        print(f"{e.event.time[:19]} {e.event.kind:9} {names}  {moves}{note}")


@registry_app.command("diff", epilog="Example: feyntune registry diff champion previous")
def registry_diff(
    one: Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")],
    other: Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")],
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Where two versions differ."""
    from feyntune.registry.registry import Registry
    from feyntune.registry.replay import diff

    setup(quiet=as_json)
    opened = Registry.open(registry)
    found = diff(opened.resolve(one), opened.resolve(other))
    _say({k: list(v) for k, v in found.items()}, as_json, "\n".join(f"{k}: {a} -> {b}" for k, (a, b) in found.items()))


@registry_app.command("export", epilog="Example: feyntune registry export champion --out my-adapter")
def registry_export(
    name: Annotated[str, typer.Argument(help="Variant, VARIANT@DIGEST or alias.")],
    out: Out,
    registry: RegistryUri = DEFAULT_REGISTRY,
    as_json: Json = False,
) -> None:
    """Write a version as a folder that PEFT loads."""
    from feyntune.registry.registry import Registry

    setup(quiet=as_json)
    version = Registry.open(registry).export(name, out)
    _say({"folder": str(out), "version": version.name}, as_json, f"{out}: {version.name}")


@app.command(epilog="Example: feyntune upload --host http://localhost:8888 --images registry.example/team")
def upload(
    host: Annotated[str, typer.Option(help="URL of Kubeflow Pipelines.")],
    version: Annotated[Optional[str], typer.Option(help="Name of the version; the package's by default.")] = None,  # noqa: UP045
    images: Annotated[Optional[str], typer.Option(help="Prefix of the images in your registry.")] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], typer.Option(help="Profile namespace (multi-user Kubeflow).")] = None,  # noqa: UP045
    flavour: Flavour = "gpu",
    token_file: TokenFile = None,
    settings: ClusterSettings = None,
    as_json: Json = False,
) -> None:
    """Make the pipelines stand in the Kubeflow UI, ready to start."""
    from importlib import metadata

    from feyntune.kubeflow.submit import upload

    setup(quiet=as_json)
    ids = upload(host, version or metadata.version("feyntune"), images, namespace, flavour, token_file, settings)
    _say(ids, as_json, "\n".join(f"feyntune-{name}: version {i}" for name, i in ids.items()))


@app.command(
    epilog='Example: feyntune submit --host http://localhost:8888 --arguments "$(cat manifests/samples/run.json)"'
)
def submit(
    host: Annotated[str, typer.Option(help="URL of Kubeflow Pipelines.")],
    pipeline: Annotated[str, typer.Option(help="suite or variant.")] = "suite",
    arguments: Annotated[str, typer.Option(help="The run's parameters, as JSON.")] = "{}",
    images: Annotated[Optional[str], typer.Option(help="Prefix of the images in your registry.")] = None,  # noqa: UP045
    namespace: Annotated[Optional[str], typer.Option(help="Profile namespace (multi-user Kubeflow).")] = None,  # noqa: UP045
    flavour: Flavour = "gpu",
    token_file: TokenFile = None,
    settings: ClusterSettings = None,
    as_json: Json = False,
) -> None:
    """Start a run on a Kubeflow host."""
    from feyntune.kubeflow.submit import submit

    setup(quiet=as_json)
    if pipeline not in ("suite", "variant"):
        raise UserError(f"--pipeline {pipeline}: choose suite or variant.")
    run_id = submit(
        host, pipeline, _settings(arguments, "--arguments"), images, namespace, flavour, token_file, settings
    )
    _say({"run": run_id}, as_json, f"started run {run_id}")


@app.command(epilog="Example: feyntune doctor --store s3://feyntune --host http://localhost:8888")
def doctor(
    store: Annotated[Optional[str], typer.Option(help="Store to try: a folder or s3://BUCKET/PREFIX.")] = None,  # noqa: UP045
    host: Annotated[Optional[str], typer.Option(help="URL of Kubeflow Pipelines to try.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """What is missing on this machine or cluster, one sentence each."""
    from rich.table import Table

    from feyntune.doctor import examine

    setup(quiet=as_json)
    found = list(examine(store, host))
    if as_json:
        print(json.dumps([f._asdict() for f in found]))
    else:
        table = Table(show_header=False, box=None)
        for f in found:
            table.add_row({"ok": "ok", "missing": "MISSING", "optional": "-"}[f.state], f.what, f.sentence)
        _print(table)
    if any(f.state == "missing" for f in found):
        sys.exit(1)


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _settings(text: str, option: str = "--recipe") -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as e:
        raise UserError(f"{option} is not JSON ({e}): write an object such as '{{\"epochs\": 2}}'.") from e
    if not isinstance(found, dict):
        raise UserError(f"{option} must be a JSON object such as '{{\"epochs\": 2}}'.")
    return found


def _names(text: str | None) -> list[str] | None:
    return [n.strip() for n in text.split(",") if n.strip()] if text else None


study_app = typer.Typer(
    help="A blind study: people score completions without knowing whose they are.", no_args_is_help=True
)
app.add_typer(study_app, name="study")

Completed = Annotated[
    list[Path], typer.Option("--completions", help="Folder with completions, of `evaluate` or `ask`; repeat for more.")
]
Endpoints = Annotated[Path, typer.Option(help="YAML file of endpoints (components/evaluate/README.md).")]
ChoiceOption = Annotated[
    str,
    typer.Option(
        help='Which completions, as JSON, such as \'{"rule": "paper", "decoding": "sampled", "text": "fair"}\'.'
    ),
]


@app.command(
    epilog="Example: feyntune compare --evaluation scores --adapter hep-th/lora-qkv=adapter --data split --out compared"
)
def compare(
    evaluation: Annotated[list[Path], typer.Option(help="Folder of an evaluation; repeat for more.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=DIR; repeat for more.")],
    data: Data,
    out: Out,
    corpus: Annotated[Optional[Path], typer.Option(help="Folder of the corpus, for its figures.")] = None,  # noqa: UP045
    people: Annotated[Optional[Path], typer.Option(help="Folder of `study score`.")] = None,  # noqa: UP045
    judges: Annotated[Optional[list[Path]], typer.Option(help="Folder of `judge`; repeat for more.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Compare what was evaluated, with what people and judges said of it."""
    from feyntune.evaluation.compare import compare

    setup(quiet=as_json)
    adapters = dict(_pair(item, "--adapter NAME=DIR") for item in adapter)
    compare(evaluation, adapters, str(data), out, corpus=corpus, people=people, judges=judges or [])
    _say(json.loads((out / "summary.json").read_text()), as_json, (out / "table.md").read_text())


@app.command(epilog="Example: feyntune ask evaluation/scores --endpoints endpoints.yaml --system claude --out answers")
def ask(
    evaluation: Annotated[Path, typer.Argument(help="Folder of an evaluation with completions of the base.")],
    endpoints: Endpoints,
    out: Out,
    system: Annotated[list[str] | None, typer.Option(help="Endpoint to ask; repeat for more; all by default.")] = None,
    papers: Annotated[int, typer.Option(help="How many beginnings to complete.")] = 100,
    rule: Annotated[str, typer.Option(help="Where beginnings end: paper or careful.")] = "paper",
    split_: Annotated[str, typer.Option("--split", help="test or holdout.")] = "test",
    as_json: Json = False,
) -> None:
    """Have other models complete the same beginnings, as systems to compare."""
    from feyntune.judging.endpoints import load_endpoints
    from feyntune.judging.external import AskConfig, ask

    setup(quiet=as_json)
    known = load_endpoints(endpoints)
    chosen = [_endpoint(known, name, endpoints) for name in system or known]
    config = _checked(AskConfig, {"papers": papers, "rule": rule, "split": split_})
    stats = ask(evaluation, chosen, out, config).stats
    lines = [f"{n}: {f['answers']} of {f['questions']} answers, cost {f['cost']:.4g}" for n, f in stats.items()]
    _say(stats, as_json, "\n".join(lines))


@app.command(epilog="Example: feyntune judge --completions scores --endpoints endpoints.yaml --judge gpt --out judged")
def judge(
    completions: Completed,
    endpoints: Endpoints,
    name: Annotated[str, typer.Option("--judge", help="Endpoint that judges.")],
    out: Out,
    papers: Annotated[int, typer.Option(help="How many papers, each judged in both orders.")] = 100,
    pairs: Annotated[str, typer.Option(help="base (every system against it) or all.")] = "base",
    choice: ChoiceOption = "{}",
    show_reference: Annotated[bool, typer.Option(help="Let the judge read the published rest.")] = False,
    as_json: Json = False,
) -> None:
    """Have a language model judge completions in pairs, blind and in both orders."""
    from feyntune.judging.endpoints import load_endpoints
    from feyntune.judging.judges import JudgeConfig, judge

    setup(quiet=as_json)
    settings = {"papers": papers, "pairs": pairs, "show_reference": show_reference}
    config = _checked(JudgeConfig, {**settings, "choice": _settings(choice, "--choice")})
    judge(completions, _endpoint(load_endpoints(endpoints), name, endpoints), out, config)
    summary = json.loads((out / "summary.json").read_text())
    lines = []
    for d in summary["duels"]:
        w = d["win_rate"]
        rate = "no paper judged" if w["low"] is None else f"{w['mean']:.0%} [{w['low']:.0%}, {w['high']:.0%}]"
        lines.append(f"{d['system']} against {d['against']}: {rate} of {d['papers']} papers")
    about, useless = summary["judge"], summary["unusable"]
    lines.append(f"{about['answers']} answers, {useless['count']} of no use, cost {about['cost']:.4g}")
    _say(summary, as_json, "\n".join(lines))


@study_app.command(
    "make",
    epilog="Example: feyntune study make --completions scores --rater a --rater b --out study --key study-key",
)
def study_make(
    completions: Completed,
    rater: Annotated[list[str], typer.Option(help="Short name of a rater; repeat for more.")],
    out: Out,
    key: Annotated[Path, typer.Option(help="Folder to write the key to; raters must not see it.")],
    papers: Annotated[int, typer.Option(help="Papers drawn.")] = 25,
    common: Annotated[int, typer.Option(help="Of them, those that all raters score.")] = 5,
    system: Annotated[Optional[list[str]], typer.Option(help="System beside the base; repeat; all by default.")] = None,  # noqa: UP045
    choice: ChoiceOption = "{}",
    show_reference: Annotated[bool, typer.Option(help="Show raters the published rest.")] = False,
    seed: Annotated[Optional[int], typer.Option(help="Of the draws; a fresh one by default, kept in the key.")] = None,  # noqa: UP045
) -> None:
    """Draw papers and write one blind sheet a rater, and the key apart from them."""
    from feyntune.study.study import StudyConfig, make

    setup()
    settings = {"raters": rater, "papers": papers, "common": common, "show_reference": show_reference}
    config = _checked(StudyConfig, {**settings, "choice": _settings(choice, "--choice")})
    make(completions, out, key, config, seed, system or [])
    print(f"{out}: {len(rater)} sheets; {key}: the key, keep it from raters")


@study_app.command("serve", epilog="Example: feyntune study serve study --scores scores")
def study_serve(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    scores: Annotated[Path, typer.Option(help="Folder for the scores; start again with it to go on.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
    url: Annotated[Optional[str], typer.Option(help="Address raters reach it by, if another.")] = None,  # noqa: UP045
) -> None:
    """Serve a page to score on; prints a link for every rater."""
    from feyntune.study.page import serve

    setup()
    serve(study, scores, host, port, url)


@study_app.command("score", epilog="Example: feyntune study score study --key study-key --sheets scores --out result")
def study_score(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    key: Annotated[Path, typer.Option(help="Folder of its key.")],
    sheets: Annotated[list[Path], typer.Option(help="Returned sheet, or a folder of them; repeat for more.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Check returned sheets row by row, and say what they mean."""
    from feyntune.study.study import score

    setup(quiet=as_json)
    score(study, key, sheets, out)
    _say(json.loads((out / "summary.json").read_text()), as_json, (out / "summary.md").read_text())


def _endpoint(known: dict[str, Any], name: str, path: Path) -> Any:
    if name not in known:
        raise UserError(f"{path} has no endpoint {name}, only {', '.join(known)}.")
    return known[name]


def _checked(model: Any, settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return model.model_validate(settings)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}.") from e


def _pair(item: str, form: str) -> tuple[str, str]:
    name, equals, folder = item.partition("=")
    if not equals:
        raise UserError(f"{item}: write {form}.")
    return name, folder


if __name__ == "__main__":
    main()
