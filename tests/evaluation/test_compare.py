import csv
import json
import math
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import read_manifest, write_artifact, write_manifest
from feyntune.conditions import CONDITIONS
from feyntune.errors import UserError
from feyntune.evaluation.compare import compare
from feyntune.evaluation.evaluate import SCHEMA
from feyntune.names import slug
from tests.evaluation.conftest import ALL, QKV, QUICK
from tests.evaluation.test_evaluate import reference, reseal


def summary_of(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def better(evaluation, out, factor, order=1):
    """A copy of an evaluation whose only system has `factor` times the loss, rows in another order."""
    manifest = read_manifest(evaluation)
    with write_artifact(out, "evaluation", manifest.inputs, manifest.config) as folder:
        for kind in ("scores", "completions", "extraction"):
            (folder.path / kind).mkdir()
        folder.stats |= manifest.stats
        for name in manifest.files:
            if not name.startswith("scores/"):
                shutil.copyfile(evaluation / name, folder.path / name)
                continue
            table = pq.read_table(evaluation / name)
            rows = [r | {"nll_text": r["nll_text"] * factor} for r in table.to_pylist()][::order]
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder.path / name)
    return out


def test_the_summary_says_what_was_measured_on_what(compared, adapters, tiny_base, tiny_split, evaluations):
    summary = summary_of(compared)
    assert set(summary["variants"]) == {QKV, ALL}
    assert summary["champion"] is None
    assert summary["split"]["digest"] == read_manifest(tiny_split).digest
    assert summary["corpus"]["digest"] == "0" * 64
    assert summary["base"]["digest"] == read_manifest(tiny_base).digest
    assert summary["test"]["digest"] == read_manifest(evaluations[0]).inputs["test"]
    assert (summary["test"]["category"], summary["test"]["abstracts"]) == ("hep-th", 12)
    variant = summary["variants"][QKV]
    assert variant["adapter_sha256"] == read_manifest(adapters[QKV]).files["adapter_model.safetensors"].sha256
    assert (variant["train_tokens"], variant["seconds"], variant["promoted"]) == (800, 2.5, None)
    assert variant["adapter"] == "training/x/adapter"
    assert summary["failures"] == [{"variant": "hep-th/lora-all", "step": "train", "error": "out of <memory>"}]


def test_differences_are_those_of_the_perplexities(compared):
    summary = summary_of(compared)
    base = summary["base"]["perplexity"]["abstract_mean"]
    for variant in summary["variants"].values():
        assert variant["delta"]["mean"] == pytest.approx(variant["perplexity"]["abstract_mean"] - base)
        assert variant["delta"]["low"] <= variant["delta"]["mean"] <= variant["delta"]["high"]


def test_other_categories_go_into_the_transfer_matrix_and_not_into_the_conclusion(compared):
    summary = summary_of(compared)
    assert {c: t["abstracts"] for c, t in summary["transfer"].items()} == {"hep-th": 12, "gr-qc": 5}
    of = {c: t["systems"][QKV]["perplexity"]["abstract_mean"] for c, t in summary["transfer"].items()}
    assert of["hep-th"] == summary["variants"][QKV]["perplexity"]["abstract_mean"]
    assert of["gr-qc"] != of["hep-th"]


def test_the_conclusion_names_the_best_variant(tmp_path, evaluations, adapters, tiny_split):
    ahead = better(evaluations[1], tmp_path / "ahead", 0.5)
    compare([evaluations[0], ahead, evaluations[2]], adapters, tiny_split, tmp_path / "out", config=QUICK)
    summary = summary_of(tmp_path / "out")
    assert summary["conclusion"]["best"] == QKV
    assert summary["variants"][QKV]["delta"]["high"] < 0
    assert summary["variants"][QKV]["share_better"] == 1
    page = (tmp_path / "out/report.html").read_text()
    assert f"{QKV} lowers the perplexity of the base model" in page


def test_worse_variants_give_no_best(tmp_path, evaluations, adapters, tiny_split):
    worse = [better(e, tmp_path / e.name, 1.3) for e in evaluations[1:]]
    compare([evaluations[0], *worse], adapters, tiny_split, tmp_path / "out", config=QUICK)
    assert summary_of(tmp_path / "out")["conclusion"]["best"] is None
    assert "None of 2 variants is significantly better" in (tmp_path / "out/report.html").read_text()


def test_rows_are_joined_by_id_not_by_position(tmp_path, compared, evaluations, adapters, tiny_split):
    turned = [better(e, tmp_path / e.name, 1.0, order=-1) for e in evaluations[1:]]
    compare([turned[1], turned[0], evaluations[0]], adapters, tiny_split, tmp_path / "out", config=QUICK)
    assert summary_of(tmp_path / "out")["variants"][QKV]["delta"] == summary_of(compared)["variants"][QKV]["delta"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"test": "a" * 64}}, "measured on test set aaaa"),
        ({"inputs": {"base": "b" * 64}}, "measured on base model bbbb"),
        ({"config": {"precision": "nf4"}}, "measured with precision nf4"),
        ({"inputs": {QKV: "c" * 64}}, "is not the adapter hep-th/lora-qkv that was measured"),
    ],
)
def test_a_variant_measured_otherwise_is_refused(tmp_path, evaluations, adapters, tiny_split, change, message):
    manifest = read_manifest(evaluations[1])
    changed = {key: getattr(manifest, key) | part for key, part in change.items()}
    other = reseal(evaluations[1], tmp_path / "other", **changed)
    with pytest.raises(UserError, match=message):
        compare([evaluations[0], other], adapters, tiny_split, tmp_path / "out", config=QUICK)
    assert not (tmp_path / "out").exists()


def measured_in(evaluation, out, precision):
    """A copy of an evaluation whose record names another precision; None: without a record."""
    manifest = read_manifest(evaluation)
    shutil.copytree(evaluation, out)
    (out / "manifest.json").unlink()
    record = json.loads((out / CONDITIONS).read_text())
    (out / CONDITIONS).write_text(json.dumps(record | {"precision": precision}))
    if precision is None:
        (out / CONDITIONS).unlink()
    write_manifest(out, "evaluation", manifest.inputs, manifest.config, manifest.stats)
    return out


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("bf16", "hep-th/lora-qkv was measured differently from the base, in precision \\(bf16, not fp32\\)"),
        (None, "hep-th/lora-qkv was measured differently from the base, in conditions of measurement"),
    ],
)
def test_systems_measured_under_other_conditions_are_not_compared(
    tmp_path, evaluations, adapters, tiny_split, precision, message
):
    other = measured_in(evaluations[1], tmp_path / "other", precision)
    with pytest.raises(UserError, match=message):
        compare([evaluations[0], other, evaluations[2]], adapters, tiny_split, tmp_path / "out", config=QUICK)


def test_a_branch_measured_otherwise_fails_and_the_others_are_compared(
    tmp_path, evaluations, adapters, tiny_base, tiny_split
):
    from feyntune.artifacts.store import open_store, push
    from feyntune.evaluation.step import compare_branches
    from feyntune.keys import variant_keys

    store = open_store(str(tmp_path / "store"))
    other = measured_in(evaluations[1], tmp_path / "other", "bf16")
    split = read_manifest(tiny_split).digest
    for name, evaluation in (("base", evaluations[0]), (QKV, other), (ALL, evaluations[2])):
        training, branch = variant_keys(split, tiny_base, {}, name)
        push(store, evaluation, f"{branch}/evaluation")
        if training:
            push(store, adapters[name], f"{training}/adapter")
    with write_artifact(tmp_path / "corpus", "corpus", config={"source": "synthetic"}) as corpus:
        (corpus.path / "counts.json").write_text("{}")
    compare_branches(
        str(tmp_path / "corpus"), tiny_split, [QKV, ALL], tiny_base, {}, str(tmp_path / "store"), str(tmp_path / "out")
    )
    summary = summary_of(tmp_path / "out")
    assert list(summary["variants"]) == [ALL]
    assert [f["variant"] for f in summary["failures"]] == [QKV]
    assert "measured differently from the base, in precision (bf16, not fp32)" in summary["failures"][0]["error"]
    assert summary["conditions"]["precision"] == "fp32"


def test_scores_of_other_abstracts_are_refused(tmp_path, evaluations, adapters, tiny_split):
    manifest = read_manifest(evaluations[1])
    with write_artifact(tmp_path / "short", "evaluation", manifest.inputs, manifest.config) as folder:
        (folder.path / "scores").mkdir()
        shutil.copyfile(evaluations[1] / CONDITIONS, folder.path / CONDITIONS)
        name = "scores/hep-th.lora-qkv.parquet"
        pq.write_table(pq.read_table(evaluations[1] / name).slice(1), folder.path / name)
    with pytest.raises(UserError, match="not measured on the abstracts of the base"):
        compare([evaluations[0], tmp_path / "short"], adapters, tiny_split, tmp_path / "out", config=QUICK)


def test_a_missing_base_a_repeated_variant_and_a_missing_adapter_are_refused(
    tmp_path, evaluations, adapters, tiny_split
):
    with pytest.raises(UserError, match="base model was not measured"):
        compare(evaluations[1:], adapters, tiny_split, tmp_path / "out")
    with pytest.raises(UserError, match="measured twice"):
        compare([*evaluations, evaluations[1]], adapters, tiny_split, tmp_path / "out")
    with pytest.raises(UserError, match="adapter is not given"):
        compare(evaluations, {}, tiny_split, tmp_path / "out")


def test_the_same_comparison_again_is_found_and_another_is_not_overwritten(
    compared, evaluations, adapters, tiny_split, failure
):
    again = {"failures": [failure], "config": QUICK, "adapter_uris": {QKV: "training/x/adapter"}}
    assert compare(evaluations, adapters, tiny_split, compared, **again).digest == read_manifest(compared).digest
    with pytest.raises(UserError, match="another comparison"):
        compare(evaluations, adapters, tiny_split, compared, config=QUICK)


def test_the_tables_hold_every_system(compared):
    rows = list(csv.DictReader((compared / "table.csv").open()))
    assert rows[0]["system"] == "base"
    assert rows[0]["published"] == ""  # the base is not the paper's
    assert {r["system"] for r in rows} == {"base", QKV, ALL}
    summary = summary_of(compared)
    for row in rows[1:]:
        assert float(row["token"]) == summary["variants"][row["system"]]["perplexity"]["token"]
    lines = (compared / "table.md").read_text().splitlines()
    tables = [list(t) for bar, t in groupby(lines, lambda line: line.startswith("|")) if bar]
    assert len(tables) == 3  # perplexity, completions, and training papers reproduced
    assert any("failed in train: " in line for line in lines)


def test_the_markdown_fits_kubeflows_panel_and_begins_with_the_conclusion(compared):
    """Three columns; with the figures of a real base (9.83, -1.37 [-1.42, -1.31]) the longest row has 60 characters."""
    lines = (compared / "table.md").read_text().splitlines()
    assert "perplexity" in lines[0] or "significantly" in lines[0]
    bars = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in bars} == {4}
    longest = len("hep-th70+hep-ph15+gr-qc15/lora-all") - 2 * 4  # two digits fewer in each of four figures
    own = [[cell.strip() for cell in line.split("|")] for line in bars]
    assert all(longest + len(cells[2]) + len(cells[3]) <= 62 for cells in own if cells[1] == QKV)


def test_comparing_needs_no_torch(compared, evaluations, adapters, tiny_split, tmp_path):
    script = (
        "import sys; from feyntune.evaluation.compare import compare; "
        f"compare({[str(e) for e in evaluations]!r}, { {k: str(v) for k, v in adapters.items()}!r}, {tiny_split!r}, "
        f"{str(tmp_path / 'out')!r}); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_abstract_mean_is_the_published_definition_computed_from_logits(compared, tiny_base, tiny_split):
    papers = pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()
    texts = [p["abstract"] for p in papers if p["split"] == "test" and p["primary"] == "hep-th"]
    result = summary_of(compared)["base"]["perplexity"]
    losses = [reference(tiny_base, None, text)[:2] for text in texts]
    expected = sum(math.exp(total / n) for n, total in losses) / len(losses)
    assert result["abstract_mean"] == pytest.approx(expected, rel=1e-4)
    tokens = sum(n for n, _ in losses)
    assert result["token"] == pytest.approx(math.exp(sum(total for _, total in losses) / tokens), rel=1e-4)


def completions_of(evaluations, system):
    names = {"base": 0, QKV: 1, ALL: 2}
    rows = pq.read_table(evaluations[names[system]] / "completions" / f"{slug(system)}.parquet").to_pylist()
    return {(r["id"], r["decoding"]): r for r in rows}


def test_measures_of_completions_are_paired_by_paper(compared, evaluations):
    result = summary_of(compared)["completions"]
    assert result["papers"] == {"test": 6}
    for decoding in ("sampled", "greedy"):
        for truncation, before in (("full", ""), ("truncated", "truncated_")):
            for measure in ("similarity", "similarity_with_prompt", "distinct_2", "overlap"):
                base, own = (completions_of(evaluations, s) for s in ("base", QKV))
                pairs = [(base[k][before + measure], own[k][before + measure]) for k in base if k[1] == decoding]
                pairs = [p for p in pairs if None not in p]
                figure = result["figures"]["test"][decoding][truncation][QKV][measure]
                expected = sum(b - a for a, b in pairs) / len(pairs)
                if len(pairs) == 6:  # a text too short for a measure leaves its paper out
                    assert figure["delta"]["mean"] == pytest.approx(expected)
                    assert figure["delta"]["low"] <= expected <= figure["delta"]["high"]
                    assert figure["p"] <= figure["p_holm"] <= 1


def test_completions_are_joined_by_name_and_paper(tmp_path, compared, evaluations, adapters, tiny_split):
    turned = []
    for evaluation in evaluations[::-1]:
        manifest = read_manifest(evaluation)
        with write_artifact(tmp_path / evaluation.name, "evaluation", manifest.inputs, manifest.config) as folder:
            folder.stats |= manifest.stats
            for name in manifest.files:
                (folder.path / name).parent.mkdir(exist_ok=True)
                if name == CONDITIONS:
                    shutil.copyfile(evaluation / name, folder.path / name)
                    continue
                table = pq.read_table(evaluation / name)
                pq.write_table(table.take(list(range(table.num_rows))[::-1]), folder.path / name)
        turned.append(tmp_path / evaluation.name)
    compare(turned, adapters, tiny_split, tmp_path / "out", config=QUICK)
    assert summary_of(tmp_path / "out")["completions"]["figures"] == summary_of(compared)["completions"]["figures"]


def changed_completions(evaluation, out, change, stats=None):
    manifest = read_manifest(evaluation)
    with write_artifact(out, "evaluation", manifest.inputs, manifest.config) as folder:
        folder.stats |= stats or manifest.stats
        for name in manifest.files:
            (folder.path / name).parent.mkdir(exist_ok=True)
            if name == CONDITIONS:
                shutil.copyfile(evaluation / name, folder.path / name)
                continue
            table = pq.read_table(evaluation / name)
            if name.startswith("completions/"):
                table = pa.Table.from_pylist([r | change(r) for r in table.to_pylist()], table.schema)
            pq.write_table(table, folder.path / name)
    return out


def test_completions_of_other_prompts_are_refused(tmp_path, evaluations, adapters, tiny_split):
    other = changed_completions(evaluations[1], tmp_path / "other", lambda r: {"prompt": r["prompt"] + "!"})
    with pytest.raises(UserError, match="did not complete the prompts that the base did"):
        compare([evaluations[0], other, evaluations[2]], adapters, tiny_split, tmp_path / "out", config=QUICK)


def test_memorization_reaches_the_gate(tmp_path, evaluations, adapters, tiny_split):
    from feyntune.registry.gate import Interval, Measured, Perplexity, Policy, check_gate

    heart = changed_completions(
        evaluations[1], tmp_path / "heart", lambda r: {"overlap": 6.0 if r["decoding"] == "greedy" else 5.0}
    )
    compare([evaluations[0], heart, evaluations[2]], adapters, tiny_split, tmp_path / "out", config=QUICK)
    summary = summary_of(tmp_path / "out")
    variant = summary["variants"][QKV]
    assert variant["memorization"] == 0.5  # the threshold is 6 words
    assert summary["completions"]["memorization"][QKV]["test"]["longest"] == 6
    measured = Measured(
        test=summary["test"]["digest"],
        base=summary["base"]["digest"],
        abstracts=summary["test"]["abstracts"],
        base_perplexity=Perplexity.model_validate(summary["base"]["perplexity"]),
        perplexity=Perplexity.model_validate(variant["perplexity"]),
        delta=Interval.model_validate(variant["delta"]),
        memorization=variant["memorization"],
    )
    clauses = {c.clause: c for c in check_gate(measured, Policy(maximum_memorization=0.01)).clauses}
    assert not clauses["maximum_memorization"].passed
    assert "memorization is 0.5" in clauses["maximum_memorization"].message


def test_similarity_by_different_models_is_not_compared(tmp_path, evaluations, adapters, tiny_split):
    manifest = read_manifest(evaluations[2])
    model = {**manifest.stats["completions"]["similarity"], "digest": "d" * 64}
    stats = {**manifest.stats, "completions": {**manifest.stats["completions"], "similarity": model}}
    other = changed_completions(evaluations[2], tmp_path / "other", lambda r: {}, stats)
    compare([*evaluations[:2], other], adapters, tiny_split, tmp_path / "out", config=QUICK)
    result = summary_of(tmp_path / "out")["completions"]
    assert "different models" in result["similarity"]["missing"]
    assert "dddddddddddd" in result["similarity"]["missing"]
    assert "similarity" not in result["figures"]["test"]["greedy"]["full"][QKV]
    assert "distinct_2" in result["figures"]["test"]["greedy"]["full"][QKV]


def test_completions_csv_holds_every_figure(compared):
    rows = list(csv.DictReader((compared / "completions.csv").open()))
    result = summary_of(compared)["completions"]["figures"]["test"]
    assert {(r["decoding"], r["truncation"]) for r in rows} == {(d, t) for d in result for t in ("full", "truncated")}
    for r in rows:
        figure = result[r["decoding"]][r["truncation"]][r["system"]][r["measure"]]
        assert r["mean"] == ("" if figure["mean"] is None else str(figure["mean"]))
    table = {r["system"]: r for r in csv.DictReader((compared / "table.csv").open())}
    assert float(table[QKV]["similarity"]) == result["sampled"]["full"][QKV]["similarity"]["mean"]
    assert table["base"]["similarity_delta"] == ""


def test_variants_of_equal_tokens_are_compared_among_themselves(tmp_path, compared, evaluations, adapters, tiny_split):
    budget = summary_of(compared)["budget"]
    assert budget["matched"]
    assert budget["steps"] == 3
    best, (behind,) = budget["groups"][0]["best"], budget["groups"][0]["behind"]
    assert {best, behind["system"]} == {QKV, ALL}
    means = {n: v["perplexity"]["abstract_mean"] for n, v in summary_of(compared)["variants"].items()}
    assert behind["delta"]["mean"] == pytest.approx(means[behind["system"]] - means[best])
    manifest = read_manifest(adapters[ALL])
    longer = reseal(adapters[ALL], tmp_path / "longer", stats={**manifest.stats, "train_tokens": 2400})
    compare(evaluations, adapters | {ALL: longer}, tiny_split, tmp_path / "out", config=QUICK)
    budget = summary_of(tmp_path / "out")["budget"]
    assert (budget["matched"], budget["groups"], budget["smallest"], budget["spread"]) == (False, [], QKV, 3)
    page = (tmp_path / "out/report.html").read_text()
    assert "fixed number of epochs" in page
    assert '{"train": {"max_steps": 3}}' in page


def test_agreements_with_the_reference():
    from feyntune.evaluation.completion_stats import agreements

    parts = agreements("we find that the brane is stable", "it follows that the brane is not")
    assert parts == [("we find", False), ("that the brane is", True), ("stable", False)]
    assert agreements("a x b y c", "a b c") == [("a x b y c", False)]  # one word alone agrees by chance
    assert agreements("", "a b") == []
