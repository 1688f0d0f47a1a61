"""Alerts and dashboard in Prometheus' own engine, fed with the metrics the project really has."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY, CollectorRegistry

from tests.cluster.charts import CHART, ROOT, tool

RULES = CHART / "files" / "rules.yaml"
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text())
CASES = Path(__file__).parent / "rules_test.yaml"
PROMTOOL = tool("promtool")
with_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool on PATH (it comes with Prometheus)")
# What others than this project measure: Kubeflow Pipelines' API server and NVIDIA's exporter.
FOREIGN = {
    'resource_manager_workflow_runs_failed{workflow="feyntune-suite-a",profile="p"}',
    'resource_manager_workflow_runs_success{workflow="feyntune-suite-a",profile="p"}',
    'DCGM_FI_DEV_GPU_UTIL{gpu="0",exported_pod="p"}',
}


def alerts() -> list[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def promtool(tests: dict[str, Any], tmp_path: Path) -> str:
    """What `promtool test rules` says; "" when all is well."""
    assert PROMTOOL is not None
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump(tests))
    done = subprocess.run([PROMTOOL, "test", "rules", str(path)], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@with_promtool
def test_alerts_come_with_their_trouble_and_not_without(tmp_path):
    tests = yaml.safe_load(CASES.read_text())
    assert not promtool({**tests, "rule_files": [str(RULES)]}, tmp_path)


@with_promtool
def test_an_alert_that_does_not_come_is_seen(tmp_path):
    broken = RULES.read_text().replace("> 1800", "> 18000")
    (tmp_path / "rules.yaml").write_text(broken)
    tests = yaml.safe_load(CASES.read_text())
    assert "FeyntuneCheckpointTooOld" in promtool({**tests, "rule_files": [str(tmp_path / "rules.yaml")]}, tmp_path)


def test_every_alert_has_a_case_and_an_entry_in_the_runbook():
    tested = {t["alertname"] for case in yaml.safe_load(CASES.read_text())["tests"] for t in case["alert_rule_test"]
              if t.get("exp_alerts")}  # fmt: skip
    written = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.M)
    assert sorted(tested) == sorted(alerts()) == sorted(written)


@with_promtool
def test_every_expression_of_the_dashboard_finds_the_projects_metrics(tmp_path):
    expressions = [t["expr"] for p in DASHBOARD["panels"] for t in p.get("targets", [])]
    assert len(expressions) > 20
    expressions = [e.replace("$variant", ".*").replace("$namespace", ".*") for e in expressions]
    tests = [
        {"expr": f"count({e}) > bool 0", "eval_time": "30m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for e in expressions
    ]
    series = [{"series": s, "values": "1+1x40"} for s in sorted(serving_series() | training_series() | FOREIGN)]
    case = {"interval": "1m", "input_series": series, "promql_expr_test": tests}
    assert not promtool({"rule_files": [str(RULES)], "tests": [case]}, tmp_path)


def test_every_metric_in_rules_and_dashboard_is_one_that_is_measured():
    used = RULES.read_text() + json.dumps([p.get("targets") for p in DASHBOARD["panels"]])
    names = set(re.findall(r"\b((?:feyntune|resource_manager|DCGM)_\w+)", used)) - {"feyntune_train"}
    measured = {re.split(r"\{", s)[0] for s in serving_series() | training_series() | FOREIGN}
    assert names <= measured


def serving_series() -> set[str]:
    """The endpoint's metrics, each with one child."""
    from feyntune.serving import metrics

    for name in dir(metrics):
        metric = getattr(metrics, name)
        if hasattr(metric, "_labelnames") and metric._labelnames:
            metric.labels(*metric._labelnames)
    return _series(REGISTRY, "feyntune_")


def training_series() -> set[str]:
    """A training's live metrics."""
    from feyntune.training.metrics import Metrics

    return _series(Metrics("hep-th/lora-qkv", enabled=True).registry, "feyntune_train_")


def _series(registry: CollectorRegistry, prefix: str) -> set[str]:
    samples = set()
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.startswith(prefix):
                labels = {**sample.labels, "namespace": "n", "pod": "p"}
                samples.add(sample.name + "{" + ",".join(f'{k}="{v}"' for k, v in labels.items()) + "}")
    return samples
