"""What a variant can be made to repeat of its training papers, and how that is told from what it repeats of any."""

import json
import random
import shutil
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from feyntune.artifacts.artifact import read_manifest, write_manifest
from feyntune.evaluation import extraction
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig, ExtractionConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.evaluation.scoring import score_tokens
from feyntune.model.load import encode, load_base, load_tokenizer, prompt
from feyntune.model.packed import head
from feyntune.training.config import TrainConfig
from feyntune.training.train import train
from tests.conftest import texts
from tests.evaluation.conftest import QUICK

NAME = "hep-th/lora-all"
FEW = ExtractionConfig(papers=10, prompts=[4, 8, 16], continuation=8)
SETTINGS = EvaluateConfig(precision="fp32", completions=None, retention=None, extraction=FEW)
OVERFIT = TrainConfig(
    precision="fp32",
    epochs=150,
    learning_rate=1e-2,
    lora_rank=32,
    lora_alpha=64,
    lora_dropout=0,
    weight_decay=0,
    global_batch_size=10,
    validation_papers=0,
)


def of_noise(split, out):
    """A copy of a split whose hep-th abstracts are random words: ten for training, and twelve to test on."""
    words = sorted({word for text in texts("kitchen", 300) for word in text.split()})
    shutil.copytree(split, out)
    manifest = read_manifest(split)
    (out / "manifest.json").unlink()
    rng = random.Random(1)
    papers = pq.read_table(out / "papers.parquet")
    rows = [r | {"abstract": " ".join(rng.choices(words, k=30))} for r in papers.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, papers.schema), out / "papers.parquet")
    drawn = pq.read_table(out / "mixtures.parquet").to_pylist()
    ten = [r["id"] for r in drawn if (r["mixture"], r["split"]) == ("hep-th", "train")][-10:]
    drawn = [r for r in drawn if r["mixture"] == "hep-th" and (r["split"] == "test" or r["id"] in ten)]
    pq.write_table(pa.Table.from_pylist(drawn), out / "mixtures.parquet")
    write_manifest(out, "split", manifest.inputs, manifest.config)
    return str(out)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory, tiny_base, tiny_split):
    """(split, adapter, evaluation): a training that learned its ten papers by heart."""
    root = tmp_path_factory.mktemp("overfitted")
    split = of_noise(tiny_split, root / "split")
    train(split, "hep-th", "lora-all", tiny_base, root / "adapter", OVERFIT)
    evaluate(split, tiny_base, {NAME: root / "adapter"}, root / "evaluation", SETTINGS)
    return split, root / "adapter", root / "evaluation"


@pytest.fixture(scope="module")
def read(overfitted):
    return pq.read_table(overfitted[2] / "extraction" / "hep-th.lora-all.parquet")


def test_an_overfitted_adapter_repeats_its_training_papers_and_no_others(overfitted, tmp_path, read):
    split, adapter, evaluation = overfitted
    assert read.schema.equals(extraction.SCHEMA)
    compare([evaluation], {NAME: adapter}, split, tmp_path / "out", config=QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["extraction"]
    variant = summary["variants"][NAME]
    assert variant["pairs"] == 10
    for p in variant["prompts"]:
        assert p["training"]["count"] >= 9
        assert (p["test"]["count"], p["base_training"]["count"], p["base_test"]["count"]) == (0, 0, 0)
        assert p["difference"]["low"] > 0.4
    beyond = {m: f["beyond_base"] for m, f in variant["measures"].items()}
    assert beyond["matches"]["low"] > 0.5
    assert beyond["run"]["low"] > 10
    assert beyond["loss"]["high"] < -1
    page, table = ((tmp_path / "out" / name).read_text() for name in ("report.html", "table.md"))
    for text in (page, table):
        assert f"{NAME} repeats training papers more often than test papers" in text
    assert "## Training papers reproduced" in table


@pytest.mark.parametrize("system", ["base", NAME])
def test_the_pass_says_what_generate_does_for_every_prompt_length(overfitted, read, tiny_base, system):
    from peft import PeftModel

    model, tokenizer = load_base(tiny_base, "fp32", "cpu", attention="sdpa"), load_tokenizer(tiny_base)
    if system == NAME:
        model = PeftModel.from_pretrained(model, str(overfitted[1])).eval()
    papers = {p["id"]: p["abstract"] for p in pq.read_table(f"{overfitted[0]}/papers.parquet").to_pylist()}
    outcomes = []
    for row in read.to_pylist():
        ids = prompt(tokenizer, papers[row["id"]])
        greedy = row["base_greedy" if system == "base" else "greedy"]
        assert len(greedy) == min(len(ids) - 1, FEW.tokens)
        for k in (1, 3, 8, 16):
            given = torch.tensor([ids[: 1 + k]])
            made = model.generate(input_ids=given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            expected = made[0, 1 + k :].tolist() == ids[1 + k : 9 + k]
            assert extraction.reproduced(greedy, k, 8) == expected
            outcomes.append(expected)
    assert (True in outcomes) == (system == NAME)
    assert False in outcomes


def test_a_partner_is_of_the_same_category_and_age_and_was_not_trained_on(tmp_path, tiny_split):
    chosen = extraction.pairs(tiny_split, "hep-ph+gr-qc", 100).to_pylist()
    papers = {p["id"]: p for p in pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()}
    both = list(zip(chosen[::2], chosen[1::2], strict=True))
    assert len(both) == 10
    for training, test in both:
        assert (training["pair"], training["split"], test["split"]) == (test["pair"], "train", "test")
        assert papers[training["id"]]["split"] == "train"
        assert papers[test["id"]]["split"] == "test"
        assert papers[training["id"]]["primary"] == papers[test["id"]]["primary"]
        assert abs(training["date"] - test["date"]) <= timedelta(days=extraction.DAYS)
    assert len({r["id"] for r in chosen}) == 20
    few = extraction.pairs(tiny_split, "hep-ph+gr-qc", 4).to_pylist()
    assert {r["id"] for r in few if r["split"] == "test"} < {r["id"] for r in chosen}

    old = tmp_path / "old"
    shutil.copytree(tiny_split, old)
    table = pq.read_table(old / "papers.parquet")
    rows = [r | ({"date": date(1989, 1, 1)} if r["split"] == "train" else {}) for r in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), old / "papers.parquet")
    assert extraction.pairs(old, "hep-ph+gr-qc", 100).num_rows == 0


def test_an_adapter_of_another_split_is_not_measured_and_the_report_says_so(
    tmp_path, tiny_base, tiny_split, overfitted
):
    _, adapter, _ = overfitted
    evaluate(tiny_split, tiny_base, {NAME: adapter}, tmp_path / "evaluation", SETTINGS)
    assert not (tmp_path / "evaluation" / "extraction").exists()
    compare([tmp_path / "evaluation"], {NAME: adapter}, tiny_split, tmp_path / "out", config=QUICK)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["extraction"]
    assert summary["variants"] == {}
    assert "trained on another split" in summary["missing"][NAME]
    assert "was not measured: it was trained on another split" in (tmp_path / "out" / "report.html").read_text()


def test_equally_likely_tokens_all_count(tiny_base):
    model, tokenizer = load_base(tiny_base, "fp32", "cpu"), load_tokenizer(tiny_base)
    document = encode(tokenizer, "The soup has a good smell.")
    before = score_tokens(model, [document], 64, 8)[0][1]
    assert 0 < before.mean() < 1
    with torch.no_grad():
        head(model).weight.zero_()  # every logit is 0
    losses, greedy = score_tokens(model, [document], 64, 8)[0]
    assert greedy.all()
    assert losses == pytest.approx(np.log(head(model).weight.shape[0]))


def test_intervals_are_the_published_ones_and_hold_for_zero():
    # Newcombe 1998, table II: 56/70 against 48/80 by method 10.
    d = extraction.newcombe(56, 70, 48, 80)
    assert (d["low"], d["high"]) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    none = extraction._share(0, 400)
    assert none["high"] == pytest.approx(1 - 0.025 ** (1 / 400))
    assert none["high"] == pytest.approx(0.0092, abs=5e-5)
    d = extraction.newcombe(0, 400, 0, 400)
    assert -0.01 < d["low"] < 0 < d["high"] < 0.01


def test_without_memory_a_difference_is_claimed_no_more_often_than_the_level():
    """Papers differ in difficulty, and training and test papers too: the base shows the same difference."""
    rng, significant = np.random.default_rng(7), 0
    for _ in range(200):
        rows = []
        for pair in range(40):
            for split in ("train", "test"):
                ease = min(0.9, rng.beta(4, 4) + (0.1 if split == "train" else 0))
                tokens = {of: (rng.random(60) < ease).tolist() for of in ("greedy", "base_greedy")}
                losses = {of: rng.normal(2 - ease, 0.1, 60).tolist() for of in ("nll", "base_nll")}
                rows.append({"pair": pair, "split": split, "id": f"{pair}{split}", "date": date(2000, 1, 1)})
                rows[-1] |= tokens | losses
        table = pa.Table.from_pylist(rows, extraction.SCHEMA)
        result = extraction.figures({"v": table}, {}, FEW, 199, 1)["variants"]["v"]["measures"]["matches"]
        significant += result["p"] < 0.05
    assert significant / 200 <= 0.1


def test_what_seldom_happens_is_said_without_a_claim():
    def rows(training, test):
        result = []
        for pair in range(20):
            for split, most in (("train", training), ("test", test)):
                agrees = [True] * 60 if pair < most else [False] * 60
                row = {"pair": pair, "split": split, "id": f"{pair}{split}", "date": date(2000, 1, 1)}
                row |= {"greedy": agrees, "base_greedy": [False] * 60, "nll": [1.0] * 60, "base_nll": [1.0] * 60}
                result.append(row)
        return pa.Table.from_pylist(result, extraction.SCHEMA)

    first = lambda *counts: extraction.sentences(extraction.figures({"v": rows(*counts)}, {}, FEW, 199, 1))[0]
    assert first(0, 0).startswith(
        "No variant repeats a training paper: of 20 or more each, prompted with their first 4, 8"
    )
    assert "up to 17 %" in first(0, 0)
    assert first(2, 1).startswith("v repeats training papers not significantly more often than test papers")
    assert first(15, 1).startswith("v repeats training papers more often than test papers")
    assert extraction.sentences(extraction.figures({}, {"v": "x"}, FEW, 199, 1)) == []
