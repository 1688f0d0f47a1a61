"""Judging completions: external models that complete, models that judge, and blind studies with people."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from feyntune.cli.options import Json, Out, parse_object, print_result, require_artifact, setup_logging, validated
from feyntune.errors import UserError

app = typer.Typer()
study_app = typer.Typer(
    help="A blind study: people score completions without knowing which system wrote them.", no_args_is_help=True
)

Completed = Annotated[
    list[Path],
    typer.Option(
        "--completions",
        help="Folder with completions, of `evaluate` or `ask`, or of several (runs/latest/evaluations); repeatable.",
    ),
]
Endpoints = Annotated[Path, typer.Option(help="YAML file of endpoints (docs/people.md).")]
FILTER_EXAMPLE = '{"rule": "paper", "decoding": "sampled"}'
FilterOption = Annotated[str, typer.Option(help=f"Which completions, as JSON, such as '{FILTER_EXAMPLE}'.")]


@app.command(epilog="Example: feyntune ask evaluation/scores --endpoints endpoints.yaml --system claude --out answers")
def ask(
    evaluation: Annotated[Path, typer.Argument(help="Folder of an evaluation with completions of the base.")],
    endpoints: Endpoints,
    out: Out,
    system: Annotated[list[str] | None, typer.Option(help="Endpoint to ask; repeatable; all by default.")] = None,
    papers: Annotated[int, typer.Option(help="Number of prompts to complete.")] = 100,
    rule: Annotated[str, typer.Option(help="Where prompts end: paper or careful.")] = "paper",
    split_: Annotated[str, typer.Option("--split", help="test or holdout.")] = "test",
    as_json: Json = False,
) -> None:
    """Generate baseline completions with external models."""
    from feyntune.judging.endpoints import load_endpoints
    from feyntune.judging.external import AskConfig, ask

    require_artifact(evaluation, "evaluation", "evaluate")
    setup_logging(quiet=as_json)
    known = load_endpoints(endpoints)
    selected = [_endpoint(known, name, endpoints) for name in system or known]
    config = validated(AskConfig, {"papers": papers, "rule": rule, "split": split_})
    stats = ask(evaluation, selected, out, config).stats
    lines = [f"{n}: {f['answers']} of {f['questions']} answers, cost {f['cost']:.4g}" for n, f in stats.items()]
    lines += [f"{n}: {count} without: {reason}" for n, f in stats.items() for reason, count in f["reasons"].items()]
    print_result(stats, as_json, "\n".join(lines))


@app.command(epilog="Example: feyntune judge --completions scores --endpoints endpoints.yaml --judge gpt --out judged")
def judge(
    completions: Completed,
    endpoints: Endpoints,
    name: Annotated[str, typer.Option("--judge", help="Endpoint that judges.")],
    out: Out,
    papers: Annotated[int, typer.Option(help="Number of papers, each judged in both orders.")] = 100,
    pairs: Annotated[str, typer.Option(help="base (every system against it) or all.")] = "base",
    filter: FilterOption = "{}",
    show_reference: Annotated[bool, typer.Option(help="Show the judge the abstract's own continuation.")] = False,
    as_json: Json = False,
) -> None:
    """Judge completions in pairs by a language model, blind and in both orders."""
    from feyntune.judging.endpoints import load_endpoints
    from feyntune.judging.judges import JudgeConfig, judge

    setup_logging(quiet=as_json)
    values = {"papers": papers, "pairs": pairs, "show_reference": show_reference}
    config = validated(JudgeConfig, {**values, "filter": parse_object(filter, "--filter", FILTER_EXAMPLE)})
    judge(_each(completions), _endpoint(load_endpoints(endpoints), name, endpoints), out, config)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    lines = []
    for d in summary["duels"]:
        w = d["win_rate"]
        rate = "no paper judged" if w["low"] is None else f"{w['mean']:.0%} [{w['low']:.0%}, {w['high']:.0%}]"
        lines.append(f"{d['system']} against {d['against']}: {rate} of {d['papers']} papers")
    about, unusable = summary["judge"], summary["unusable"]
    lines.append(f"{about['answers']} usable answers of {unusable['of']}, cost {about['cost']:.4g}")
    lines += [f"unusable, {count}: {reason}" for reason, count in unusable["reasons"].items()]
    if unusable["count"]:
        lines.append("Start the same command again to ask for those again.")
    print_result(summary, as_json, "\n".join(lines))


@study_app.command(
    "make",
    epilog="Example: feyntune study make --completions scores --rater a --rater b --out study --key study-key",
)
def study_make(
    completions: Completed,
    rater: Annotated[list[str], typer.Option(help="Short name of a rater; repeatable.")],
    out: Out,
    key: Annotated[Path, typer.Option(help="Folder to write the key to; raters must not see it.")],
    papers: Annotated[
        int | None, typer.Option(help="Number of papers drawn; by default 25, or all that every system completed.")
    ] = None,
    common: Annotated[int | None, typer.Option(help="Number of them that all raters score; by default 5.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="System to include; repeatable; all by default.")] = (None),
    filter: FilterOption = "{}",
    show_reference: Annotated[bool, typer.Option(help="Show raters the abstract's own continuation.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; random by default; written to the key.")] = None,
) -> None:
    """Draw papers; write one blind sheet per rater, and the key in another folder."""
    from feyntune.study.study import StudyConfig, make

    setup_logging()
    values = {"raters": rater, "papers": papers, "common": common, "show_reference": show_reference}
    config = validated(StudyConfig, {**values, "filter": parse_object(filter, "--filter", FILTER_EXAMPLE)})
    make(_each(completions), out, key, config, seed, system or [])
    print(f"{out}: {len(rater)} sheets; {key}: the key, keep it from raters")


@study_app.command("serve", epilog="Example: feyntune study serve study --scores scores")
def study_serve(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    scores: Annotated[Path, typer.Option(help="Folder for the scores; the same folder resumes scoring.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
    url: Annotated[str | None, typer.Option(help="Address at which raters reach it, if another.")] = None,
) -> None:
    """Serve a scoring page; prints a link for every rater."""
    require_artifact(study, "study", "study make")
    from feyntune.study.page import serve

    setup_logging()
    serve(study, scores, host, port, url)


@study_app.command("score", epilog="Example: feyntune study score study --key study-key --sheets scores --out result")
def study_score(
    study: Annotated[Path, typer.Argument(help="Folder of a study.")],
    key: Annotated[Path, typer.Option(help="Folder of its key.")],
    sheets: Annotated[list[Path], typer.Option(help="Returned sheet, or a folder of them; repeatable.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Check returned sheets row by row, and summarize the scores."""
    require_artifact(study, "study", "study make")
    require_artifact(key, "study-key", "study make")
    from feyntune.study.study import score

    setup_logging(quiet=as_json)
    score(study, key, sheets, out)
    print_result(
        json.loads((out / "summary.json").read_text(encoding="utf-8")),
        as_json,
        (out / "summary.md").read_text(encoding="utf-8"),
    )


def _each(folders: list[Path]) -> list[Path]:
    """The folders, one that holds artifacts replaced by those."""
    result: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: `feyntune run` and `feyntune evaluate` make completions.")
        inner = sorted(path.parent for path in folder.glob("*/manifest.json"))
        result += inner if inner and not (folder / "manifest.json").is_file() else [folder]
    return result


def _endpoint(known: dict[str, Any], name: str, path: Path) -> Any:
    if name not in known:
        raise UserError(f"{path} has no endpoint {name}, only {', '.join(known)}.")
    return known[name]
