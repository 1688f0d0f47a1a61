"""A suite of two variants run again: what is computed anew after a change of settings or of code, and what is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import feyntune
from feyntune.artifacts.artifact import read_manifest
from feyntune.evaluation import step as scoring
from feyntune.kubeflow.preflight import check_cache
from feyntune.training import launch as launching
from feyntune.training import step as training
from tests.training.processes import start_forked

VARIANTS = ["hep-th/lora-qkv", "hep-th/lora-all"]
EVALUATE = {"precision": "fp32", "categories": ["hep-th"], "completions": False}
RECIPE = {"train": {"precision": "fp32", "max_steps": 2, "validation_papers": 2}, "evaluate": EVALUATE}


class Suite:
    """What the compiled suite does from check-cache on: train and score whatever is pending."""

    def __init__(self, split, base, folder, trained):
        self.split, self.base, self.folder, self.trained = split, base, folder, trained
        self.store = str(folder / "store")
        self.runs = 0

    def run(self, recipe):
        """(variants that were trained, systems that were scored, digests of the adapters)."""
        self.runs += 1
        self.trained.clear()
        scored, digests = check_cache(self.split, ["base", *VARIANTS], self.base, recipe, self.store), {}
        for i, name in enumerate(scored):
            adapter = None
            if name != "base":
                adapter = str(self.folder / f"adapter-{self.runs}-{i}")
                training.train_branch(self.split, name, self.base, recipe, 1, self.store, adapter)
                digests[name] = read_manifest(adapter).digest
            out = str(self.folder / f"scores-{self.runs}-{i}")
            scoring.evaluate_branch(self.split, name, adapter, self.base, recipe, self.store, out)
            assert read_manifest(out).kind == "evaluation"
        return list(self.trained), scored, digests


@pytest.fixture
def suite(tiny_split, tiny_base, tmp_path, monkeypatch):
    from feyntune.model.base import pin_base

    trained = []

    def start(job, devices):
        job_file = json.loads(job.read_text())
        trained.append(f"{job_file['mixture']}/{job_file['method']}")
        return start_forked(job, devices)

    monkeypatch.setattr(launching, "_start", start)
    return Suite(tiny_split, pin_base(tiny_base), tmp_path, trained)


def pending_under_changed_code(suite, tmp_path):
    """What check-cache finds to do with a package whose report has another comment."""
    package = tmp_path / "changed" / "feyntune"
    shutil.copytree(Path(feyntune.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "static"))
    report = package / "evaluation" / "report.py"
    report.write_text(f"{report.read_text()}\n# another comment\n")
    code = "import json, sys, feyntune; from feyntune.kubeflow.preflight import check_cache; "
    code += "print(json.dumps([feyntune.__file__, check_cache(*json.loads(sys.argv[1]))]))"
    arguments = json.dumps([suite.split, ["base", *VARIANTS], suite.base, RECIPE, suite.store])
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    command = [sys.executable, "-c", code, arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True)
    where, pending = json.loads(done.stdout.splitlines()[-1])
    assert where == str(package / "__init__.py")
    return pending


def test_only_what_a_change_concerns_is_computed_again(suite, tmp_path):
    everything = ["base", *VARIANTS]
    trained, scored, first = suite.run(RECIPE)
    assert (trained, scored) == (VARIANTS, everything)

    other = {**RECIPE, "evaluate": {**EVALUATE, "completions": {"papers": 2, "max_new_tokens": 4, "similarity": False}}}
    trained, scored, again = suite.run(other)  # other evaluation settings: scored, not trained
    assert (trained, scored) == ([], everything)
    assert again == first

    assert pending_under_changed_code(suite, tmp_path) == []  # a changed comment in the report's source: nothing
    assert suite.run(RECIPE) == ([], [], {})

    slower = {**RECIPE, "train": {**RECIPE["train"], "learning_rate": 1e-4}}
    trained, scored, slow = suite.run(
        slower
    )  # another learning rate: the variants are trained; the base has its scores
    assert (trained, scored) == (VARIANTS, VARIANTS)
    assert not set(slow.values()) & set(first.values())
