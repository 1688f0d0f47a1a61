"""Rates and progress lines."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune import telemetry
from feyntune.telemetry import format_rate, log, progress


@pytest.mark.parametrize(
    ("rate", "text"),
    [(12.34, "12.3 steps/s"), (1.0, "1.0 steps/s"), (0.4, "2.5 s/step"), (1 / 90, "90.0 s/step")],
)
def test_a_rate_is_seconds_a_unit_where_one_takes_longer_than_a_second(rate: float, text: str) -> None:
    assert format_rate(rate, "steps") == text


@given(st.floats(1e-8, 1e8))
def test_no_rate_reads_as_zero(rate: float) -> None:
    assert float(format_rate(rate, "steps").split()[0].replace(",", "")) > 0


@pytest.fixture
def lines(monkeypatch, caplog):
    """A clock that a test moves, and the messages that were logged."""
    clock = [0.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="feyntune")
    return clock, caplog


def test_a_resumed_loop_counts_what_was_done_before_but_not_in_its_rate(lines) -> None:
    clock, caplog = lines
    with progress("hep-th/lora-all", 200, "steps", done=100) as p:
        clock[0] = 40.0
        p.advance(10, loss=2.5)
    (message,) = caplog.messages
    assert message == "hep-th/lora-all: 110/200 steps, 4.0 s/step, loss 2.5, 360 s left"


def test_lines_come_every_five_seconds(lines) -> None:
    clock, caplog = lines
    with progress("read") as p:
        for second in range(1, 31):
            clock[0] = float(second)
            p.advance(100)
    assert len(caplog.messages) == 6
    assert caplog.messages[0] == "read: 500 records, 100.0 records/s"
