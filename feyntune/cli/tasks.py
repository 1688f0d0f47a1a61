"""`feyntune tasks`: benchmarks of the lm-evaluation-harness on base and adapters."""

import json
from pathlib import Path
from typing import Annotated

import typer

from feyntune.cli.options import (
    Base,
    Json,
    Out,
    adapters_of,
    names_of,
    pinned_base,
    print_result,
    setup_logging,
)
from feyntune.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: feyntune tasks sciq --base runs/base --adapter hep-th/lora-qkv=adapter --out tasks")
def tasks(
    names: Annotated[list[str], typer.Argument(help="Tasks of the lm-evaluation-harness, such as sciq.")],
    base: Base,
    out: Out,
    adapter: Annotated[list[str] | None, typer.Option(help="Adapter as NAME=DIR; repeatable.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files (YAML) of your own.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or nf4: of the base's weights.")] = "bf16",
    few_shot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, to try it out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests computed at one time.")] = 8,
    as_json: Json = False,
) -> None:
    """Run benchmarks of the lm-evaluation-harness on the base and adapters; `compare --tasks` shows them."""
    adapters = adapters_of(adapter or [])
    if include is not None and not include.is_dir():
        raise UserError(f"--include {include}: there is no such folder.")
    if precision not in ("fp32", "bf16", "nf4"):
        raise UserError(f"--precision {precision}: choose fp32, bf16 or nf4.")
    pinned = pinned_base(base)
    from feyntune.tasks.tasks import TasksConfig, run_tasks

    setup_logging(quiet=as_json)
    config = TasksConfig(
        tasks=names_of(",".join(names)) or [],
        precision=precision,
        few_shot=few_shot,
        limit=limit,
        batch_size=batch_size,
    )
    manifest = run_tasks(pinned, adapters, out, config, include)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    lines = [
        f"{system}  {task}  " + "  ".join(f"{m} {v:.4g}" for m, v in figures.items())
        for system, by_task in results.items()
        for task, figures in by_task.items()
    ]
    print_result({"digest": manifest.digest, "results": results}, as_json, "\n".join(lines))
