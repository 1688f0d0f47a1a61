"""What a person sees of a local run: a line for each finished step, and a bar for each that runs.

Elsewhere than on a terminal there are lines only, one at least every five seconds.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from feyntune.telemetry import console, log

STOP = "Ctrl-C saves and stops (exit code 75); the same command resumes."
NAMES = {"evaluate_base": "evaluate base", "check_cache": "check cache", "fail_if_any_failed": "report failures"}
BEFORE = ["preflight", "ingest", "split", "check_cache"]
AFTER = ["compare", "register", "deploy", "fail_if_any_failed"]
REUSED = {"ingest", "split"}  # Kubeflow's cache answers for these when nothing changed
QUIET = 5.0  # seconds without a line


@dataclass
class _Step:
    name: str
    number: int
    started: float = field(default_factory=time.monotonic)
    progress: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def doing(self) -> str:
        if not self.progress:
            return "starting"
        total = f"/{self.progress['total']:,.0f}" if self.progress["total"] else ""
        return f"{self.progress['done']:,.0f}{total} {self.progress['unit']}, {', '.join(self.progress['notes'])}"


class RunView:
    """The steps of one run, by number. Its methods are called from several threads."""

    def __init__(self, variants: list[str]):
        self._total = len(BEFORE) + 1 + 2 * len(variants) + len(AFTER)
        self._waiting = [*BEFORE]
        self._running: dict[int, _Step] = {}
        self._number = 0
        self._lock = threading.RLock()
        self._started = self._said = time.monotonic()
        self._live: Live | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the run while this context lasts."""
        if log.level > logging.INFO:  # --json
            yield
            return
        self._say(f"{self._total} steps. {STOP}")
        if console.is_terminal:
            with Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True) as self._live:
                yield
            self._live = None
            return
        ended = threading.Event()
        ticker = threading.Thread(target=self._tick, args=(ended,), daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()

    def start(self, function: str, variant: str) -> int:
        """A step begins; returns its number, from 1."""
        with self._lock:
            while function in self._waiting:  # what comes before it and did not start was reused
                earlier = self._waiting.pop(0)
                if earlier != function:
                    self._number += 1
                    self._finished(self._number, earlier, "reused")
            self._number += 1
            name = NAMES.get(function, function)
            if variant and function != "evaluate_base":
                name = f"{name} {variant}" if function in ("train", "evaluate") else name
            self._running[self._number] = _Step(name, self._number)
            return self._number

    def name(self, number: int) -> str:
        return self._running[number].name

    def progress(self, number: int, value: dict[str, Any]) -> None:
        self._running[number].progress = value

    def message(self, number: int, level: str, text: str) -> None:
        if level not in ("DEBUG", "INFO"):
            self._say(f"{self.name(number)}: {text}", style="yellow")

    def end(self, number: int, succeeded: bool) -> None:
        with self._lock:
            step = self._running.pop(number)
            self._finished(number, step.name, f"{step.seconds:.1f} s" if succeeded else "stopped")

    def expect(self, base: list[str], variants: list[str]) -> None:
        """What is still to be scored, and trained and scored."""
        self._total = len(BEFORE) + len(base) + 2 * len(variants) + len(AFTER)

    def _finished(self, number: int, name: str, how: str) -> None:
        self._say(f"{number:>3}/{self._total}  {NAMES.get(name, name):<44} {how:>8}")

    def _say(self, text: str, style: str = "") -> None:
        with self._lock:
            self._said = time.monotonic()
            if log.level <= logging.INFO:
                if self._live is not None:
                    self._live.refresh()  # without the bar of a step whose last line follows
                console.print(Text(text, style=style))

    def _render(self) -> Group:
        lines: list[Any] = []
        for step in list(self._running.values()):
            total = step.progress.get("total")
            table = Table.grid(padding=(0, 1))
            bar = ProgressBar(total or None, step.progress.get("done", 0), width=16, pulse=not total)
            table.add_row(Text(f"{step.number:>3}/{self._total}  {step.name:<44}"), bar, f"{step.seconds:.0f} s")
            lines += [table, Text(f"        {step.doing()}", style="dim", no_wrap=True, overflow="ellipsis")]
        return Group(*lines, Text(f"{time.monotonic() - self._started:.0f} s. {STOP}", style="dim", no_wrap=True))

    def _tick(self, ended: threading.Event) -> None:
        while not ended.wait(0.5):
            with self._lock:
                if time.monotonic() - self._said >= QUIET:
                    for step in self._running.values():
                        self._say(
                            f"{step.number:>3}/{self._total}  {step.name}: {step.doing()} ({step.seconds:.0f} s so far)"
                        )
