"""Make the pictures of the documentation again: `make pictures` (needs chromium and chromedriver; minutes).

docs/pictures/terminal.svg is a recording of `feyntune run`, taken from a pseudo-terminal; the others are photographs of
the report and the workbench of that run.
"""

import base64
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).parent / "pictures"
WIDTH, HEIGHT = 90, 40  # of the terminal, in characters
FEYNTUNE = [sys.executable, "-m", "feyntune"]
# As rich's own, without the web fonts that would be fetched from another host.
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>.{unique_id}-matrix {{ font: {char_height}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
line-height: {line_height}px }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>"""


def record(command: list[str], cwd: Path) -> tuple[str, str]:
    """Run `command` in a terminal; what stands on it when the second training runs, and at the end."""
    screen = Screen()
    running = ""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.environ |= {"COLUMNS": str(WIDTH), "LINES": str(HEIGHT), "TERM": "xterm-256color"}
        os.execv(command[0], command)
    while True:
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so at the end
            break
        if not data:
            break
        screen.feed(data.decode("utf-8", "replace"))
        text = screen.text()
        if text.count("steps, ") > 1:  # two trainings at a time
            running = text
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"{' '.join(command)} failed:\n{screen.text()}")
    return running, screen.text()


class Screen:
    """As much of a terminal as rich uses: lines, carriage return, cursor up, erase line."""

    def __init__(self) -> None:
        self.lines, self.row, self.rest = [""], 0, ""

    def feed(self, data: str) -> None:
        parts = re.split(r"(\x1b\[[\d;?]*[A-Za-z]|\r|\n)", self.rest + data)
        self.rest = parts.pop() if "\x1b" in parts[-1] else ""
        for part in parts:
            up = re.fullmatch(r"\x1b\[(\d*)A", part)
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif up:
                self.row = max(0, self.row - int(up[1] or 1))
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part and part != "\r" and (not part.startswith("\x1b[") or part.endswith("m")):
                self.lines[self.row] += part

    def text(self) -> str:
        return "\n".join(self.lines).rstrip()


def terminal_svg(text: str, title: str, path: Path) -> None:
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(f"$ {title}\n{text}"))
    path.write_text(console.export_svg(title=title, code_format=SVG, unique_id="t"), encoding="utf-8")


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        yield driver
    finally:
        driver.quit()


def photograph(driver: Any, path: Path) -> None:
    data = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "webp", "quality": 80})["data"]
    path.write_bytes(base64.b64decode(data))


def workbench(workdir: Path) -> None:
    """Photographs of a score and of completions."""
    ports = []
    for _ in range(2):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    command = [*FEYNTUNE, "serve", "--registry", str(workdir / "registry"), "--base", str(workdir / "base")]
    server = subprocess.Popen([*command, f"--port={ports[0]}", f"--grpc-port={ports[1]}"])
    address = f"http://127.0.0.1:{ports[0]}/"
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{address}v2/health/ready").close()
                break
            except OSError:
                time.sleep(0.5)
        for width, height, button, name in (
            (1280, 800, "Score", "workbench-score"),
            (1280, 800, "Complete", "workbench"),
            (390, 844, "Complete", "workbench-phone"),
        ):
            with browser(width, height) as driver:
                driver.get(address)
                _until(driver, "document.querySelectorAll('.system').length")
                driver.execute_script(
                    "[...document.querySelectorAll('form button')].find(b => b.textContent == arguments[0]).click()",
                    button,
                )
                _until(driver, "document.querySelectorAll('[data-state=done]').length == 2")
                photograph(driver, FOLDER / f"{name}.webp")
    finally:
        server.terminate()
        server.wait()


def _until(driver: Any, condition: str) -> None:
    while not driver.execute_script(f"return {condition}"):
        time.sleep(0.1)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        running, end = record([*FEYNTUNE, "run"], Path(folder))
        terminal_svg(running, "feyntune run", FOLDER / "terminal-running.svg")
        terminal_svg(end, "feyntune run", FOLDER / "terminal.svg")
        for width, height, name in ((1280, 800, "report"), (768, 1024, "report-tablet"), (390, 844, "report-phone")):
            with browser(width, height) as driver:
                driver.get((Path(folder) / "runs/latest/report.html").resolve().as_uri())
                photograph(driver, FOLDER / f"{name}.webp")
        workbench(Path(folder) / "runs")


if __name__ == "__main__":
    main()
