"""`feyntune submit --wait` against a server that speaks the Kubeflow Pipelines API, and answers as a real one did."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.cli.main import app
from feyntune.errors import UserError
from feyntune.kubeflow import follow as module
from feyntune.kubeflow.follow import follow
from feyntune.kubeflow.submit import submit
from feyntune.telemetry import log
from tests.servers.kubeflow import Kubeflow, kubeflow

RECORDED = Path(__file__).parents[1] / "recorded" / "kubeflow-2.17.0"
ONE = {"variant": "hep-th/lora-all"}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the client keeps a context file in it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)


@pytest.fixture
def lines():
    """The project's log lines."""
    collected: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: collected.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield collected
    log.removeHandler(handler)


def tasks(**states: str) -> dict[str, Any]:
    """A run's `run_details`: task names (`_` for `-`) with their states."""
    named = [(name.replace("_", "-"), state) for name, state in states.items()]
    return {"task_details": [{"task_id": n, "display_name": n, "state": s} for n, s in named]}


def recorded(name: str) -> dict[str, Any]:
    body = json.loads((RECORDED / f"{name}.json").read_text())["body"]
    body = body if isinstance(body, dict) else json.loads(body)
    return {"state": body["state"], "run_details": body["run_details"]}


def started(server: Kubeflow, *ends: dict[str, Any], **arguments: Any) -> str:
    run_id = submit(server.url, "variant", {**ONE, **arguments})
    server.ends = list(ends)
    return run_id


def test_steps_are_told_once_and_drivers_executors_and_attempts_are_not(lines: list[str]) -> None:
    running = {"preflight": "RUNNING", "preflight_driver": "SUCCEEDED", "root": "RUNNING", "executor": "RUNNING"}
    done = {**running, "preflight": "SUCCEEDED", "preflight(0)": "SUCCEEDED"}
    with kubeflow() as server:
        run_id = started(
            server,
            {"state": "RUNNING", "run_details": tasks(**running)},
            {"state": "RUNNING", "run_details": tasks(**running)},
            {"state": "SUCCEEDED", "run_details": tasks(**done)},
            store="s3://a/b",
        )
        ended = follow(server.url, run_id)
    assert ended == (0, "", False, False, "s3://a/b")
    assert lines[-2:] == ["preflight: running", "preflight: succeeded"]


@pytest.mark.parametrize(
    ("end", "code", "said", "reported", "lost"),
    [
        ({"state": "FAILED", "run_details": tasks(preflight="FAILED")}, 2, "was refused: the last line", False, False),
        (
            {"state": "FAILED", "run_details": tasks(compare="SUCCEEDED", fail_if_any_failed="FAILED")},
            3,
            "lost a variant: the report has",
            True,
            False,
        ),
        (
            {"state": "FAILED", "run_details": tasks(train_driver="FAILED", split="SUCCEEDED")},
            3,
            "lost a pod of Kubeflow's own (train-driver)",
            False,
            True,
        ),
        (
            {"state": "FAILED", "run_details": tasks(ingest="FAILED", ingest_driver="SUCCEEDED")},
            3,
            "failed in ingest: see",
            False,
            False,
        ),
        ({"state": "CANCELED"}, 75, "was stopped", False, False),
        (recorded("run-failed"), 2, "was refused", False, False),
        (recorded("run-succeeded"), 0, "", True, False),
    ],
    ids=["preflight", "variant", "driver", "step", "canceled", "recorded failed", "recorded succeeded"],
)
def test_how_a_run_ended(end: dict[str, Any], code: int, said: str, reported: bool, lost: bool) -> None:
    with kubeflow() as server:
        ended = follow(server.url, started(server, end))
    assert (ended.code, ended.reported, ended.lost_driver) == (code, reported, lost)
    assert said in ended.message
    assert ("reuses everything" in ended.message) == (code in (3, 75))
    assert ended.store == "s3://feyntune"  # the default of the pipeline version


def test_a_server_that_is_away_for_a_while_is_asked_again_and_a_refusal_is_final(lines: list[str]) -> None:
    with kubeflow() as server:
        run_id = started(server, {"state": "SUCCEEDED"})
        server.refuse = [(503, "restarting"), (503, "restarting")]
        assert follow(server.url, run_id).code == 0
        assert sum("restarting" in line for line in lines) == 1
        with pytest.raises(UserError, match="404, Run 0 not found"):
            follow(server.url, "0")
        server.refuse = [(503, "down")] * 100
        with pytest.raises(UserError, match="503, down"):
            follow(server.url, run_id)


def command(server: Kubeflow, store: str, *options: str) -> Any:
    arguments = json.dumps({**ONE, "store": store})
    options = ("submit", "--host", server.url, "--pipeline", "variant", "--arguments", arguments, "--wait", *options)
    return CliRunner().invoke(app, options)


def test_the_command_fetches_the_report_and_ends_with_the_runs_exit_code(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    summary = {"base": {"perplexity": {"abstract_mean": 9.0}}, "variants": {}}
    with kubeflow() as server:
        create = server._runs

        def with_report(request: Any) -> Any:
            answer = create(request)
            with write_artifact(tmp_path / "made", "comparison") as folder:
                (folder.path / "summary.json").write_text(json.dumps(summary))
                (folder.path / "report.html").write_text("<html>")
            push(open_store(store), tmp_path / "made", f"comparisons/{server.started[0]['run_id']}")
            return answer

        server._runs = with_report  # type: ignore[method-assign]
        server.ends = [{"state": "FAILED", "run_details": tasks(compare="SUCCEEDED", fail_if_any_failed="FAILED")}]
        done = command(server, store)
        run_id = server.started[0]["run_id"]
    assert done.exit_code == 3, done.output
    assert "9.00" in done.stdout
    assert f"report  runs/{run_id}/report.html" in done.stdout
    assert "lost a variant" in done.stderr
    assert (tmp_path / "runs" / run_id / "report.html").is_file()


def test_a_report_that_cannot_be_fetched_is_no_failure(tmp_path: Path) -> None:
    with kubeflow() as server:
        server.ends = [{"state": "SUCCEEDED", "run_details": tasks(compare="SUCCEEDED")}]
        done = command(server, str(tmp_path / "empty"), "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["report"] is None
    assert "the report stays on the cluster, in the run's compare step" in done.stderr


def test_a_lost_driver_is_started_again_when_the_person_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import feyntune.cli.cluster as cli

    asked: list[str] = []

    def yes(question: str, err: bool) -> bool:
        asked.append(question)
        server.ends = [{"state": "SUCCEEDED"}]
        return True

    monkeypatch.setattr(cli.typer, "confirm", yes)
    lost = {"state": "FAILED", "run_details": tasks(train_driver="FAILED")}
    with kubeflow() as server:
        server.ends = [lost]
        assert command(server, "s3://a/b").exit_code == 3  # nobody to ask
        assert asked == []
        server.ends = [lost]
        monkeypatch.setattr(cli, "_can_ask", lambda: True)
        assert command(server, "s3://a/b").exit_code == 0
    assert "train-driver" in asked[0]
    assert len(server.started) == 3
