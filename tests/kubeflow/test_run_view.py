"""What a person sees of a local run: every step by number, nothing cut, never silent for long."""

import io
import logging
import time

import pytest
from rich.console import Console

from feyntune.kubeflow import run_view
from feyntune.kubeflow.run_view import STOP, RunView
from feyntune.variants import load_variants


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(run_view, "console", Console(file=text, width=80, soft_wrap=True))
    monkeypatch.setattr(run_view.log, "level", logging.INFO)
    return text


def _step(view: RunView, function: str, variant: str = "", succeeded: bool = True) -> None:
    view.end(view.start(function, variant), succeeded)


def test_every_step_has_its_number_and_reused_ones_are_named(screen: io.StringIO) -> None:
    view = RunView(["hep-th/lora-qkv", "hep-th/lora-all"])
    with view.shown():
        _step(view, "preflight")
        _step(view, "check_cache")  # ingest and split come from Kubeflow's cache
        view.expect(base=[], variants=["hep-th/lora-all"])
        _step(view, "train", "hep-th/lora-all")
        _step(view, "evaluate", "hep-th/lora-all", succeeded=False)
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert screen.getvalue().splitlines()[0] == f"13 steps. {STOP}"
    assert [line[:2] for line in lines[1:5]] == [
        ["1/13", "preflight"],
        ["2/13", "ingest"],
        ["3/13", "split"],
        ["4/13", "check"],
    ]
    assert (lines[2][-1], lines[3][-1]) == ("reused", "reused")
    assert lines[5][:3] == ["5/10", "train", "hep-th/lora-all"]
    assert lines[6][-1] == "stopped"


def test_warnings_of_a_step_are_shown_and_its_chatter_is_not(screen: io.StringIO) -> None:
    view = RunView([])
    with view.shown():
        number = view.start("ingest", "")
        view.message(number, "INFO", "1,200 records read")
        view.message(number, "WARNING", "three records have no date")
    assert "ingest: three records have no date" in screen.getvalue()
    assert "1,200" not in screen.getvalue()


def test_a_long_step_says_what_it_does(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view, "QUIET", 0.0)
    view = RunView([])
    with view.shown():
        number = view.start("train", "hep-th/lora-all")
        while "train hep-th/lora-all: starting" not in screen.getvalue():
            time.sleep(0.01)
        view.progress(number, {"what": "x", "done": 3, "total": 11, "unit": "steps", "notes": ["1.5 steps/s"]})
        while "train hep-th/lora-all: 3/11 steps, 1.5 steps/s" not in screen.getvalue():
            time.sleep(0.01)


def test_with_json_nothing_is_said(screen: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view.log, "level", logging.WARNING)
    view = RunView([])
    with view.shown():
        _step(view, "preflight")
    assert screen.getvalue() == ""


def test_in_a_terminal_of_80_columns_no_name_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(run_view, "console", Console(file=text, width=80, force_terminal=True, color_system=None))
    names = load_variants().names()
    view = RunView(names)
    for name in names:
        number = view.start("evaluate", name)
        view.progress(number, {"what": "x", "done": 3, "total": 11, "unit": "texts", "notes": ["1.5 texts/s"] * 9})
    run_view.console.print(view._render())
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name in names:
        assert any(f"evaluate {name} " in line for line in lines)
    assert len(lines) == 2 * len(names) + 1
