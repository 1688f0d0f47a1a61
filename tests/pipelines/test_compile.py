"""The committed YAML: fresh, and asking a cluster for what the steps need."""

import filecmp
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from feyntune.kubeflow.adapt import COMPILED, Settings, adapt
from feyntune.variants import load_variants

VARIANTS = load_variants().names()
BOTH = pytest.mark.parametrize("name", ["suite", "variant"])


@cache
def _load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return _parse((COMPILED / f"{name}.yaml").read_text())


def _parse(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    spec, platform = yaml.load_all(text, Loader=yaml.CSafeLoader)
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def _executors(spec: dict[str, Any]) -> dict[str, Any]:
    return {name: e["container"] for name, e in spec["deploymentSpec"]["executors"].items()}


def _tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    dags = [spec["root"], *spec["components"].values()]
    return {name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()}


def test_committed_pipelines_are_fresh(tmp_path: Path) -> None:
    # In a process of its own: kfp walks the stack and all loaded modules for every task, which takes it a minute here.
    command = [sys.executable, "-m", "pipelines.compile", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"suite.yaml", "variant.yaml"}
    for path in tmp_path.iterdir():
        assert filecmp.cmp(path, COMPILED / path.name, shallow=False), f"{path.name} is stale: run `make compile`"


def test_the_suite_knows_the_papers_twenty_variants_and_any_that_were_added() -> None:
    spec, _ = _load("suite")
    assert len([m for m in load_variants().mixtures if m.paper]) == 10
    assert len(VARIANTS) == 2 * len(load_variants().mixtures)
    assert spec["root"]["inputDefinitions"]["parameters"]["variants"]["defaultValue"] == VARIANTS


@BOTH
def test_the_number_of_tasks_does_not_depend_on_the_number_of_variants(name: str) -> None:
    spec, _ = _load(name)
    assert (COMPILED / f"{name}.yaml").stat().st_size < 65_000
    steps = ["evaluate-base", "evaluate", "train"]
    assert [n for n in _tasks(spec) if n in steps] == steps


@BOTH
def test_variants_are_looped_over_a_list_made_at_run_time(name: str) -> None:
    spec, _ = _load(name)
    dag = spec["components"]["comp-train-and-score"]["dag"]["tasks"]
    assert {t["taskInfo"]["name"] for t in dag.values()} == {"score the base", "each variant"}
    nested = _tasks(spec)["train-and-score"]["inputs"]["parameters"]
    for loop in dag.values():
        looped = loop["parameterIterator"]["items"]["inputParameter"]
        source = loop["inputs"]["parameters"][looped]["componentInputParameter"]
        assert nested[source]["taskOutputParameter"]["producerTask"] == "check-cache"
        # Kubeflow's driver cannot resolve a task in a loop that takes the list itself; the SDK's local runner puts the
        # item in the place of every output of another task.
        for task in spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"].values():
            taken = {p.get("componentInputParameter") for p in task["inputs"]["parameters"].values()}
            assert looped not in taken
        assert not any("taskOutputParameter" in p for p in loop["inputs"]["parameters"].values())


@pytest.mark.parametrize(("name", "gpus"), [("suite", 1), ("variant", 3)])
def test_training_pods_ask_for_gpus_of_the_a100_pool_and_what_feeds_them(name: str, gpus: int) -> None:
    spec, platform = _load(name)
    resources, pod = _executors(spec)["exec-train"]["resources"], platform["exec-train"]
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    evaluated = _executors(spec)["exec-evaluate"]["resources"]
    assert (evaluated["resourceCpuRequest"], evaluated["resourceMemoryRequest"]) == ("6", "24Gi")
    assert spec["root"]["inputDefinitions"]["parameters"]["devices"]["defaultValue"] == gpus
    assert pod["nodeSelector"]["labels"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    shm = pod["emptyDirMounts"][0]
    assert (shm["mountPath"], shm["medium"]) == ("/dev/shm", "Memory")


@BOTH
def test_what_a_training_pod_asks_for_reaches_it_from_preflight_as_texts(name: str) -> None:
    """A level that does not pass a parameter on ends the run; a number would be a pod without GPUs."""
    spec, _ = _load(name)
    resources, components = _executors(spec)["exec-train"]["resources"], spec["components"]
    asked = {
        "gpus": resources["accelerator"]["resourceCount"],
        "cpus": resources["resourceCpuRequest"],
        "memory": resources["resourceMemoryRequest"],
        "memory_limit": resources["resourceMemoryLimit"],
    }
    tasks = _tasks(spec)
    for parameter, placeholder in asked.items():
        channel = f"pipelinechannel--{parameter}"
        assert placeholder == f"{{{{$.inputs.parameters['{channel}']}}}}"
        loop = next(t for t in tasks.values() if t["taskInfo"]["name"] == "each variant")
        assert tasks["train"]["inputs"]["parameters"][channel] == {"componentInputParameter": channel}
        assert loop["inputs"]["parameters"][channel] == {"componentInputParameter": parameter}
        source = tasks["train-and-score"]["inputs"]["parameters"][parameter]["taskOutputParameter"]
        assert source == {"outputParameterKey": parameter, "producerTask": "preflight"}
        assert components["comp-preflight"]["outputDefinitions"]["parameters"][parameter]["parameterType"] == "STRING"
        for level, given in (("comp-train-and-score", parameter), (loop["componentRef"]["name"], channel)):
            assert components[level]["inputDefinitions"]["parameters"][given]["parameterType"] == "STRING"


@BOTH
def test_adapted_to_a_cluster_without_gpus_no_step_asks_for_one(name: str) -> None:
    text = adapt((COMPILED / f"{name}.yaml").read_text(), Settings(gpus=0))
    assert "nvidia" not in text
    spec, _ = _parse(text)
    assert spec["root"]["inputDefinitions"]["parameters"]["devices"]["defaultValue"] == 1
    resources = _executors(spec)["exec-train"]["resources"]
    assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("1", "8Gi")


@BOTH
def test_every_step_runs_unprivileged_with_keys_from_the_secret(name: str) -> None:
    spec, platform = _load(name)
    for executor in _executors(spec):
        pod = platform[executor]
        assert pod["securityContext"]["runAsNonRoot"] is True, executor
        names = {secret["secretName"] for secret in pod.get("secretAsEnv", [])}
        assert "feyntune-s3" in names, executor
        env = {e["name"] for e in _executors(spec)[executor].get("env", [])}
        assert not env & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"}


@BOTH
def test_nothing_is_installed_at_run_time(name: str) -> None:
    spec, _ = _load(name)
    for executor, container in _executors(spec).items():
        assert "pip install" not in " ".join(container["command"]), executor
        assert container["image"].startswith("feyntune/"), executor


def test_variant_is_chosen_from_a_list_in_the_form() -> None:
    spec, _ = _load("variant")
    assert spec["root"]["inputDefinitions"]["parameters"]["variant"]["literals"] == VARIANTS


@BOTH
def test_a_training_is_retried_for_longer_than_it_takes(name: str) -> None:
    tasks = _tasks(_load(name)[0])
    assert tasks["train"]["retryPolicy"]["maxRetryCount"] == 5
    for task in tasks.values():
        if "retryPolicy" in task:
            seconds = int(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
            assert seconds >= 7 * 24 * 3600


@BOTH
def test_no_result_of_a_variant_comes_from_kubeflows_own_cache(name: str) -> None:
    tasks = _tasks(_load(name)[0])
    for task in ("train", "evaluate", "evaluate-base", "check-cache", "compare", "register"):
        assert not tasks[task]["cachingOptions"].get("enableCache"), task
