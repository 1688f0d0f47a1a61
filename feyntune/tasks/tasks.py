"""Benchmarks of EleutherAI's lm-evaluation-harness on the base and its adapters, in this process.

The harness (`pip install 'feyntune[tasks]'`) brings the tasks, the prompts and the metrics; what is given to it is our
own loaded base, with one adapter at a time in it, as the perplexity is measured.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, require_new, sha256_json, write_artifact
from feyntune.errors import UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.names import BASE
from feyntune.telemetry import log

SAMPLES = pa.schema(
    [
        pa.field("system", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),  # as the harness names it, with its filter: acc,none
        pa.field("document", pa.int64(), nullable=False),  # its number in the task
        pa.field("value", pa.float64(), nullable=False),
    ]
)


class TasksConfig(BaseModel):
    """What is run, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] = Field(min_length=1)  # names of the harness, or of the YAML files in `include`
    precision: str = "bf16"
    few_shot: int | None = None  # examples before each question; None: as the task says
    limit: int | None = Field(None, ge=1)  # documents of each task, to try it out
    batch_size: int = Field(8, ge=1)
    seed: int = 1234  # of the few-shot examples: the harness's default


def run_tasks(
    base: str,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    config: TasksConfig,
    include: str | Path | None = None,
) -> Manifest:
    """Run tasks on the base and every adapter into a sealed `tasks`: results.json and samples.parquet (SAMPLES).

    Args:
        base: a model folder, `s3://` folder or hub id.
        adapters: sealed `adapter` folders by variant name.
        include: a folder with task files (YAML) of your own.

    Raises:
        UserError: an unknown task, an adapter of another base, or `out` holds something else.
    """
    out, pinned = Path(out), pin_base(base)
    inputs = {"base": split_pin(pinned)[1] or ""}
    for name, adapter in sorted(adapters.items()):
        manifest = open_artifact(adapter, "adapter")
        if manifest.inputs.get("base") != inputs["base"]:
            raise UserError(f"Adapter {name} ({adapter}) was trained on another base: give the base it was trained on.")
        inputs[name] = manifest.digest
    if include is not None:
        files = sorted(p for p in Path(include).rglob("*") if p.is_file())
        inputs["include"] = sha256_json({p.name: p.read_text(encoding="utf-8", errors="replace") for p in files})
    settings = config.model_dump(mode="json")
    if (out / MANIFEST).is_file():
        done = open_artifact(out, "tasks")
        if (done.inputs, done.config) == (inputs, settings):
            return done
        raise UserError(f"{out} holds tasks of something else: choose another folder.")
    require_new(out)

    results, rows, about = _run(pinned, adapters, config, include)
    with write_artifact(out, "tasks", inputs, settings) as folder:
        (folder.path / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        pq.write_table(pa.Table.from_pylist(rows, SAMPLES), folder.path / "samples.parquet")
        folder.stats |= about
    return open_artifact(out, "tasks")


def _run(
    base: str, adapters: Mapping[str, str | Path], config: TasksConfig, include: str | Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    from lm_eval import __version__, simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [t for t in config.tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"There is no task {unknown[0]}: `lm_eval ls tasks` lists those of the harness.")
    results: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    about: dict[str, Any] = {"lm_eval": __version__}
    model = SystemModels(base, config.precision, config.batch_size)
    for system in [BASE, *sorted(adapters)]:
        log.info("%s: %s", system, ", ".join(config.tasks))
        evaluated = simple_evaluate(
            model.harness_model(adapters.get(system)),
            tasks=list(config.tasks),
            num_fewshot=config.few_shot,
            limit=config.limit,
            task_manager=manager,
            bootstrap_iters=0,
            fewshot_random_seed=config.seed,
        )
        assert evaluated is not None
        results[system] = {t: _numbers(f) for t, f in evaluated["results"].items()}
        about |= {"versions": evaluated["versions"], "documents": evaluated["n-samples"]}
        for task, samples in evaluated["samples"].items():
            rows += [r for s in samples for r in _sample_rows(system, task, s)]
    return results, rows, about


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _sample_rows(system: str, task: str, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric that a document has a number of."""
    rows = []
    for metric in sample.get("metrics", []):
        value = sample.get(metric)
        if isinstance(value, int | float):
            name = f"{metric},{sample.get('filter', 'none')}"
            at = {"system": system, "task": task, "metric": name, "document": int(sample["doc_id"])}
            rows.append({**at, "value": float(value)})
    return rows


class SystemModels:
    """The base loaded once, with one adapter at a time in it, as the harness takes a model."""

    def __init__(self, base: str, precision: str, batch_size: int):
        from feyntune.model.load import check_vocab_size, get_device, load_base, load_tokenizer

        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(base)
        self.model: Any = load_base(base, precision, get_device(), attention="sdpa")  # type: ignore[arg-type]
        check_vocab_size(self.model, self.tokenizer, base)
        self.context = int(self.model.config.max_position_embeddings)

    def harness_model(self, adapter: str | Path | None) -> Any:
        """An HFLM of the base, or of the base with `adapter` in it. The base comes first: adapters stay loaded.

        A text begins with BOS, as in training.
        """
        from lm_eval.models.huggingface import HFLM

        from feyntune.model.load import with_adapter

        if adapter is not None:
            self.model = with_adapter(self.model, adapter)
        return HFLM(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
            max_length=self.context,
            add_bos_token=True,
        )
