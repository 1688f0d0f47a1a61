"""Start a training, in as many processes as there are devices, and say in one voice how it ended.

The parent is light: for one device it never loads torch. Each process runs `python -m feyntune.training.launch`
with the job described in a file, and leaves its outcome in another. Exit codes: 0 done, 75 interrupted and saved,
2 bad input, anything else a fault.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from feyntune.artifacts.artifact import Manifest, is_artifact, open_artifact, read_manifest
from feyntune.artifacts.store import open_store, pull, push, stored_manifest
from feyntune.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.telemetry import log, setup
from feyntune.training.config import TrainConfig, adapter_metadata, parse_config

EXIT_FAULT = 1
_WATCH = 0.2  # seconds between the agent's looks at its processes
_GRACE = 15  # seconds a process has beyond its deadline for saving
_PR_SET_PDEATHSIG = 1


class TrainingFailed(Exception):
    """A training process ended by a fault. The message holds its traceback, or how it was killed."""


def launch(
    *,
    data: str,
    mixture: str,
    method: str,
    base: str,
    out: str,
    config: dict[str, Any],
    checkpoints: str | None = None,
) -> Manifest:
    """Train one adapter into `out`, or find that this was done: in `out`, or in the store at `checkpoints`.

    Args:
        data: a sealed split.
        base: `LOCATION@DIGEST`; a location alone is pinned first.
        config: knobs of TrainConfig; those that are left out have their defaults.
        checkpoints: a place in a store, of this training alone: `checkpoints/…` and at the end `adapter`.

    Raises:
        Interrupted: SIGTERM or SIGINT came and the state is saved; the same call goes on from there.
        UserError: the input cannot be trained on. Another try would end the same way.
        TrainingFailed: a fault, with the failed process's traceback.
    """
    knobs = parse_config(config)
    base = pin_base(base)
    inputs = {"split": read_manifest(data).digest, "base": str(split_pin(base)[1])}
    done = _finished(out, checkpoints, inputs, adapter_metadata(knobs, mixture, method))
    if done is not None:
        log.info("%s/%s is trained already: %s", mixture, method, out)
        return done

    with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
        job: dict[str, Any] = {"data": data, "mixture": mixture, "method": method, "base": base, "out": out}
        job |= {"checkpoints": checkpoints, "config": knobs.model_dump(mode="json"), "outcomes": tmp}
        path = Path(tmp) / "job.json"
        path.write_text(json.dumps(job))
        with _child(path, knobs.devices) as child, _forwarding(child) as forwarded:
            code = child.wait()
        if code == 0:
            return open_artifact(out, "adapter")
        raise _ending(Path(tmp), code, bool(forwarded), f"{mixture}/{method}")


def _finished(out: str, checkpoints: str | None, inputs: dict[str, str], made: dict[str, Any]) -> Manifest | None:
    """The adapter this job would make, if it is in `out` or in the store already; in the end it is in both.

    Raises:
        UserError: another adapter is there.
    """
    made = json.loads(json.dumps(made))

    def check(found: Manifest, where: str) -> None:
        if (found.kind, found.inputs, found.config) == ("adapter", inputs, made):
            return
        other = [k for k in {**made, **found.config} if made.get(k) != found.config.get(k)]
        other += [k for k in {**inputs, **found.inputs} if inputs.get(k) != found.inputs.get(k)]
        raise UserError(
            f"{where} holds another {found.kind} (it differs in {', '.join(other) or 'kind'}): choose another place."
        )

    if is_artifact(out):
        manifest = open_artifact(out)
        check(manifest, out)
        if checkpoints is not None:
            push(open_store(checkpoints, 8), out, "adapter")
        return manifest
    if checkpoints is not None:
        store = open_store(checkpoints, 8)
        stored = stored_manifest(store, "adapter")
        if stored is not None:
            check(stored, f"{store.uri}/adapter")
            return pull(store, "adapter", out, "adapter")
    return None


def _child(job: Path, devices: int) -> subprocess.Popen:
    """The training process, or for several devices the agent that starts and watches one for each."""
    agent = ["--agent"] if devices > 1 else []
    return subprocess.Popen([sys.executable, "-m", __spec__.name, *agent, str(job)])


@contextmanager
def _forwarding(child: subprocess.Popen) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT on to the child as SIGTERM; yields the list of those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending(folder: Path, code: int, asked: bool, variant: str) -> Exception:
    """The error that a failed child stands for: its exit code, what the agent saw, what the processes left."""
    outcomes = {}
    for path in folder.glob("rank-*.json"):
        outcomes[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text())
    first = 0
    agent = folder / "agent.json"
    if agent.is_file():
        seen = json.loads(agent.read_text())
        first, code = seen["rank"], seen["code"]
    outcome = outcomes.get(first) or next(iter(outcomes.values()), None)
    if code < 0 and first not in outcomes and not asked:
        outcome = None
    if outcome is not None:
        kind = {"interrupted": Interrupted, "input": UserError, "fault": TrainingFailed}[outcome["kind"]]
        return kind(outcome["message"])
    if asked:
        return Interrupted(f"Training of {variant} was stopped before it could save; it goes on from what was saved.")
    if code == -signal.SIGKILL:
        return TrainingFailed(
            f"Training of {variant}: process {first} was killed (SIGKILL), as a machine does that runs out of memory: "
            "raise the memory limit, or lower micro_batch_tokens."
        )
    if code < 0:
        return TrainingFailed(f"Training of {variant}: process {first} was ended by {signal.Signals(-code).name}.")
    return TrainingFailed(f"Training of {variant}: process {first} ended with exit code {code} and no word.")


def _agent(path: Path) -> int:
    """Start one process to a device through torchrun's API, and end all when one fails."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = json.loads(path.read_text())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["config"]["devices"],
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=_WATCH,
        shutdown_timeout=int(job["config"]["save_deadline"]) + _GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", __spec__.name, str(path))
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        seen = {"rank": rank, "code": failure.exitcode}
        (Path(job["outcomes"]) / "agent.json").write_text(json.dumps(seen))
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAULT
    except SignalException:
        return EXIT_INTERRUPTED
    return 0


def work(path: Path) -> int:
    """One training process: run the job, leave its outcome beside it, return the exit code."""
    job = json.loads(path.read_text())
    rank = int(os.environ.get("RANK", "0"))
    setup(quiet=rank > 0)
    try:
        from feyntune.training.train import train

        names = ("data", "mixture", "method", "base", "out", "checkpoints")
        train(config=TrainConfig(**job["config"]), **{name: job[name] for name in names})
        return 0
    except Interrupted as e:
        log.info("%s", e)
        kind, message, code = "interrupted", str(e), EXIT_INTERRUPTED
    except UserError as e:
        kind, message, code = "input", str(e), EXIT_BAD_INPUT
    except Exception:
        kind, message, code = "fault", traceback.format_exc(), EXIT_FAULT
    (Path(job["outcomes"]) / f"rank-{rank}.json").write_text(json.dumps({"kind": kind, "message": message}))
    return code


def _die_with_parent() -> None:
    """Ask Linux to end this process when the one that started it is gone, so that no orphan trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    sys.exit(_agent(Path(sys.argv[2])) if sys.argv[1] == "--agent" else work(Path(sys.argv[1])))
