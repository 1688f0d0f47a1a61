"""Writes docs/reference/*.md from the code: `python docs/reference.py` (a test compares)."""

import sys
from collections.abc import Iterable
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that `python docs/reference.py` reads this tree
MADE = "<!-- Made by docs/reference.py; edit the code it reads. -->\n\n"


def pages() -> dict[str, str]:
    """Every page's text by file name."""
    made = {"cli": cli(), "settings": settings(), "variants": variants(), "values": values()}
    made |= {"metrics": metrics(), "http": http()}
    return {f"{name}.md": text.replace("\n", f"\n\n{MADE.strip()}\n", 1) for name, text in made.items()}


def cli() -> str:
    import typer.main
    from typer.cli import get_docs_for_click

    from feyntune.cli import main as cli

    command = typer.main.get_command(cli.app)
    with command.make_context("feyntune", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="feyntune")
    codes = "".join(f"- `{code}`: {meaning}\n" for code, meaning in cli.EXIT_CODES.items())
    return f"# The command\n\n## Exit codes\n\n{codes}\n" + unescape(text).replace("# `feyntune`\n", "", 1)


def settings() -> str:
    from feyntune.evaluation import config as evaluate
    from feyntune.training.config import TrainConfig

    text = "# Training and evaluation settings\n\n"
    text += "Given to `feyntune run`, `train`, `evaluate` and `submit` as `--recipe FILE` and `--set "
    text += (
        "train.learning_rate=1e-4`, and in the Kubeflow form's field `recipe`. A recipe needs only what differs from "
    )
    text += (
        "the default of its run: `recipes/tiny.yaml` for the tiny base model, `recipes/paper.yaml` for any other.\n\n"
    )
    text += "## train\n\n" + _table(_fields(TrainConfig, {}))
    for name in ("EvaluateConfig", "CompareConfig"):
        model = getattr(evaluate, name)
        title = "evaluate" if name == "EvaluateConfig" else "compare (fixed in the pipelines)"
        text += f"\n## {title}\n\n" + _table(_fields(model, _attributes(model)))
    return text


def variants() -> str:
    from feyntune.variants import load_variants

    catalog = load_variants()
    rows = [[f"`{m.name}`", m.paper or "", m.numbering or "", m.rule, m.source] for m in catalog.mixtures]
    text = "# Variants\n\nA variant is `MIXTURE/METHOD`: ten mixtures, two methods.\n\n"
    text += _rows(["method", "what"], [[f"`{name}`", method.description] for name, method in catalog.methods.items()])
    return text + "\n" + _rows(["mixture", "paper's name", "numbering", "rule", "source"], rows)


def values() -> str:
    text = (ROOT / "charts/feyntune/README.md").read_text()
    return "# Chart values\n\n" + text.partition("## Values\n\n")[2]


def metrics() -> str:
    from prometheus_client.metrics import MetricWrapperBase

    from feyntune.serving import metrics as serve
    from feyntune.training import metrics as train

    rows = []
    for metric in vars(serve).values():
        if isinstance(metric, MetricWrapperBase):
            name = metric._name + ("_total" if metric._type == "counter" else "")
            rows.append([f"`{name}`", metric._type, ", ".join(metric._labelnames), metric._documentation])
    text = "# Metrics\n\n## Endpoint\n\n`GET /metrics` on the HTTP port.\n\n"
    text += _rows(["metric", "kind", "labels", "meaning"], rows)
    text += "\n## Training\n\nOn port FEYNTUNE_METRICS_PORT of the first process, label `variant`.\n\n"
    text += _rows(["metric", "meaning"], [[f"`feyntune_train_{n}`", w] for n, w in train._LIVE.items()])
    text += "\nPushed once at the end to FEYNTUNE_PUSHGATEWAY, if that is set: "
    return text + ", ".join(f"`feyntune_train_final_{n}`" for n in train._FINAL) + ".\n"


def http() -> str:
    from fastapi import FastAPI

    from feyntune.serving import openai_api, tokenize_api
    from feyntune.serving.completions import Limits, Server

    app = FastAPI()
    for api in (openai_api, tokenize_api):
        app.include_router(api.router(Server(Limits(), base_name="base")))
    described = app.openapi()
    schemas = described["components"]["schemas"]
    text = "# HTTP API\n\nOpenAI's own reference holds for the paths under `/openai/v1`; what this endpoint cannot "
    text += "honor it refuses by field. The two POST paths also answer under `/v1`. Every answer has an "
    text += "`X-Request-Id`, the request's own or a new one; an answer that a retry would compute again has "
    text += "`x-should-retry: false`. KServe's V1 and V2 are at `/v1/models/NAME:predict` and "
    text += "`/v2/models/NAME/infer`, gRPC on its own port, health at `/v2/health/live` and `/v2/health/ready`, the "
    text += "OpenAPI description at `/openapi.json`.\n"
    for path, methods in sorted(described["paths"].items()):
        for method, operation in methods.items():
            text += f"\n## `{method.upper()} {path}`\n\n{operation.get('description', '')}\n\n"
            body = operation.get("requestBody")
            if body:
                name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                needed = schemas[name].get("required", [])
                rows = [
                    [f"`{field}`", "yes" if field in needed else "", _kind(schema), schema.get("description", "")]
                    for field, schema in schemas[name]["properties"].items()
                ]
                text += _rows(["field", "required", "kind", "note"], rows) + "\n"
            # FastAPI writes 422 into every description; this server answers 400 instead.
            answers = [[code, a["description"]] for code, a in sorted(operation["responses"].items()) if code != "422"]
            text += _rows(["status", "meaning"], answers)
    return text


def _kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(k for s in schema["anyOf"] if (k := _kind(s)) != "null"))
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("const", schema.get("type", "any")))


def _fields(model: Any, meanings: dict[str, str]) -> list[list[str]]:
    return [
        [name, _default(field), field.description or meanings.get(name, "")]
        for name, field in model.model_fields.items()
    ]


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    return "required" if field.is_required() else f"`{value!r}`" if value != "" else ""


def _attributes(model: Any) -> dict[str, str]:
    """The meaning of each attribute by a class's docstring."""
    from docstring_parser import parse

    descriptions = {}
    for entry in parse(model.__doc__ or "").params:
        for name in entry.arg_name.split(","):
            descriptions[name.strip()] = " ".join((entry.description or "").split())
    return descriptions


def _table(rows: list[list[str]]) -> str:
    return _rows(["setting", "default", "meaning"], [[f"`{name}`", default, what] for name, default, what in rows])


def _rows(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] * len(head), *([str(c).replace("|", "\\|").replace("\n", " ") for c in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    folder = Path(__file__).parent / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
