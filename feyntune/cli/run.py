"""`feyntune run`, the whole pipeline on this machine, and `feyntune plan`, what a run would cost."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from feyntune.artifacts.names import split_pin
from feyntune.cli.options import (
    DEFAULT_WORKDIR,
    Changes,
    ConvertedText,
    Json,
    MaxBad,
    RecipeFile,
    names_of,
    print_result,
    print_table,
    print_wrapped,
    recipe_of,
    setup_logging,
    shown_path,
)
from feyntune.cli.steps import gate_text, gate_word, result_rows
from feyntune.errors import EXIT_FAILED_BRANCH, Interrupted

app = typer.Typer()

DEFAULT_VARIANTS = "hep-th/lora-qkv,hep-th/lora-all,hep-ph+gr-qc/lora-all"


@app.command(epilog="Example: feyntune run --source kaggle:arxiv-metadata-oai-snapshot.json.zip --variants all")
def run(
    source: Annotated[
        str, typer.Option(help="kaggle:FILE, oai:URL, atom:FILE, jsonl:FILE or synthetic:N.")
    ] = "synthetic:1200",
    variants: Annotated[
        str | None,
        typer.Option(
            help=f"Variants, separated by commas (`all` for all); by default {DEFAULT_VARIANTS}, or with --mixtures or "
            "--categories all of theirs."
        ),
    ] = None,
    workdir: Annotated[Path, typer.Option(help="Folder of all runs; finished work in it is reused.")] = (
        DEFAULT_WORKDIR
    ),
    base: Annotated[
        str | None, typer.Option(help="Base model; by default a tiny one that comes with the package.")
    ] = None,
    until: Annotated[str, typer.Option(help="Only papers first submitted up to this date (YYYY-MM-DD).")] = "",
    after: Annotated[str, typer.Option(help="Papers first submitted after this date are held out for testing.")] = "",
    categories: Annotated[
        str | None,
        typer.Option(
            help="Archives or categories to read, separated by commas; without --mixtures and --variants they make one "
            "mixture."
        ),
    ] = None,
    mixtures: Annotated[
        Path | None, typer.Option(help="Your own mixtures file, in place of the ten (docs/your-own.md).")
    ] = None,
    max_bad: MaxBad = 0.001,
    converted_text: ConvertedText = False,
    recipe: RecipeFile = None,
    changes: Changes = None,
    devices: Annotated[int, typer.Option(min=1, help="Training processes, one for each GPU.")] = 1,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Trainings of each variant; the report shows the spread between seeds.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the compiled pipeline on this machine, from abstracts to a registry."""
    from feyntune.ingestion.fields import CategoryFilter
    from feyntune.kubeflow import local
    from feyntune.variants import load_mixtures, load_variants

    setup_logging(quiet=as_json)
    selected = names_of(categories, "--categories")
    own = [m.model_dump(exclude_none=True) for m in load_mixtures(mixtures)] if mixtures else None
    CategoryFilter(selected)  # a name that is none is refused here, not as the name of a mixture
    if selected and not (mixtures or variants):
        name, listed = "+".join(selected).lower(), " and ".join(selected)
        own = [{"name": name, "parts": dict.fromkeys(selected, "all"), "rule": f"every {listed} paper"}]
    if variants == "all":
        names = [] if own else load_variants().names()
    else:
        names = names_of(variants, "--variants") or ([] if own else names_of(DEFAULT_VARIANTS) or [])
    changes = [*(changes or []), *([] if seeds is None else [f"train.seeds={seeds}"])]
    values = recipe_of(recipe, changes, base, as_json)
    failed = None
    try:
        folder = local.run(
            source,
            names,
            workdir,
            until=until,
            after=after,
            categories=selected,
            mixtures=own,
            max_bad=max_bad,
            converted_text=converted_text,
            base=base,
            recipe=values,
            devices=devices,
        )
    except local.RunFailed as e:
        failed, folder = e, (workdir / "latest").resolve()
    except KeyboardInterrupt:
        raise Interrupted("finished steps are saved") from None
    if failed is None or failed.reported:
        print((folder / "summary.json").read_text(encoding="utf-8") if as_json else f"\n{result_text(folder, workdir)}")
    if failed is not None:
        print(f"error: {failed}", file=sys.stderr)
        sys.exit(EXIT_FAILED_BRANCH)


def result_text(folder: Path, workdir: Path) -> str:
    """The result of a run for a terminal of 80 columns: perplexities, the gate's decisions, and what to open."""
    import contextlib
    import io

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print("Perplexity on the test abstracts (mean over abstracts; lower is better)\n")
        ranked = sorted(summary["variants"].items(), key=lambda item: item[1]["delta"]["mean"])
        words = ["", *(gate_word(v) for _, v in ranked)]
        rows = [[*row, word] for row, word in zip(result_rows(summary), words, strict=True)]
        print_table(rows, ["system", "perplexity", "minus base [95 % CI]", "gate"], right=(1,))
        print()
        for name, v in ranked:
            if gate_text(v) != gate_word(v):
                print_wrapped(f"{name}: {gate_text(v)}")
        for failure in summary["failures"]:
            print(f"{failure['variant']}: failed in {failure['step']}")
        champion = summary["champion"]
        of_this_run = champion is None or any(v.get("champion") for v in summary["variants"].values())
        earlier = "" if of_this_run else " (of an earlier run)"
        print(f"champion: {champion or 'none, no variant passed the gate'}{earlier}\n")
        print(f"report   {shown_path(folder / 'report.html')} (open it in a browser)")
        print(f"summary  {shown_path(folder / 'summary.json')}")
        if champion:
            base, _ = split_pin(summary["arguments"]["base"])
            registry = shown_path(workdir / "registry")
            print(f"serve    feyntune serve --registry {registry} --base {shown_path(Path(base))}")
            print("         then open http://127.0.0.1:8080 in a browser")
    return text.getvalue().rstrip()


@app.command("make-base", epilog="Example: feyntune make-base my-base")
def make_base(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")], as_json: Json = False
) -> None:
    """Train the tiny base model of `feyntune run` again (four to six minutes of one CPU core), and compare the two."""
    from feyntune.demo.make import compare_with_shipped, make_demo_base

    setup_logging(quiet=as_json)
    manifest = make_demo_base(out)
    line = f"{out}: {manifest.stats['parameters']:,} weights, digest {manifest.digest[:16]}; "
    line += compare_with_shipped(manifest)
    print_result({**manifest.stats, "digest": manifest.digest}, as_json, line)


@app.command(
    epilog="Example: feyntune plan --variants hep-th/lora-qkv,hep-th/lora-all --hardware h100 --devices 1 --price 2.5"
)
def plan(
    variants: Annotated[
        str, typer.Option(help="Variants, separated by commas (`all` for the paper's twenty).")
    ] = "all",
    hardware: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100 or h200.")] = "a100-40gb",
    devices: Annotated[int, typer.Option(min=1, help="Devices of one training.")] = 3,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(min=1, help="Measured useful tokens per second of one device; by default a roofline's."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of one device for one hour, in your currency.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate tokens, steps, memory, GPU-hours and cost of variants, next to the published recipe."""
    from dataclasses import asdict

    from feyntune.errors import UserError
    from feyntune.training.estimate import paper_variants, plan_variants, totals
    from feyntune.training.roofline import plan_layouts
    from feyntune.variants import select_variants

    setup_logging(quiet=as_json)
    papers = paper_variants()
    names = list(papers) if variants == "all" else select_variants(names_of(variants, "--variants") or [])
    unknown = [name for name in names if name not in papers]
    if unknown:
        raise UserError(
            f"--variants {', '.join(unknown)}: variants.yaml gives no paper_training_papers for this mixture; add it."
        )
    rows = plan_variants(
        {name: papers[name] for name in names},
        hardware,
        devices,
        tokens_per_second=tokens_per_second,
        price=price,
    )
    whole = totals(rows)
    layouts = plan_layouts(
        {name: papers[name] for name in names}, hardware, devices, tokens_per_second=tokens_per_second
    )
    if as_json:
        print(
            json.dumps(
                {"variants": [asdict(r) for r in rows], "totals": whole, "layouts": [asdict(x) for x in layouts]}
            )
        )
        return
    rate = f"{tokens_per_second:,.0f} tokens/s measured" if tokens_per_second else "calculated by a roofline"
    print(f"{devices} x {hardware}, {rate}; in brackets the published recipe on the same hardware\n")
    table = []
    for name, r in [*((r.variant, asdict(r)) for r in rows), ("all", whole)]:
        gpu_hours = f"{r['gpu_hours']:,.1f} ({r['published_gpu_hours']:,.1f})"
        memory = f"{r['memory_bytes'] / 2**30:.1f}"
        table.append([name, f"{r['tokens'] / 1e6:,.0f} M", f"{r['steps']:,}", memory, gpu_hours, f"{r['hours']:,.1f}"])
    print_table(table, ["variant", "tokens", "steps", "GiB", "GPU-hours", "hours"], right=(1, 2, 3, 4, 5))
    print()
    for x in layouts:
        print(f"{x.name}: {x.hours:,.1f} h on {devices} GPUs, {x.tokens_per_second:,.0f} tokens/s a GPU")
    if price is not None:
        print(f"\ncost: {whole['money']:,.2f} (published recipe: {whole['published_money']:,.2f})")
