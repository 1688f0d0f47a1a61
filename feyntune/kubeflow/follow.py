"""Follow a run on Kubeflow to its end: its steps as they start and end, how it ended, and its report."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from feyntune.artifacts.store import open_store, pull
from feyntune.errors import EXIT_BAD_INPUT, EXIT_FAILED_BRANCH, EXIT_INTERRUPTED
from feyntune.kubeflow.adapt import COMPILED
from feyntune.kubeflow.submit import Unreachable, kubeflow_client, run_page
from feyntune.telemetry import log

ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_PATIENCE = 30  # polls in a row without an answer: a port-forward that is started again, an API server that restarts


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
        code: exit code of `feyntune submit --wait`: 0, 2 (preflight refused the parameters), 3 (a step or a variant
            failed) or 75 (somebody stopped it).
        message: one sentence; "" where all is well.
        reported: whether there is a report.
        lost_driver: whether a pod of Kubeflow's own was lost, which it cannot retry; a new start continues from there.
        store: where the run kept its results.
    """

    code: int
    message: str
    reported: bool
    lost_driver: bool
    store: str


def follow(
    host: str, run_id: str, namespace: str | None = None, token_file: str | None = None, every: float = 10
) -> Ended:
    """Wait until a run ends, with a log line for each step that starts or ends.

    Raises:
        UserError: the host refuses or has no such run, or has not answered for a while.
    """
    steps = _steps()
    states: dict[str, str] = {}
    silent = 0
    while True:
        try:
            with kubeflow_client(host, namespace, token_file) as client:
                run = client.get_run(run_id)
                store = _parameter(client, run, "store") if run.state in ENDED else ""
        except Unreachable as e:
            silent += 1
            if silent == 1:
                log.warning("%s Trying again; the run does not depend on it.", e)
            if silent >= _PATIENCE:
                raise
            time.sleep(every)
            continue
        silent = 0
        for task in _tasks(run):
            if task.display_name in steps and task.state and states.get(task.task_id) != task.state:
                states[task.task_id] = task.state
                log.info("%s: %s", task.display_name, task.state.lower())
        if run.state in ENDED:
            return _ended(run, steps, store, run_page(host, run_id))
        time.sleep(every)


def fetch_report(store: str, run_id: str, folder: Path) -> Path:
    """Copy what `compare` made of a run (summary, tables, report) from the store to `folder`.

    Raises:
        UserError: the store cannot be reached from here, or holds no such report.
    """
    if not folder.exists():
        pull(open_store(store), f"comparisons/{run_id}", folder, kind="comparison")
    return folder / "report.html"


def _ended(run: Any, steps: set[str], store: str, page: str) -> Ended:
    failed = {t.display_name for t in _tasks(run) if t.state in ("FAILED", "SYSTEM_ERROR")}
    done = {t.display_name for t in _tasks(run) if t.state == "SUCCEEDED"}
    own = sorted(failed & steps)
    drivers = sorted({name for name in failed if name.endswith("-driver")})
    reported = "compare" in done
    lost = False
    if run.state == "SUCCEEDED":
        code, what = 0, ""
    elif run.state == "CANCELED":
        code, what = EXIT_INTERRUPTED, "was stopped"
    elif "preflight" in own:
        code, what = EXIT_BAD_INPUT, "was refused: the last line of preflight's log says why"
    elif "fail-if-any-failed" in own:
        code, what = EXIT_FAILED_BRANCH, "lost a variant: the report has the others and the reason"
    elif drivers and not own:
        code, what, lost = EXIT_FAILED_BRANCH, f"lost a pod of Kubeflow's own ({', '.join(drivers)})", True
    else:
        why = f" ({run.error.message})" if run.error and run.error.message else ""
        code, what = EXIT_FAILED_BRANCH, f"failed in {', '.join(own) or 'Kubeflow itself'}{why}"
    again = "" if code in (0, EXIT_BAD_INPUT) else " The same submit again reuses everything that finished."
    return Ended(code, f"Run {run.run_id} {what}: see {page}.{again}" if code else "", reported, lost, store)


def _tasks(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _steps() -> set[str]:
    """The names of our own steps; Kubeflow lists its drivers, executors and each attempt beside them."""
    spec = next(yaml.load_all((COMPILED / "suite.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    return {
        task["taskInfo"]["name"]
        for dag in [spec["root"], *spec["components"].values()]
        for task in dag.get("dag", {}).get("tasks", {}).values()
        if "executorLabel" in spec["components"][task["componentRef"]["name"]]
    }


def _parameter(client: Any, run: Any, name: str) -> str:
    """The value of a run's parameter: given at its start, or the default of its pipeline version."""
    given = (run.runtime_config.parameters if run.runtime_config else None) or {}
    version = run.pipeline_version_reference
    if name in given or not version:
        return str(given.get(name, ""))
    spec = client.get_pipeline_version(version.pipeline_id, version.pipeline_version_id).pipeline_spec
    spec = spec.get("pipeline_spec", spec)
    return str(spec["root"]["inputDefinitions"]["parameters"][name].get("defaultValue", ""))
