"""The endpoint's arithmetic beside that of the scores: both are stated, and so is what lies between them."""

import json
from html import unescape

import numpy as np
import pytest

from feyntune.artifacts.artifact import read_manifest
from feyntune.conditions import as_served_sentence
from feyntune.evaluation.as_served import TEXTS, difference
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.registry.register import register
from feyntune.registry.registry import Registry
from tests.evaluation.conftest import ALL, FEW, QKV, QUICK

SMALL = FEW.model_copy(update={"papers": 2, "max_new_tokens": 2, "decodings": ["greedy"], "similarity": None})
FP32 = EvaluateConfig(precision="fp32", completions=SMALL, retention=None, extraction=None)


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-4, 0.1)])
def test_the_difference_is_measured_for_every_system(tmp_path, tiny_base, tiny_split, adapters, precision, least, most):
    config = FP32.model_copy(update={"precision": precision})
    manifest = evaluate(tiny_split, tiny_base, adapters, tmp_path / "evaluation", config)
    measured = manifest.stats["as_served"]
    assert set(measured) == {"base", QKV, ALL}
    for name, m in measured.items():
        assert (m["scored"]["lora"], m["served"]["lora"]) == ("fp32", precision)
        assert m["texts"] == min(TEXTS, 12)
        assert m["mean_difference"] <= most
        assert m["mean_difference"] >= least or name == "base"  # which has no adapter to compute
        assert m["mean_difference"] <= m["largest_difference"]
        assert m["served"]["perplexity"] == pytest.approx(m["scored"]["perplexity"], rel=10 * most)
    served = [m["served"]["perplexity"] for m in measured.values()]
    assert min(np.diff(sorted(served))) > 0.05  # each by its own adapter


def test_report_and_registry_state_both_and_the_difference(tmp_path, tiny_base, tiny_split, adapters):
    evaluate(tiny_split, tiny_base, adapters, tmp_path / "evaluation", FP32)
    compare([tmp_path / "evaluation"], adapters, tiny_split, tmp_path / "out", config=QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["as_served"] == read_manifest(tmp_path / "evaluation").stats["as_served"]
    assert as_served_sentence(summary["as_served"]) in unescape((tmp_path / "out" / "report.html").read_text())
    register(tmp_path / "out", adapters, str(tmp_path / "registry"))
    registry = Registry.open(str(tmp_path / "registry"))
    for version in registry.snapshot().versions.values():
        assert version.measured.as_served is not None
        assert as_served_sentence({version.variant: summary["as_served"][version.variant]}) in registry.card(
            version.name
        )


def test_without_completions_nothing_is_said(tmp_path, tiny_base, tiny_split):
    config = FP32.model_copy(update={"completions": None})
    assert "as_served" not in evaluate(tiny_split, tiny_base, {}, tmp_path / "out", config).stats
    assert as_served_sentence({}) == ""


def test_figures_of_the_difference():
    by = {"lora": "fp32", "attention": "sdpa"}
    m = difference([[1.0, 2.0], [3.0]], [[1.5, 2.0], [2.75]], by, by)
    assert (m["texts"], m["tokens"]) == (2, 3)
    assert (m["mean_difference"], m["largest_difference"]) == (0.25, 0.5)
    assert m["scored"]["perplexity"] == pytest.approx((np.exp(1.5) + np.exp(3)) / 2)
