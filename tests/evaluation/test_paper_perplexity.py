"""`paper_perplexity` against the paper's own way: fp16, padded batches of 12, BOS, no EOS, mean over abstracts."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.recipe import check_recipe, read_recipe
from tests.evaluation.conftest import ALL, QKV, QUICK


def padded(base, adapter, texts, bos=True, dtype=torch.float16):
    """Perplexity of each text, by transformers alone: 12 texts at a time, padded on the right, masked."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    result = []
    for start in range(0, len(texts), 12):
        batch = [(tokenizer.bos_token if bos else "") + t for t in texts[start : start + 12]]
        tokens = tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**tokens).logits[:, :-1].float()
        labels, mask = tokens["input_ids"][:, 1:], tokens["attention_mask"][:, 1:].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        result += ((loss * mask).sum(1) / mask.sum(1)).exp().tolist()
    return np.array(result)


def test_one_setting_gives_the_papers_perplexity(tmp_path, tiny_base, tiny_split, adapters):
    _, config = check_recipe(
        read_recipe(
            None,
            ["evaluate.paper_perplexity=true", "evaluate.completions=false", "evaluate.retention=false"],
        )
    )
    assert config.precision == "fp16"  # over the recipe's bf16
    evaluate(tiny_split, tiny_base, adapters, tmp_path / "evaluation", config)
    compare([tmp_path / "evaluation"], adapters, tiny_split, tmp_path / "out", config=QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["conditions"]["precision"] == "fp16"
    papers = pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()
    texts = [p["abstract"] for p in papers if (p["split"], p["primary"]) == ("test", "hep-th")]
    figures = {"base": summary["base"], **summary["variants"]}
    for name in ("base", QKV, ALL):
        ours = figures[name]["perplexity"]["abstract_mean"]
        assert ours == pytest.approx(padded(tiny_base, adapters.get(name), texts).mean(), rel=1e-3)
        assert ours != pytest.approx(padded(tiny_base, adapters.get(name), texts, bos=False).mean(), rel=1e-2)


def test_in_fp32_both_agree_abstract_by_abstract(tmp_path, tiny_base, tiny_split, adapters):
    config = EvaluateConfig(precision="fp32", completions=None, retention=None, extraction=None)
    evaluate(tiny_split, tiny_base, adapters, tmp_path / "evaluation", config)
    papers = {p["id"]: p["abstract"] for p in pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()}
    scores = pq.read_table(tmp_path / "evaluation" / "scores" / "hep-th.lora-qkv.parquet").to_pylist()
    ours = [np.exp(r["nll_text"] / r["n_tokens"]) for r in scores]
    plain = padded(tiny_base, adapters[QKV], [papers[r["id"]] for r in scores], dtype=torch.float32)
    assert ours == pytest.approx(plain, rel=1e-5)


def test_other_settings_keep_their_precision():
    assert EvaluateConfig().precision == "bf16"
    assert EvaluateConfig(precision="fp32", paper_perplexity=False).precision == "fp32"
