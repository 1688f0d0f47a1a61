"""Start a training, in as many processes as there are devices, and report how it ended.

The parent is light: it never loads torch. Each process runs `python -m feyntune.training.launch` (forked by the
server of the local run, where there is one) with the job described in a file, and leaves its outcome in another. Exit
codes: 0 done, 75 interrupted and saved, 2 invalid input, anything else a fault. After a fault the training starts
once more if it saved a checkpoint since it started.
"""

import ctypes
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from feyntune import forkserver
from feyntune.artifacts.artifact import Manifest, is_artifact, open_artifact, read_manifest, require_new
from feyntune.artifacts.store import StoreError, open_store, pull, push, stored_manifest
from feyntune.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.telemetry import log, setup
from feyntune.training.config import TrainConfig, adapter_metadata, parse_config

EXIT_FAULT = 1
_POLL = 0.1  # seconds between looks at the processes
_GRACE = 10  # seconds a process has beyond its deadline for saving
_AFTER_FAULT = 5  # seconds that the others have to report, after one failed
_PR_SET_PDEATHSIG = 1


class TrainingFailed(Exception):
    """A training process failed. The message holds its traceback, or the signal that ended it."""


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
    """Train one adapter into `out`, unless it is there already, or in the store at `checkpoints`.

    Args:
        data: a `split` artifact.
        base: `LOCATION@DIGEST`; a location alone is pinned first.
        config: settings of TrainConfig; those that are left out have their defaults.
        checkpoints: an address in a store, for this training alone: `checkpoints/…` and at the end `adapter`.

    Raises:
        Interrupted: SIGTERM or SIGINT came and the state is saved; the same call resumes.
        UserError: the input cannot be trained on. Another try would end the same way.
        StoreError: the store does not answer or refuses.
        TrainingFailed: a fault, with the failed process's traceback.
    """
    settings = parse_config(config)
    base = pin_base(base)
    variant = f"{mixture}/{method}"
    inputs = {"split": read_manifest(data).digest, "base": str(split_pin(base)[1])}
    finished = _finished(out, checkpoints, inputs, adapter_metadata(settings, mixture, method))
    if finished is not None:
        log.info("%s is trained already: %s", variant, out)
        return finished
    require_new(out)

    job: dict[str, Any] = {"data": data, "mixture": mixture, "method": method, "base": base, "out": out}
    job |= {"checkpoints": checkpoints, "config": settings.model_dump(mode="json")}
    before = _newest_checkpoint(checkpoints)
    with _stop_requests() as stop_requests:
        try:
            _run(job, settings, variant, stop_requests)
        except (TrainingFailed, StoreError) as e:
            newest = _newest_checkpoint(checkpoints)
            if newest <= before or stop_requests:
                raise
            log.warning("%s Starting once more from the checkpoint of step %d.", e, newest)
            # The adapter is there already where its upload failed.
            if _finished(out, checkpoints, inputs, adapter_metadata(settings, mixture, method)) is None:
                _run(job, settings, variant, stop_requests)
    return open_artifact(out, "adapter")


def _run(job: dict[str, Any], settings: TrainConfig, variant: str, stop_requests: list[int]) -> None:
    """Run the job's processes to their end; raises what the first of them to fail stands for."""
    with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
        path = Path(tmp) / "job.json"
        path.write_text(json.dumps({**job, "outcomes": tmp}), encoding="utf-8")
        processes = _start(path, settings.devices)
        codes = _wait(processes, stop_requests, settings.save_deadline + _GRACE)
        if any(codes.values()):
            raise _failure(Path(tmp), codes, bool(stop_requests), variant)


def _newest_checkpoint(checkpoints: str | None) -> int:
    """The step of the newest checkpoint in the store; -1 if there is none, or the store does not answer."""
    if checkpoints is None:
        return -1
    try:
        names = list(open_store(checkpoints).names("checkpoints/"))
    except StoreError:
        return -1
    return max((int(m[1]) for n in names if (m := re.search(r"/step-(\d+)-\w+/manifest\.json$", n))), default=-1)


def _finished(out: str, checkpoints: str | None, inputs: dict[str, str], metadata: dict[str, Any]) -> Manifest | None:
    """The adapter this job would make, if it is in `out` or in the store already; afterwards it is in both.

    Raises:
        UserError: another adapter is there.
    """
    metadata = json.loads(json.dumps(metadata))

    def check(manifest: Manifest, where: str) -> None:
        if (manifest.kind, manifest.inputs, manifest.config) == ("adapter", inputs, metadata):
            return
        if manifest.kind != "adapter":
            raise UserError(f"{where} is of kind {manifest.kind}, not an adapter: choose another folder or address.")
        other = [k for k in {**metadata, **manifest.config} if metadata.get(k) != manifest.config.get(k)]
        other += [k for k in {**inputs, **manifest.inputs} if inputs.get(k) != manifest.inputs.get(k)]
        raise UserError(
            f"{where} holds another {manifest.kind} (it differs in {', '.join(other)}): choose another "
            "folder or address."
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


def _start(job: Path, devices: int, module: str = "feyntune.training.launch") -> Sequence[forkserver.Process]:
    """One training process for each device, which runs `module`.

    Each has a session of its own: a terminal's Ctrl-C reaches the parent alone, which asks once.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices)}
    # Every step has another number of tokens; fixed segments would fragment (pytorch.org/docs, CUDA semantics).
    environment["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return [
        forkserver.start(
            module,
            [str(job)],
            {**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            address=os.environ.get(forkserver.ADDRESS),
            new_session=True,
        )
        for rank in range(devices)
    ]


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The SIGTERMs and SIGINTs that came, in a list."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[forkserver.Process], stop_requests: list[int], patience: float) -> dict[int, int]:
    """Wait for all processes; returns the exit codes of those that ended by themselves, in order of ending.

    The first stop request is passed on once, as SIGTERM. After it, or after a failure, the processes that are left
    have some seconds to end by themselves: `patience` to save, `_AFTER_FAULT` when another process failed.
    """
    codes: dict[int, int] = {}
    deadline = None
    asked = False
    while len(codes) < len(processes):
        ended = {r: p.poll() for r, p in enumerate(processes) if r not in codes}
        # A process ended by a signal is the cause of what the others report in the same instant.
        for rank, code in sorted(ended.items(), key=lambda item: item[1] is None or item[1] >= 0):
            if code is not None:
                codes[rank] = code
        now = time.monotonic()
        if stop_requests and not asked:
            asked, deadline = True, now + patience
            for process in processes:
                process.send_signal(signal.SIGTERM)
        if deadline is None and any(codes.values()):
            interrupted = set(codes.values()) <= {0, EXIT_INTERRUPTED}
            deadline = now + (patience if interrupted else _AFTER_FAULT)
        if deadline is not None and now > deadline:
            for rank, process in enumerate(processes):
                if rank not in codes:
                    process.kill()
                    process.wait()
            break
        time.sleep(_POLL)
    return codes


_ERRORS = {"interrupted": Interrupted, "input": UserError, "store": StoreError, "fault": TrainingFailed}


def _failure(folder: Path, codes: dict[int, int], stop_requested: bool, variant: str) -> Exception:
    """The error that processes which ended with `codes`, in that order, stand for."""
    outcomes = {}
    for path in folder.glob("rank-*.json"):
        outcomes[int(path.stem.removeprefix("rank-"))] = json.loads(path.read_text(encoding="utf-8"))
    killed = {rank: code for rank, code in codes.items() if code < 0 and rank not in outcomes}
    if outcomes and (stop_requested or not killed):
        # Rank 0 is the one that saves; of faults the earliest is the cause of the others.
        interrupted = [rank for rank, o in outcomes.items() if o["kind"] == "interrupted"]
        first = min(interrupted) if interrupted else min(outcomes, key=lambda rank: outcomes[rank]["time"])
        return _ERRORS[outcomes[first]["kind"]](outcomes[first]["message"])
    if stop_requested:
        return Interrupted(f"Training of {variant} was stopped before it could save; start it again to resume.")
    rank, code = next(iter((killed or {r: c for r, c in codes.items() if c}).items()))
    if code == -signal.SIGKILL:
        return TrainingFailed(
            f"Training of {variant}: process {rank} was killed (SIGKILL), which usually means that the machine ran out "
            "of memory: raise the memory limit, or lower micro_batch_tokens."
        )
    if code < 0:
        return TrainingFailed(f"Training of {variant}: process {rank} was ended by {signal.Signals(-code).name}.")
    return TrainingFailed(f"Training of {variant}: process {rank} ended with exit code {code} and no message.")


def work(path: Path) -> int:
    """One training process: run the job, leave its outcome beside it, return the exit code."""
    job = json.loads(path.read_text(encoding="utf-8"))
    rank = int(os.environ.get("RANK", "0"))
    setup(quiet=rank > 0)
    try:
        from feyntune.training.train import train

        names = ("data", "mixture", "method", "base", "out", "checkpoints")
        train(config=TrainConfig(**job["config"]), **{name: job[name] for name in names})
        return 0
    except Interrupted as e:
        if rank == 0:
            log.info("%s", e)
        kind, message, code = "interrupted", str(e), EXIT_INTERRUPTED
    except StoreError as e:  # a UserError, but another try may find the store well
        kind, message, code = "store", str(e), EXIT_FAULT
    except UserError as e:
        kind, message, code = "input", str(e), EXIT_BAD_INPUT
    except BaseException:
        kind, message, code = "fault", traceback.format_exc(), EXIT_FAULT
    outcome = {"kind": kind, "message": message, "time": time.time()}
    (Path(job["outcomes"]) / f"rank-{rank}.json").write_text(json.dumps(outcome), encoding="utf-8")
    return code


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent is gone, so that no orphan trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    exit_code = work(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: after a failure NCCL's shutdown would wait for processes that wait for this one.
    os._exit(exit_code)
