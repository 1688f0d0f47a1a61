"""The local run, whole: real steps as real processes, a branch that fails, a run that is killed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from feyntune.artifacts.artifact import read_manifest
from feyntune.errors import EXIT_INTERRUPTED, UserError
from feyntune.ingestion.synthetic import synthetic_records
from feyntune.kubeflow import local

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FEW = {"papers": 4, "max_new_tokens": 16, "similarity": False}
RECIPE = {
    "train": {"precision": "fp32", "learning_rate": 3e-3, "epochs": 2},
    "evaluate": {"precision": "fp32", "categories": ["hep-th"], "completions": FEW},
}
GOOD, BAD = "hep-th/lora-qkv", "hep-th+q-bio+cs/lora-all"


class Finished(NamedTuple):
    workdir: Path
    output: str
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Papers of the physics categories only: the mixture with q-bio and cs cannot be made of them."""
    path = tmp_path_factory.mktemp("papers") / "papers.jsonl"
    with path.open("wb") as f:
        for record in synthetic_records(300, seed=7, categories=("hep-th", "hep-ph", "gr-qc")):
            f.write(orjson.dumps(record) + b"\n")
    return path


@pytest.fixture(scope="module")
def finished(papers: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run with a branch that failed. Later runs of a test in its workdir write other summaries."""
    workdir = tmp_path_factory.mktemp("runs")
    with pytest.raises(local.RunFailed) as failed:
        local.run(f"kaggle:{papers}", [GOOD, BAD], workdir, base=str(tiny_base), recipe=RECIPE)
    assert failed.value.reported
    return Finished(workdir, str(failed.value), _summary(workdir))


def _summary(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "latest" / "summary.json").read_text())


def test_one_branch_fails_and_the_others_are_reported_and_registered(finished: Finished) -> None:
    workdir, output, summary = finished
    assert "1 variant failed" in output
    assert BAD in output
    assert [f["variant"] for f in summary["failures"]] == [BAD]
    assert "q-bio" in summary["failures"][0]["error"] or "cs" in summary["failures"][0]["error"]
    good = summary["variants"][GOOD]
    assert good["delta"]["low"] <= good["delta"]["mean"] <= good["delta"]["high"]
    assert good["train_tokens"] > 0
    assert len(good["adapter_sha256"]) == 64
    assert isinstance(good["promoted"], bool)
    assert summary["base"]["perplexity"]["abstract_mean"] > 1
    assert summary["base"]["perplexity"]["token"] > 1
    assert summary["corpus"]["digest"]
    assert summary["split"]["digest"]
    assert (workdir / "latest" / "report.html").stat().st_size > 10_000
    for name in ("base", "hep-th.lora-qkv"):
        assert read_manifest(workdir / "latest" / "evaluations" / name).kind == "evaluation"


def test_a_second_run_reuses_what_is_finished(finished: Finished, papers: Path, tiny_base: Path) -> None:
    workdir, first = finished.workdir, finished.summary
    folder = local.run(f"kaggle:{papers}", [GOOD], workdir, base=str(tiny_base), recipe=RECIPE)
    assert f"{GOOD}: finished earlier" in (folder / "run.log").read_text()
    again = _summary(workdir)
    assert again["variants"][GOOD]["adapter_sha256"] == first["variants"][GOOD]["adapter_sha256"]
    assert again["variants"][GOOD]["delta"] == first["variants"][GOOD]["delta"]
    assert again["failures"] == []


def test_other_evaluation_settings_score_the_same_adapter_again_and_another_learning_rate_trains(
    finished: Finished, papers: Path, tiny_base: Path
) -> None:
    workdir, first = finished.workdir, finished.summary["variants"][GOOD]
    shorter = {**RECIPE, "evaluate": {**RECIPE["evaluate"], "completions": {**FEW, "max_new_tokens": 8}}}
    folder = local.run(f"kaggle:{papers}", [GOOD], workdir, base=str(tiny_base), recipe=shorter)
    log = (folder / "run.log").read_text()
    assert f"{GOOD} is trained already" in log
    assert f"{GOOD}: finished earlier" not in log
    assert _summary(workdir)["variants"][GOOD]["adapter_sha256"] == first["adapter_sha256"]
    slower = {**RECIPE, "train": {**RECIPE["train"], "learning_rate": 1e-3}}
    local.run(f"kaggle:{papers}", [GOOD], workdir, base=str(tiny_base), recipe=slower)
    assert _summary(workdir)["variants"][GOOD]["adapter_sha256"] != first["adapter_sha256"]


def test_a_run_killed_anywhere_ends_with_the_same_digests(
    finished: Finished, papers: Path, tiny_base: Path, tmp_path: Path
) -> None:
    chance = random.Random(1)
    command = [sys.executable, "-m", "feyntune", "run", "--source", f"kaggle:{papers}", "--variants", GOOD]
    command += ["--workdir", str(tmp_path), "--base", str(tiny_base), "--recipe", json.dumps(RECIPE), "--json"]
    for _ in range(3):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(chance.uniform(4, 40))
        os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        time.sleep(2)  # the steps notice within a second that their run is gone
    summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    expected = finished.summary
    for key in ("corpus", "split"):
        assert summary[key]["digest"] == expected[key]["digest"]
    for key in ("adapter_sha256", "delta", "perplexity", "train_tokens"):
        assert summary["variants"][GOOD][key] == expected["variants"][GOOD][key]


def test_after_ctrl_c_everything_ends_and_the_same_command_resumes(
    finished: Finished, papers: Path, tiny_base: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "feyntune", "run", "--source", f"kaggle:{papers}", "--variants", GOOD]
    command += ["--workdir", str(tmp_path), "--base", str(tiny_base), "--recipe", json.dumps(RECIPE)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    output = []
    for line in process.stderr:
        output.append(line)
        if "evaluate base  " in line:  # finished; the variant is next
            os.killpg(process.pid, signal.SIGINT)
            break
    output.append(process.stderr.read())
    assert process.wait() == EXIT_INTERRUPTED
    assert "Run the same command to resume" in "".join(output)
    assert "Traceback" not in "".join(output)
    assert not (tmp_path / "latest").exists()
    with pytest.raises(ProcessLookupError):  # no process of the run is left
        os.killpg(process.pid, 0)
    subprocess.run([*command, "--json"], check=True, stdout=subprocess.DEVNULL)
    again = _summary(tmp_path)["variants"][GOOD]
    assert again["adapter_sha256"] == finished.summary["variants"][GOOD]["adapter_sha256"]


def test_without_fork_the_steps_are_processes_of_their_own(
    finished: Finished, papers: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feyntune.forkserver.can_fork", lambda: False)
    local.run(f"kaggle:{papers}", [GOOD], tmp_path, base=str(tiny_base), recipe=RECIPE)
    for key in ("adapter_sha256", "delta", "perplexity"):
        assert _summary(tmp_path)["variants"][GOOD][key] == finished.summary["variants"][GOOD][key]


def test_bad_input_costs_neither_torch_nor_a_folder(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'feyntune'; from feyntune.cli.main import app\n"
    code += "from feyntune.errors import UserError\n"
    code += "try: app()\nexcept UserError as e: print('torch' in sys.modules, e)\n"
    for wrong in (
        ["--source", "synthetic:x"],
        ["--source", "synthetic:5"],
        ["--source", "oai:nowhere"],
        ["--after", "2990-01-01"],
        ["--categories", ","],
        ["--variants", ""],
        ["--until", "2024-13-01"],
        ["--base", "nowhere"],
        ["--set", "train.a=1"],
    ):
        command = [sys.executable, "-c", code, "run", "--workdir", str(tmp_path / "never"), *wrong]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        assert output.startswith("False ")
    assert not (tmp_path / "never").exists()


def test_several_seeds_are_trained_scored_and_compared_as_one_variant(
    papers: Path, tiny_base: Path, tmp_path: Path
) -> None:
    two = {**RECIPE, "train": {**RECIPE["train"], "epochs": 1, "seeds": 2}}
    folder = local.run(f"kaggle:{papers}", [GOOD], tmp_path, base=str(tiny_base), recipe=two)
    summary = _summary(tmp_path)
    assert list(summary["variants"]) == [GOOD]
    assert list(summary["seeds"]["variants"][GOOD]["seeds"]) == ["0", "1"]
    assert f"{GOOD}/seed1: to do" in (folder / "run.log").read_text()
    assert "Between seeds" in (folder / "report.html").read_text()
    cards = list((tmp_path / "registry" / "cards").rglob("evaluation.json"))
    assert len(cards) == 1
    assert json.loads(cards[0].read_text())["summary"]["seed"] == summary["variants"][GOOD]["seed"]


def test_bad_input_is_refused_before_anything_starts(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean hep-th/lora-qkv"):
        local.run("synthetic:300", ["hep-th/lora-qvk"], tmp_path, base=str(tiny_base))
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.jsonl"):
        local.run("kaggle:nowhere.jsonl", [GOOD], tmp_path, base=str(tiny_base))
    with pytest.raises(UserError, match=r"recipe.evaluate.completions is null.*write false"):
        local.run("synthetic:300", [GOOD], tmp_path, base=str(tiny_base), recipe={"evaluate": {"completions": None}})
    with pytest.raises(UserError, match="namespace: Field required"):
        local.run("synthetic:300", [GOOD], tmp_path, base=str(tiny_base), serving={"image": "feyntune/predictor"})
    with pytest.raises(UserError, match="epochz"):
        local.run("synthetic:300", [GOOD], tmp_path, base=str(tiny_base), recipe={"train": {"epochz": 1}})
    with pytest.raises(UserError, match="whole numbers"):
        local.run("synthetic:x", [GOOD], tmp_path / "never", base=str(tiny_base))
    assert not (tmp_path / "never").exists()


def test_a_run_works_in_a_folder_with_foreign_packages_of_our_names(tmp_path: Path) -> None:
    for name in ("components", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a foreign package was imported')\n")
    command = [
        sys.executable,
        "-m",
        "feyntune",
        "run",
        "--source",
        "synthetic:600",
        "--variants",
        GOOD,
        "--workdir",
        "w",
    ]
    subprocess.run(command, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert (tmp_path / "w" / "latest" / "report.html").is_file()


def test_a_file_system_without_links_ends_no_run(tmp_path, monkeypatch, caplog):
    def refuse(*args, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(local.log, "propagate", True)
    local._link(tmp_path / "latest", Path("x"))
    assert "no link" in caplog.text
