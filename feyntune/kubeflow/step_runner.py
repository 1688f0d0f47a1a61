"""How the local run starts the steps of the compiled pipeline: as processes, forked where that is safe.

Kubeflow's local runner calls `Runner.run` for every step, instead of starting a shell that starts Python. Two servers
fork: one that has imported what every step needs, and one that has imported torch and its libraries as well, for
training and scoring.
"""

import builtins
import io
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from feyntune import forkserver
from feyntune.kubeflow.run_view import RunView
from feyntune.telemetry import PROGRESS, RELAYED

EXECUTOR = "kfp.dsl.executor_main"
LIGHT = ["kfp.dsl.executor", "pyarrow.parquet", "feyntune.artifacts.store", "feyntune.ingestion.ingest"]
HEAVY = [
    *LIGHT,
    "peft",
    "sentence_transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "feyntune.training.train",
    "feyntune.evaluation.evaluate",
    "feyntune.evaluation.scoring",
    "feyntune.engine.batching",
    "feyntune.engine.manager",
]
NEEDS_TORCH = {"train", "evaluate", "evaluate_base"}  # functions of the compiled components


class Runner:
    """Runs steps, each with a line in `view` and all their output in `log_file`."""

    def __init__(self, log_file: io.TextIOBase, view: RunView, train_expected: bool):
        self._log, self._view = log_file, view
        self._lock = threading.Lock()
        self._running: dict[int, forkserver.Process] = {}
        self._number = 0
        self._stopped = False
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="feyntune-")))
        self._fork = forkserver.can_fork()
        self._light: str | None = None
        self._heavy: str | None = None
        if self._fork:
            self._light = self._stack.enter_context(forkserver.ForkServer(LIGHT)).address
        if train_expected:
            self._address("train")  # imports while the data is prepared

    def _address(self, function: str) -> str | None:
        with self._lock:
            if self._fork and function in NEEDS_TORCH and self._heavy is None:
                self._heavy = self._stack.enter_context(forkserver.ForkServer(HEAVY)).address
        return self._heavy if function in NEEDS_TORCH else self._light

    def run(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Run one step to its end; returns its exit code. Stands for kfp's `run_local_subprocess`."""
        code, args = _component(full_command)
        options = dict(zip(args[::2], args[1::2], strict=True))
        function, given = options["--function_to_execute"], json.loads(options["--executor_input"])
        parameters = given.get("inputs", {}).get("parameterValues", {})
        with self._lock:
            if self._stopped:
                return 1  # the pool of Kubeflow's runner continues with the waiting branches
            self._number += 1
            module = self._folder / str(self._number) / "ephemeral_component.py"
        module.parent.mkdir()
        module.write_text(code, encoding="utf-8")
        env = {**os.environ, **(env_vars or {}), "_KFP_RUNTIME": "true"}
        env["HOME"] = os.environ.get("HOME", "/tmp")  # the pods' /tmp would hide the hub's cache and its token
        env.pop("FEYNTUNE_LOG", None)
        address = self._address(function)
        if address is not None:
            env |= {**forkserver.ENVIRONMENT, forkserver.ADDRESS: address}
        step = self._view.start(function, parameters.get("variant", ""))
        exit_code = 1
        try:
            exit_code = self._run([f"--component_module_path={module}", *args], env, address, step)
        finally:
            self._view.end(step, exit_code == 0)
        if function == "check_cache" and exit_code == 0:
            outputs = json.loads(Path(given["outputs"]["outputFile"]).read_text(encoding="utf-8"))["parameterValues"]
            self._view.expect(outputs["base"], outputs["variants"])
        return exit_code

    def _run(self, args: list[str], env: dict[str, str], address: str | None, step: int) -> int:
        reading, writing = os.pipe()
        with open(reading, encoding="utf-8", errors="replace") as output:
            try:
                process = forkserver.start(EXECUTOR, args, env, address=address, stdout=writing)
            finally:
                os.close(writing)
            with self._lock:
                self._running[step] = process
            try:
                for line in output:
                    self._relay(step, line)
                return process.wait()
            except BaseException:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
            finally:
                with self._lock:
                    del self._running[step]

    def _relay(self, step: int, line: str) -> None:
        mark = line.find(RELAYED)
        level, _, message = line[mark + len(RELAYED) :].rstrip("\n").partition(" ")
        if mark >= 0 and level == PROGRESS:
            self._view.progress(step, json.loads(message))
            return
        with self._lock:
            self._log.write(line if mark < 0 else f"{self._view.name(step)}: {message}\n")
        if mark >= 0:
            self._view.message(step, level, message)

    def stop(self) -> None:
        """Ask the running steps to save and end, and start no other."""
        self._stopped = True
        for process in list(self._running.values()):
            process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self._stack.close()


def _component(full_command: list[str]) -> tuple[str, list[str]]:
    """The source of a component and its executor's arguments, from the command line of its container."""
    script = next(i for i, part in enumerate(full_command) if EXECUTOR in part and '"$@"' in part)
    return full_command[script + 1], full_command[script + 2 :]


@contextmanager
def steps_by(runner: Runner) -> Iterator[None]:
    """Make Kubeflow's local runner start its steps by `runner`: it offers no other place to say so."""
    from kfp.local import subprocess_task_handler

    before: Any = (subprocess_task_handler.run_local_subprocess, builtins.print)
    subprocess_task_handler.run_local_subprocess = runner.run
    try:
        yield
    finally:
        # Kubeflow indents `print` while a step runs; two steps at a time can leave it so.
        subprocess_task_handler.run_local_subprocess, builtins.print = before
        runner.close()
