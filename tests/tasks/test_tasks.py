"""Benchmarks of the lm-evaluation-harness (the extra `tasks`) on a task of our own, offline."""

import json

import pyarrow.parquet as pq
import pytest

pytest.importorskip("lm_eval", reason="pip install 'feyntune[tasks]'")

from feyntune.artifacts.artifact import read_manifest
from feyntune.errors import UserError
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.tasks.tasks import SystemModels, TasksConfig, run_tasks
from tests.conftest import texts
from tests.evaluation.conftest import ALL, QKV, QUICK, adapters  # noqa: F401

pytestmark = pytest.mark.slow
CONFIG = TasksConfig(tasks=["kitchen_or_physics"], precision="fp32")
TASK = """\
task: kitchen_or_physics
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for i, (kitchen, physics) in enumerate(zip(texts("kitchen", 30, 3), texts("hep-th", 30, 3), strict=True)):
        start, *_ = kitchen.split(" ")
        choices = [kitchen[len(start) :], physics[len(physics.split(" ")[0]) :]]
        rows.append({"start": start, "choices": choices[:: 1 if i % 2 else -1], "answer": 0 if i % 2 else 1})
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "task.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(scope="session")
def done(tmp_path_factory, tiny_base, adapters, task_folder):  # noqa: F811
    out = tmp_path_factory.mktemp("tasks") / "out"
    run_tasks(tiny_base, adapters, out, CONFIG, task_folder)
    return out


def test_every_system_has_results_and_a_value_for_each_document(done, adapters, tiny_base, task_folder):  # noqa: F811
    results = json.loads((done / "results.json").read_text())
    assert set(results) == {"base", QKV, ALL}
    samples = pq.read_table(done / "samples.parquet").to_pylist()
    for system in results:
        values = [r["value"] for r in samples if r["system"] == system and r["metric"] == "acc,none"]
        assert len(values) == 30
        assert sum(values) / 30 == pytest.approx(results[system]["kitchen_or_physics"]["acc,none"])
    assert results["base"]["kitchen_or_physics"]["acc,none"] > 0.7  # it knows kitchens
    assert run_tasks(tiny_base, adapters, done, CONFIG, task_folder).digest == read_manifest(done).digest


def test_log_likelihoods_are_those_of_our_scores(tmp_path, tiny_base, tiny_split, adapters):  # noqa: F811
    from lm_eval.api.instance import Instance

    settings = EvaluateConfig(precision="fp32", completions=None, retention=None)
    evaluate(tiny_split, tiny_base, {QKV: adapters[QKV]}, tmp_path / "scores", settings)
    papers = {p["id"]: p["abstract"] for p in pq.read_table(f"{tiny_split}/papers.parquet").to_pylist()}
    models = SystemModels(tiny_base, "fp32", 4)
    for file, adapter in (("base", None), ("hep-th.lora-qkv", adapters[QKV])):
        scores = pq.read_table(tmp_path / "scores" / "scores" / f"{file}.parquet").to_pylist()
        ask = [Instance("loglikelihood", {}, ("", papers[r["id"]]), 0) for r in scores]
        harness = models.harness_model(adapter)
        for (log_likelihood, _), row in zip(harness.loglikelihood(ask, disable_tqdm=True), scores, strict=True):
            assert -log_likelihood == pytest.approx(row["nll_text"], rel=1e-5, abs=1e-4)


def test_the_comparison_shows_tasks_and_refuses_those_of_other_adapters(
    tmp_path,
    done,
    tiny_base,
    tiny_split,
    adapters,  # noqa: F811
    task_folder,
):
    settings = EvaluateConfig(precision="fp32", completions=None, retention=None)
    evaluate(tiny_split, tiny_base, adapters, tmp_path / "scores", settings)
    compare([tmp_path / "scores"], adapters, tiny_split, tmp_path / "out", config=QUICK, tasks=[done])
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["figures"]
    of = figures["kitchen_or_physics"]["acc,none"]
    assert of[QKV]["delta"]["mean"] == pytest.approx(of[QKV]["mean"] - of["base"]["mean"])
    assert "kitchen_or_physics" in (tmp_path / "out" / "report.html").read_text()
    assert "## Tasks" in (tmp_path / "out" / "table.md").read_text()
    swapped = {QKV: adapters[ALL]}
    run_tasks(tiny_base, swapped, tmp_path / "swapped", CONFIG, task_folder)
    with pytest.raises(UserError, match="another adapter hep-th/lora-qkv than the one compared"):
        compare(
            [tmp_path / "scores"], adapters, tiny_split, tmp_path / "other", config=QUICK, tasks=[tmp_path / "swapped"]
        )


def test_an_unknown_task_is_named(tmp_path, tiny_base):
    with pytest.raises(UserError, match="There is no task no_such_task"):
        run_tasks(tiny_base, {}, tmp_path / "out", TasksConfig(tasks=["no_such_task"], precision="fp32"))
