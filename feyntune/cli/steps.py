"""The pipeline's steps as commands of their own, each usable without Kubeflow."""

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from feyntune.cli.options import (
    DEFAULT_REGISTRY,
    Adapters,
    Base,
    Changes,
    ConvertedText,
    Data,
    Json,
    MaxBad,
    Out,
    RecipeFile,
    RegistryUri,
    adapters_of,
    names_of,
    no_file,
    pinned_base,
    print_result,
    print_table,
    recipe_of,
    require_artifact,
    setup_logging,
)
from feyntune.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: feyntune ingest oai:https://oaipmh.arxiv.org/oai --oai-set physics:hep-th --out corpus")
def ingest(
    source: Annotated[str, typer.Argument(help="kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.")],
    out: Out,
    until: Annotated[str | None, typer.Option(help="Keep papers first submitted up to this date.")] = None,
    categories: Annotated[str | None, typer.Option(help="Archives or categories to keep, separated by commas.")] = None,
    max_bad: MaxBad = 0.001,
    converted_text: ConvertedText = False,
    oai_set: Annotated[str | None, typer.Option(help="OAI set, such as physics:hep-th.")] = None,
    prefix: Annotated[str, typer.Option(help="OAI metadata prefix.")] = "arXivRaw",
    since: Annotated[str | None, typer.Option(help="OAI: only records changed since this date.")] = None,
    delay: Annotated[float, typer.Option(help="OAI: seconds between requests (arXiv asks for 3).")] = 3.0,
    state: Annotated[Path | None, typer.Option(help="OAI: folder that lets a harvest resume.")] = None,
    as_json: Json = False,
) -> None:
    """Read papers from a source into a corpus."""
    from feyntune.ingestion.ingest import ingest

    setup_logging(quiet=as_json)
    manifest = ingest(
        source,
        out,
        until=until,
        categories=names_of(categories, "--categories"),
        max_bad=max_bad,
        converted_text=converted_text,
        oai_set=oai_set,
        prefix=prefix,
        since=since,
        delay=delay,
        state=state,
    )
    counts = json.loads((out / "counts.json").read_text(encoding="utf-8"))
    line = f"{out}: {counts['kept']:,} papers, digest {manifest.digest[:16]}"
    print_result({**counts, "digest": manifest.digest}, as_json, line)


@app.command(epilog="Example: feyntune split corpus --out split --after 2024-01-01")
def split(
    corpus: Annotated[Path, typer.Argument(help="Folder of a corpus.")],
    out: Out,
    after: Annotated[str | None, typer.Option(help="Hold out papers after this date for testing.")] = None,
    previous: Annotated[Path | None, typer.Option(help="Earlier split; its papers keep their assignment.")] = None,
    mixtures: Annotated[Path | None, typer.Option(help="Your own mixtures file.")] = None,
    as_json: Json = False,
) -> None:
    """Assign papers to train, validation and test; draw the mixtures; audit for leaks."""
    require_artifact(corpus, "corpus", "ingest")
    from feyntune.splitting.split import split

    setup_logging(quiet=as_json)
    manifest = split(corpus, out, after=after, previous=previous, mixtures=mixtures)
    audit = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    line = f"{out}: digest {manifest.digest[:16]}; audit.json has the leak check"
    print_result({**audit, "digest": manifest.digest}, as_json, line)


@app.command(
    epilog="Example: feyntune train --data split --mix hep-th --method lora-qkv --base runs/base --out adapter"
)
def train(
    data: Data,
    mixture: Annotated[str, typer.Option("--mix", help="Mixture, such as hep-th.")],
    method: Annotated[str, typer.Option(help="lora-qkv or lora-all.")],
    base: Base,
    out: Out,
    recipe: RecipeFile = None,
    changes: Changes = None,
    checkpoints: Annotated[str | None, typer.Option(help="Folder or s3:// address for checkpoints.")] = None,
    as_json: Json = False,
) -> None:
    """Train one adapter. After an interruption the same command resumes from the latest checkpoint."""
    require_artifact(data, "split", "split")
    _require_mixture(data, mixture)
    settings = recipe_of(recipe, changes, base, as_json).get("train", {})
    from feyntune.training.launch import launch
    from feyntune.variants import METHODS

    if method not in METHODS:
        raise UserError(f"--method {method}: choose {' or '.join(METHODS)}.")

    setup_logging(quiet=as_json)
    own_state = out.with_name(f".{out.name}.state")
    manifest = launch(
        data=str(data),
        mixture=mixture,
        method=method,
        base=pinned_base(base),
        out=str(out),
        config=settings,
        checkpoints=checkpoints or str(own_state),
    )
    if not checkpoints:
        shutil.rmtree(own_state, ignore_errors=True)  # what would resume it, and a copy of the adapter
    line = f"{out}: {manifest.stats['train_tokens']:,} tokens in {manifest.stats['seconds']:.0f} s"
    print_result({**manifest.stats, "digest": manifest.digest}, as_json, line)


def _require_mixture(data: Path, mixture: str) -> None:
    """Check that the split has the mixture, and name the nearest one where it has not."""
    import difflib

    mixtures = list(json.loads((data / "audit.json").read_text(encoding="utf-8"))["mixtures"])
    if mixture not in mixtures:
        near = difflib.get_close_matches(mixture, mixtures, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(mixtures)}."
        raise UserError(f"--mix {mixture}: the split {data} has no such mixture; {hint}")


@app.command(
    epilog="Example: feyntune evaluate --data split --base runs/base --adapter hep-th/lora-qkv=adapter --out measured"
)
def evaluate(
    data: Data,
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder to write: scores/ and comparison/.", callback=no_file)],
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter as NAME=DIR; repeatable.")] = None,
    recipe: RecipeFile = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Score the base and adapters on the test abstracts, and compare them."""
    require_artifact(data, "split", "split")
    adapters = adapters_of(adapter or [])
    from feyntune.evaluation.config import EvaluateConfig

    config = EvaluateConfig.model_validate(recipe_of(recipe, changes, base, as_json).get("evaluate", {}))
    pinned = pinned_base(base)
    from feyntune.evaluation.compare import compare
    from feyntune.evaluation.evaluate import evaluate

    setup_logging(quiet=as_json)
    evaluate(str(data), pinned, adapters, out / "scores", config)
    compare([out / "scores"], adapters, str(data), out / "comparison")
    _print_comparison(out / "comparison", as_json)


@app.command(
    epilog="Example: feyntune compare --evaluation scores --adapter hep-th/lora-qkv=adapter --data split --out compared"
)
def compare(
    evaluation: Annotated[list[Path], typer.Option(help="Folder of an evaluation; repeatable.")],
    adapter: Adapters,
    data: Data,
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="Folder of the corpus, for its figures.")] = None,
    people: Annotated[Path | None, typer.Option(help="Folder of `study score`.")] = None,
    judges: Annotated[list[Path] | None, typer.Option(help="Folder of `judge`; repeatable.")] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Folder of `tasks`; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Compare evaluations; optionally add the scores of people and judges."""
    require_artifact(data, "split", "split")
    for folder in evaluation:
        require_artifact(folder, "evaluation", "evaluate")
    adapters = adapters_of(adapter)
    for optional, kind, made_by in (
        ([corpus] if corpus else [], "corpus", "ingest"),
        ([people] if people else [], "study-result", "study score"),
        (judges or [], "judgment", "judge"),
        (tasks or [], "tasks", "tasks"),
    ):
        for folder in optional:
            require_artifact(folder, kind, made_by)
    from feyntune.evaluation.compare import compare

    setup_logging(quiet=as_json)
    compare(evaluation, adapters, str(data), out, corpus=corpus, people=people, judges=judges or [], tasks=tasks or [])
    _print_comparison(out, as_json)


def _print_comparison(folder: Path, as_json: bool) -> None:
    """A short table; the whole one is in the folder."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(summary))
        return
    print_table(result_rows(summary), ["system", "perplexity", "minus base [95 % CI]"], right=(1,))
    print(f"report  {folder / 'report.html'}\ntable   {folder / 'table.md'}")


def result_rows(summary: dict[str, Any]) -> list[list[str]]:
    """System, perplexity and difference to the base with its interval: the base first, then the best variant."""
    rows = []
    if summary.get("base"):
        rows.append(["base", f"{summary['base']['perplexity']['abstract_mean']:.2f}", ""])
    for name, v in sorted(summary["variants"].items(), key=lambda item: item[1]["delta"]["mean"]):
        delta = v["delta"]
        interval = f"{delta['mean']:+.2f} [{delta['low']:+.2f}, {delta['high']:+.2f}]"
        rows.append([name, f"{v['perplexity']['abstract_mean']:.2f}", interval])
    return rows


@app.command(epilog="Example: feyntune register measured/comparison --adapter hep-th/lora-qkv=adapter")
def register(
    comparison: Annotated[Path, typer.Argument(help="Folder of a comparison.")],
    adapter: Adapters,
    registry: RegistryUri = DEFAULT_REGISTRY,
    policy: Annotated[Path | None, typer.Option(help="Gate policy file.")] = None,
    as_json: Json = False,
) -> None:
    """Register measured adapters; promote the best one that passes the gate."""
    require_artifact(comparison, "comparison", "evaluate")
    adapters = adapters_of(adapter)
    from feyntune.registry.register import register

    setup_logging(quiet=as_json)
    done = register(str(comparison), adapters, registry, policy=policy)
    result = done.model_dump(mode="json")
    lines = [f"{name}: {gate_text(v)}" for name, v in result["variants"].items()]
    print_result(result, as_json, "\n".join([*lines, f"champion: {done.champion or 'none'}"]))


def gate_word(variant: dict[str, Any]) -> str:
    """What the gate decided on a variant, in one word."""
    if variant.get("champion") is True:
        return "champion"
    return {None: "not registered", True: "passed", False: "refused"}[variant["promoted"]]


def gate_text(variant: dict[str, Any]) -> str:
    """What the gate decided on a variant, with the reasons of a refusal."""
    reasons = variant.get("gate", variant.get("reasons")) or []
    word = gate_word(variant)
    if not reasons or word == "champion":
        return word
    return f"{'passed, but is not champion' if word == 'passed' else word}: {'; '.join(reasons)}"
