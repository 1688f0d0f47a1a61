"""The committed YAML: fresh, and asking a cluster for what the steps need."""

import filecmp
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from feyntune.kubeflow.adapt import COMPILED
from feyntune.variants import load_variants
from pipelines.compile import compile_all
from pipelines.suite import VARIANTS


@cache
def _load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.load_all((COMPILED / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def _executors(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: e["container"] for name, e in spec["deploymentSpec"]["executors"].items()}


def test_committed_pipelines_are_fresh(tmp_path: Path) -> None:
    for path in compile_all(tmp_path):
        assert filecmp.cmp(path, COMPILED / path.name, shallow=False), f"{path.name} is stale: run `make compile`"


def test_suite_has_a_branch_for_each_of_the_twenty_variants() -> None:
    spec, _ = _load("suite")
    names = {t["taskInfo"]["name"] for t in spec["root"]["dag"]["tasks"].values()}
    assert len([m for m in load_variants().mixtures if m.paper]) == 10  # the paper's, and whatever was added
    assert len(VARIANTS) == 2 * len(load_variants().mixtures)
    assert names >= {"base", *VARIANTS}
    assert spec["root"]["inputDefinitions"]["parameters"]["variants"]["defaultValue"] == VARIANTS


@pytest.mark.parametrize("name", ["suite", "variant"])
def test_train_steps_ask_for_three_gpus_of_the_a100_pool(name: str) -> None:
    spec, platform = _load(name)
    trains = [e for e in _executors(spec) if e.startswith("exec-train")]
    assert len(trains) == (len(VARIANTS) if name == "suite" else 1)
    for executor in trains:
        resources = _executors(spec)[executor]["resources"]
        assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert resources["accelerator"]["resourceCount"] == "3"
        pod = platform[executor]
        assert pod["nodeSelector"]["labels"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
        assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
        shm = pod["emptyDirMounts"][0]
        assert (shm["mountPath"], shm["medium"]) == ("/dev/shm", "Memory")


@pytest.mark.parametrize("name", ["suite-cpu", "variant-cpu"])
def test_cpu_flavour_asks_for_no_gpu(name: str) -> None:
    text = (COMPILED / f"{name}.yaml").read_text()
    assert "nvidia" not in text
    spec, _ = _load(name)
    assert spec["root"]["inputDefinitions"]["parameters"]["devices"]["defaultValue"] == 1


@pytest.mark.parametrize("name", ["suite", "suite-cpu", "variant", "variant-cpu"])
def test_every_step_runs_unprivileged_with_keys_from_the_secret(name: str) -> None:
    spec, platform = _load(name)
    for executor in _executors(spec):
        pod = platform[executor]
        assert pod["securityContext"]["runAsNonRoot"] is True, executor
        names = {secret["secretName"] for secret in pod.get("secretAsEnv", [])}
        assert "feyntune-s3" in names, executor
        env = {e["name"] for e in _executors(spec)[executor].get("env", [])}
        assert not env & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}


@pytest.mark.parametrize("name", ["suite", "variant"])
def test_nothing_is_installed_at_run_time(name: str) -> None:
    spec, _ = _load(name)
    for executor, container in _executors(spec).items():
        assert "pip install" not in " ".join(container["command"]), executor
        assert container["image"].startswith("feyntune/"), executor


def test_variant_is_chosen_from_a_list_in_the_form() -> None:
    spec, _ = _load("variant")
    assert spec["root"]["inputDefinitions"]["parameters"]["variant"]["literals"] == VARIANTS


def test_interrupted_training_is_retried_and_no_branch_result_comes_from_the_cache() -> None:
    spec, _ = _load("suite")
    for component in spec["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if name == "train":
                assert task["retryPolicy"]["maxRetryCount"] == 5
            if name in ("train", "evaluate", "todo"):
                assert not task["cachingOptions"].get("enableCache")
