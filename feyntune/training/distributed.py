"""The processes that train together, one for each device, and the signals that ask them to stop."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from feyntune.errors import UserError
from feyntune.model.load import get_device
from feyntune.training.config import TrainConfig

# Longer than a stalled store takes to give up. A dead process is noticed by the launcher, within a second.
TIMEOUT = timedelta(minutes=30)


@dataclass
class ProcessGroup:
    """This process's place among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite `tensors` in every process with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, in every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def leave(self) -> None:
        """End the group after the last collective, in every process.

        Never call this on the way of an exception: NCCL's shutdown waits for the others, which may be waiting for this
        process. A process that failed writes its outcome and exits.
        """
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def init_process_group(config: TrainConfig) -> ProcessGroup:
    """Join the group that the launcher's environment describes.

    Raises:
        UserError: the number of processes or GPUs is not `config.devices`, or a setting cannot work here.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != config.devices:
        raise UserError(
            f"devices is {config.devices}, but {world_size} processes were started: start the training through "
            "feyntune.training.launch, which starts one for each device."
        )
    cuda = config.device == "cuda" or (config.device == "auto" and get_device().type == "cuda")
    if cuda and torch.cuda.device_count() < world_size:
        raise UserError(f"devices is {world_size}, but this machine has {torch.cuda.device_count()} GPUs: lower it.")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
    return ProcessGroup(rank, world_size, device)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, however often they come. The loop checks it after every step."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
