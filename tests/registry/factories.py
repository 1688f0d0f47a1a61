"""Adapters and comparisons as their rooms leave them, with figures a test chooses."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.names import slug

BASE, TEST, CORPUS, SPLIT = "b" * 64, "e" * 64, "c" * 64, "5" * 64
CONDITIONS = {
    **{"test": TEST, "precision": "fp32", "lora": "fp32", "attention": "sdpa", "max_length": None},
    **{"special_tokens": "BOS", "evaluation": "feyntune-evaluation-2"},
}
BASE_PERPLEXITY = {"abstract_mean": 40.0, "token": 38.0}


def make_adapter(
    folder: Path, variant: str = "hep-th/lora-qkv", seed: int = 0, base: str = BASE, rank: int = 4
) -> Path:
    """A sealed LoRA adapter of one layer; another `seed` gives other weights."""
    mixture, method = variant.split("/")
    r = np.random.default_rng([seed, *variant.encode()])
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {
        f"{layer}.lora_A.weight": r.normal(size=(rank, 8)).astype(np.float32),
        f"{layer}.lora_B.weight": r.normal(size=(8, rank)).astype(np.float32),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": ["q_proj"],
    }
    made = {"mixture": mixture, "method": method, "epochs": 4, "learning_rate": 3e-4, "seed": seed}
    with write_artifact(folder, "adapter", inputs={"base": base, "split": SPLIT}, config=made) as tmp:
        save_file(weights, tmp.path / "adapter_model.safetensors")
        (tmp.path / "adapter_config.json").write_text(json.dumps(config))
        (tmp.path / "curve.json").write_text(json.dumps([{"step": 1, "loss": 2.0}]))
    return folder


def resealed(folder: Path, **files: bytes | None) -> Path:
    """`folder` with files changed (or, None, taken away), sealed as if its maker had left it so."""
    old = read_manifest(folder)
    out = folder.with_name(folder.name + "-changed")
    with write_artifact(out, old.kind, inputs=old.inputs, config=old.config) as tmp:
        unchanged = {n: (folder / n).read_bytes() for n in old.files}
        for name, data in {**unchanged, **files}.items():
            if data is not None:
                (tmp.path / name).write_bytes(data)
    return out


def make_comparison(
    folder: Path,
    adapters: dict[str, Path],
    deltas: dict[str, tuple[float, float, float]],
    *,
    test: str = TEST,
    base: str = BASE,
    abstracts: int = 200,
    failures: tuple[str, ...] = (),
    extra: dict[str, dict] | None = None,
    conditions: dict | None = None,
) -> Path:
    """A sealed comparison in which each variant's (mean, low, high) difference to the base is as given."""
    variants = {}
    for name, (mean, low, high) in deltas.items():
        weights = (adapters[name] / "adapter_model.safetensors").read_bytes()
        variants[name] = {
            "perplexity": {k: v + mean for k, v in BASE_PERPLEXITY.items()},
            "delta": {"mean": mean, "low": low, "high": high},
            "adapter_sha256": hashlib.sha256(weights).hexdigest(),
            "train_tokens": 12345,
            "seconds": 6.5,
            **(extra or {}).get(name, {}),
        }
    summary = {
        "corpus": {"digest": CORPUS, "papers": 1000},
        "split": {"digest": SPLIT},
        "base": {"digest": base, "perplexity": BASE_PERPLEXITY},
        "test": {"digest": test, "abstracts": abstracts},
        "conditions": {**CONDITIONS, "test": test, **(conditions or {})},
        "variants": variants,
        "failures": [{"variant": v, "step": "train", "error": "out of memory"} for v in failures],
    }
    with write_artifact(folder, "comparison", inputs={slug(n): "0" * 64 for n in deltas}) as tmp:
        (tmp.path / "summary.json").write_text(json.dumps(summary))
        (tmp.path / "table.md").write_text("| variant |\n")
        (tmp.path / "report.html").write_text("<p>report</p>")
    return folder
