"""What a person sees while a step runs: log lines, and progress with a rate and the time left."""

import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger("feyntune")
console = Console(stderr=True, soft_wrap=True)  # results go to standard output, everything else here
ERROR = "error: "  # what the last line of a failed step begins with
RELAYED = "\x1efeyntune "  # marks a step's own lines for the local run: a level and a message
PROGRESS = "PROGRESS"  # in place of the level: a JSON object for the step's bar


def setup(quiet: bool = False) -> None:
    """Send the project's log to standard error; on a cluster one JSON object a line (FEYNTUNE_LOG=json).

    In a step of the local run, also end this process when the run that started it is gone.
    """
    handler: logging.Handler
    if "FEYNTUNE_RUN_PID" in os.environ:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(f"{RELAYED}%(levelname)s %(message)s"))
        threading.Thread(target=_end_with, args=(int(os.environ["FEYNTUNE_RUN_PID"]),), daemon=True).start()
    elif os.environ.get("FEYNTUNE_LOG") == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines())
    elif console.is_terminal:
        handler = RichHandler(console=console, show_path=False, omit_repeated_times=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)


def _end_with(pid: int) -> None:
    while True:
        time.sleep(0.5)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGTERM)
            return


@contextmanager
def one_sentence() -> Iterator[None]:
    """End a step of the pipeline with exit code 2 and one sentence as the last line of its log, on invalid input.

    Kubeflow's executor prints the traceback of whatever a component raises, and its launcher one of its own; an exit
    leaves the sentence last. Kubernetes shows the same sentence as the container's termination message.
    """
    from feyntune.errors import EXIT_BAD_INPUT, EXIT_FAILED_BRANCH, UserError, VariantsFailed

    try:
        yield
    except (UserError, VariantsFailed) as e:
        sentence = " ".join(str(e).split())
        with (
            suppress(OSError),
            Path("/dev/termination-log").open("r+", encoding="utf-8") as message,
        ):  # a pod's; absent elsewhere
            message.write(sentence)
        print(f"{ERROR}{sentence}", file=sys.stdout if "FEYNTUNE_RUN_PID" in os.environ else sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT if isinstance(e, UserError) else EXIT_FAILED_BRANCH)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ProgressLogger:
    """Counts what a loop has done: a bar on a terminal, a log line every five seconds elsewhere.

    In a step of the local run, a line for its bar as well, twice a second.
    """

    def __init__(self, what: str, total: float | None, unit: str, bar: Progress | None, done: float = 0):
        self.what, self.total, self.unit, self.bar = what, total, unit, bar
        self.done = self.before = done
        self.started = self.last_shown = time.monotonic()
        self.last_relayed = 0.0
        self.task = bar.add_task(what, total=total, notes="") if bar else None

    def advance(self, by: float = 1, **notes: float | str) -> None:
        """Say that `by` more units are done; `notes` (loss=2.31) are shown beside the rate."""
        self.done += by
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = (self.done - self.before) / seconds
        notes_shown = [format_rate(rate, self.unit)]
        notes_shown += [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in notes.items()]
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, notes="  ".join(notes_shown))
            return
        if "FEYNTUNE_RUN_PID" in os.environ and (
            time.monotonic() - self.last_relayed >= 0.5 or self.done == self.total
        ):
            self.last_relayed = time.monotonic()
            line = {"what": self.what, "done": self.done, "total": self.total, "unit": self.unit, "notes": notes_shown}
            print(f"{RELAYED}{PROGRESS} {json.dumps(line)}", flush=True)
        if time.monotonic() - self.last_shown >= 5:
            self.last_shown = time.monotonic()
            left = ""
            if self.total:
                left = f"/{self.total:,.0f}"
                notes_shown.append(f"{(self.total - self.done) / rate:,.0f} s left")
            log.info("%s: %s%s %s, %s", self.what, f"{self.done:,.0f}", left, self.unit, ", ".join(notes_shown))


def format_rate(rate: float, unit: str) -> str:
    """`rate` units a second; seconds a unit where one takes longer than a second."""
    return f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):,.1f} s/{unit.removesuffix('s')}"


@contextmanager
def progress(what: str, total: float | None = None, unit: str = "records", done: float = 0) -> Iterator[ProgressLogger]:
    """Show the progress of a loop: `with progress("train", steps, "steps") as p: p.advance(loss=1.2)`.

    `done` units were done before, by a run that this one resumes: they count, but not in the rate.
    """
    if not console.is_terminal or log.level > logging.INFO:
        yield ProgressLogger(what, total, unit, None, done)
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[notes]}"), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        yield ProgressLogger(what, total, unit, bar, done)


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
