"""The model card of an adapter, in the Hugging Face hub's format, written from the run itself.

Only what was measured or recorded is in it: from the adapter's manifest and the comparison's summary.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from feyntune.artifacts.artifact import Manifest
from feyntune.conditions import as_served_sentence
from feyntune.registry.gate import GateResult, Measured

_TAGS = ["lora", "peft", "safetensors", "arxiv", "physics", "feyntune"]
_USE = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, folder)  # the folder this file lies in
```"""


def model_card(
    variant: str,
    adapter: Manifest,
    lora: dict[str, Any],
    lineage: dict[str, str],
    measured: Measured,
    gate: GateResult,
    training: dict[str, Any],
) -> str:
    """The README.md of one adapter: YAML front matter, then Markdown.

    Args:
        lora: the adapter's `adapter_config.json`.
        lineage: digests by what they are of.
        training: figures of the training worth a line each (train_tokens, seconds).
    """
    front = yaml.safe_dump(_front_matter(variant, adapter, lora, measured), sort_keys=False, allow_unicode=True)
    delta, modules = measured.delta, ", ".join(sorted(lora["target_modules"]))
    rows = [
        ("base", _figure(measured.base_perplexity.abstract_mean), _figure(measured.base_perplexity.token)),
        (variant, _figure(measured.perplexity.abstract_mean), _figure(measured.perplexity.token)),
    ]
    parts = [
        f"---\n{front}---",
        f"# {variant}",
        f"A LoRA adapter (rank {lora['r']}, alpha {lora['lora_alpha']}, on {modules}) "
        f"for {_describe_base(measured.base, lora)}, trained on arXiv abstracts of the mixture "
        f"`{variant.rpartition('/')[0]}`.",
        "## Measured",
        f"Perplexity on {measured.abstracts} test abstracts that no training set of the same split holds:",
        _table(("system", "mean over abstracts", "over all tokens"), rows),
        f"Variant minus base, paired over abstracts: {_figure(delta.mean)}, "
        f"95 % interval [{_figure(delta.low)}, {_figure(delta.high)}] (below zero is better).",
        *([] if measured.memorization is None else [f"Memorization: {_figure(measured.memorization)}."]),
        *(
            f"On {where}: perplexity {c.mean:+.3g} % against the base, 95 % interval [{c.low:+.3g}, {c.high:+.3g}] %."
            for where, c in measured.changes.items()
        ),
        *([as_served_sentence({variant: measured.as_served.model_dump()})] if measured.as_served else []),
        "Gate: " + ("passed" if gate.passed else "refused") + ".",
        "\n".join(f"- {c.clause}: {c.message}" for c in gate.clauses),
        "## Trained",
        _table(("setting", "value"), [(k, str(v)) for k, v in sorted(_flat({**adapter.config, **training}).items())]),
        "## Made from",
        _table(("what", "sha256 or commit"), [(k, f"`{v}`") for k, v in sorted(lineage.items())]),
        "## Use",
        _USE,
        "The text format is one abstract between the tokenizer's BOS and EOS; to complete one, give BOS and its start.",
        "## License",
        "The adapter derives from its base model, whose license applies to it. arXiv's metadata, abstracts included, "
        "is CC0.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(variant: str, adapter: Manifest, lora: dict[str, Any], measured: Measured) -> dict[str, Any]:
    metrics = [
        {"type": "perplexity", "name": "perplexity, mean over abstracts", "value": measured.perplexity.abstract_mean},
        {"type": "perplexity", "name": "perplexity, over all tokens", "value": measured.perplexity.token},
    ]
    test = {"name": f"arXiv abstracts, test set {measured.test[:16]}", "type": "arxiv-abstracts", "split": "test"}
    task = {"type": "text-generation", "name": "Text Generation"}
    front: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "language": ["en"],
        "tags": [*_TAGS, *(f"arxiv:{c}" for c in variant.rpartition("/")[0].split("+"))],
        "license": "other",
        "license_name": "as-base-model",
        "metrics": ["perplexity"],
        "model-index": [{"name": variant, "results": [{"task": task, "dataset": test, "metrics": metrics}]}],
    }
    if _hub_id(measured.base, lora) is not None:
        front = {"base_model": _hub_id(measured.base, lora), "base_model_relation": "adapter", **front}
    return front


def _hub_id(base_digest: str, lora: dict[str, Any]) -> str | None:
    """The base's id on the hub. A hub model is pinned by its commit (40 digits), a folder by a sha256 (64)."""
    location = str(lora.get("base_model_name_or_path") or "").partition("@")[0]
    return location if len(base_digest) == 40 and location.count("/") == 1 else None


def _describe_base(base_digest: str, lora: dict[str, Any]) -> str:
    name = _hub_id(base_digest, lora)
    return f"[{name}](https://huggingface.co/{name})" if name else f"a base model with digest `{base_digest[:16]}`"


def _figure(value: float) -> str:
    return f"{value:.4g}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cell = lambda row: "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |"
    return "\n".join([cell(head), "|" + " --- |" * len(head), *map(cell, rows)])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names. Paths of the training machine are left out."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flat(inner, f"{prefix}{key}.")
        elif not (isinstance(inner, str) and inner.startswith(("/", "file:", "s3:"))):
            flat[prefix + key] = inner
    return flat
