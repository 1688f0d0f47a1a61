"""Training processes by fork: the test's process has imported everything, so one starts in milliseconds."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from feyntune.errors import EXIT_INTERRUPTED, Interrupted
from feyntune.training import launch as launching
from feyntune.training.batches import divide, predicted
from feyntune.training.dropout import document_seeds


def fork_training(job: dict[str, Any], ranks: int = 1, errors: Path | None = None) -> list[int]:
    """Start `train(**job)` in `ranks` forked processes; returns their ids. Exit codes as the launcher's."""
    from feyntune.training import train as recipe

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                recipe.train(**job)
                code = 0
            except Interrupted:
                code = EXIT_INTERRUPTED
            except BaseException:
                if errors is not None:
                    errors.write_text(traceback.format_exc())
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run_training(job: dict[str, Any], ranks: int = 1) -> None:
    assert wait_for(fork_training(job, ranks)) == [0] * ranks


def is_running(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def wait_until(condition, seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.002)


def curve(out: str | Path) -> dict[str, Any]:
    return json.loads((Path(out) / "curve.json").read_text())


def accumulate_in_shards(batch, step, config, runner, gradient, group, stop, shards=6):
    """In place of `train.accumulate_gradients`: the same bytes on any number of devices that divides `shards`.

    A batch has as many parts as `shards`, whoever computes them, and their gradients are added in order; all-reduce
    adds in an order that depends on the number of processes.
    """
    own = []
    for positions in divide([len(d.tokens) for d in batch], shards)[group.rank :: group.world_size]:
        gradient.zero_()
        seeds = document_seeds(config.seed, step, positions)
        runner.backward([batch[i] for i in positions], seeds, predicted(batch), gradient)
        own.append(gradient.clone())
    gathered = [torch.stack(own)]
    if group.world_size > 1:
        gathered = [torch.empty_like(gathered[0]) for _ in range(group.world_size)]
        dist.all_gather(gathered, torch.stack(own))
    gradient.zero_()
    for shard in range(shards):
        gradient += gathered[shard % group.world_size][shard // group.world_size]
    gradient[-1] = float(stop.is_set())
    group.all_reduce(gradient[-1:])


class Forked:
    """One training process, with what the launcher uses of subprocess.Popen."""

    def __init__(self, job, rank, devices, port):
        self.code = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(launching.work(job))

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)


def start_forked(job, devices):
    """In place of `launch._start`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [Forked(job, rank, devices, port) for rank in range(devices)]
