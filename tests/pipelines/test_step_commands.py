"""The steps' own commands, as the compiled YAML has them: how bad input ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from feyntune.errors import EXIT_BAD_INPUT, EXIT_FAILED_BRANCH
from feyntune.kubeflow.adapt import COMPILED

SPEC = next(yaml.load_all((COMPILED / "suite.yaml").read_text(), Loader=yaml.CSafeLoader))
EXECUTORS = {name: e["container"] for name, e in SPEC["deploymentSpec"]["executors"].items()}


def start(executor: str, inputs: dict[str, Any], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    container = EXECUTORS[executor]
    given = json.dumps({"inputs": inputs, "outputs": {"outputFile": str(tmp_path / "out.json")}})
    command = [part.replace("{{$}}", given) for part in [*container["command"], *container["args"]]]
    environment = {k: v for k, v in os.environ.items() if k != "FEYNTUNE_RUN_PID"}
    environment |= {e["name"]: e["value"] for e in container["env"]}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"recipe": {"train": {"epochz": 1}}}, "epochz"),
        ({"variants": ["hep-th/lora-qvk"]}, "did you mean hep-th/lora-qkv"),
        ({"source": "kaggle:nowhere.json"}, "there is no file nowhere.json"),
    ],
)
def test_bad_input_is_one_sentence_in_the_last_line_of_the_log(changed, sentence, tiny_base, tmp_path):
    given = SPEC["root"]["inputDefinitions"]["parameters"]
    parameters = {name: given.get(name, {}).get("defaultValue", "") for name in _inputs("comp-preflight")}
    place = str(tmp_path / "store")
    parameters |= {"source": "synthetic:60", "base": tiny_base, "store": place, "registry": place, **changed}
    done = start("exec-preflight", {"parameterValues": parameters}, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == EXIT_BAD_INPUT, done.stderr
    assert last.startswith("error: ")
    assert sentence in last
    assert "Traceback" not in done.stdout + done.stderr


def test_the_failed_variants_are_the_last_line_of_the_log(tmp_path):
    failures = [{"variant": "hep-th/lora-qkv", "step": "train", "error": "a\\nb"}]
    (tmp_path / "summary.json").write_text(json.dumps({"failures": failures}))
    artifact = {"name": "c", "uri": str(tmp_path), "type": {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"}}
    done = start(
        "exec-fail-if-any-failed", {"artifacts": {"comparison": {"artifacts": [artifact | {"metadata": {}}]}}}, tmp_path
    )
    assert done.returncode == EXIT_FAILED_BRANCH, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 variant failed")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_step_ends_bad_input_in_one_sentence(executor):
    assert "with one_sentence():" in "".join(EXECUTORS[executor]["command"])


def _inputs(component: str) -> list[str]:
    return list(SPEC["components"][component]["inputDefinitions"]["parameters"])
