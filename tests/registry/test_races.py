"""How often racing writers are answers something that does not stay true: thousands of races, simulated.

Each request of a writer takes a random time, and an object is seen from some moment within its put. What a writer
does is what `Registry._decide` does; who comes first is the registry's own `ordered`.
"""

import heapq
import random
from types import SimpleNamespace

import pytest

from feyntune.registry.registry import CONFIRMATIONS
from feyntune.registry.replay import ordered


def even(r: random.Random) -> float:
    return r.expovariate(1)


def sometimes_slow(r: random.Random) -> float:
    return r.expovariate(1) * (20 if r.random() < 0.05 else 1)


def preempted(r: random.Random) -> float:
    """A busy machine: now and then a writer stands still for longer than all that another does."""
    return r.expovariate(1) * (50 if r.random() < 0.1 else 1)


def told_wrongly(r: random.Random, delay, confirmations: int, settle: float = 0, writers: int = 4) -> bool:
    """One race for the same alias; whether any writer was told what the end does not bear out."""
    events: dict[str, SimpleNamespace] = {}
    answers: dict[str, bool] = {}
    queue: list = []

    def later(now, do, *args, wait=0.0):
        heapq.heappush(queue, (now + delay(r) + wait, len(queue), r.random(), do, args))

    def put(now, promotes, then):
        seen = dict(events)
        seq = 1 + max((e.seq for e in seen.values()), default=0)
        heads = sorted(seen.keys() - {p for e in seen.values() for p in e.parents})
        event = SimpleNamespace(seq=seq, parents=heads, promotes=promotes)
        later(now, lands, f"{seq:04d}-{r.random():.15f}", event, then, now)

    def lands(now, name, event, then, began):
        events[name] = event
        wait = max(settle, 4 * (now - began)) if event.promotes and settle else 0
        later(now, then, name, wait=wait)

    def write(now):
        put(now, True, lambda now, name: later(now, read, name, 0))

    def read(now, name, confirmed):
        if confirmed == confirmations:
            answers[name] = _wins(events) == name
        else:
            put(now, False, lambda now, _: later(now, read, name, confirmed + 1))

    for _ in range(writers):
        later(0, write)
    while queue:
        now, _, _, do, args = heapq.heappop(queue)
        do(now, *args)
    return any(was != (name == _wins(events)) for name, was in answers.items())


def _wins(events) -> str:
    return next(name for name in ordered(events) if events[name].promotes)


@pytest.mark.parametrize("delay", [even, sometimes_slow, preempted])
def test_what_a_writer_is_told_after_its_confirmations_stays_true(delay):
    r = random.Random(1)
    assert sum(told_wrongly(r, delay, CONFIRMATIONS, settle=10) for _ in range(1000)) == 0


def test_without_confirmations_it_often_would_not():
    r = random.Random(1)
    assert sum(told_wrongly(r, even, 0) for _ in range(300)) > 10
