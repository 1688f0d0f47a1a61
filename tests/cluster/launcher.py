"""Runs in a step's pod in the place of Kubeflow's launcher: artifacts in, the step's own command, artifacts out.

/driver/task.json: {"executor_input": …, "command": […], "result": "bucket/key"}.
Exits with 0, or 1 if the command failed.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from feyntune.artifacts.store import open_store


def main() -> int:
    task = json.loads(Path("/driver/task.json").read_text())
    inputs, outputs = task["executor_input"]["inputs"], task["executor_input"]["outputs"]
    for artifact in _artifacts(inputs):
        bucket, _, prefix = artifact["uri"].removeprefix("s3://").partition("/")
        store = open_store(f"s3://{bucket}")
        for name in store.names(prefix):
            path = Path("/s3") / bucket / name
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, path)
    for artifact in _artifacts(outputs):
        Path("/s3", artifact["uri"].removeprefix("s3://")).parent.mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen(task["command"])
    # Kubeflow's launcher handles no signals: SIGTERM ends it at once, and as process 1 of its pod it takes the step
    # with it, which has a second at most.
    signal.signal(signal.SIGTERM, lambda *_: _die(child))
    if child.wait():
        return 1  # Kubeflow's launcher ends with 1, whatever its step ended with
    for artifact in _artifacts(outputs):
        bucket, _, prefix = artifact["uri"].removeprefix("s3://").partition("/")
        top = Path("/s3") / bucket / prefix
        for path in [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file()):
            open_store(f"s3://{bucket}").put_file(path.relative_to(Path("/s3") / bucket).as_posix(), path)
    bucket, _, key = task["result"].partition("/")
    result = Path(outputs["outputFile"])
    open_store(f"s3://{bucket}").put(key, result.read_bytes() if result.is_file() else b"{}")
    return 0


def _die(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    os._exit(128 + signal.SIGTERM)


def _artifacts(part: dict) -> list[dict]:
    return [a for listed in part.get("artifacts", {}).values() for a in listed["artifacts"]]


if __name__ == "__main__":
    sys.exit(main())
