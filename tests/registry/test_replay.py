"""What events add up to, whoever wrote them and in whatever order they are read."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.registry.gate import Interval, Measured, Perplexity, Policy, check_gate
from feyntune.registry.models import Event, State, Version
from feyntune.registry.replay import ordered, replay

_MEASURED = Measured(
    test="t",
    base="b",
    abstracts=100,
    base_perplexity=Perplexity(abstract_mean=40, token=38),
    perplexity=Perplexity(abstract_mean=38, token=36),
    delta=Interval(mean=-2, low=-3, high=-1),
)
VERSIONS = [
    Version(
        variant=f"{mixture}/lora-qkv",
        digest=f"{i:064x}",
        adapter=f"a/{i}",
        card=f"c/{i}",
        rank=8,
        targets=["q_proj"],
        lineage={},
        measured=_MEASURED,
        gate=check_gate(_MEASURED, Policy()),
    )
    for i, mixture in enumerate(["hep-th", "hep-th", "gr-qc"])
]


def event(seen: State, kind: str, **fields) -> Event:
    made = {"format": 1, "seq": seen.seq + 1, "parents": seen.heads, "time": "t", "by": "x", "kind": kind}
    return Event.model_validate({**made, **fields})


@st.composite
def histories(draw) -> tuple[dict[str, Event], list[str]]:
    """Events of three writers, each of which may have read only what was there some time ago; and their order."""
    events: dict[str, Event] = {}
    landed: list[str] = []
    first = event(replay({}), "add", add=VERSIONS)
    events["first"] = first
    landed.append("first")
    views = [1, 1, 1]
    for i in range(draw(st.integers(1, 12))):
        writer = draw(st.integers(0, 2))
        if draw(st.booleans()):
            views[writer] = len(landed)  # it reads now; otherwise it goes by what it read before
        seen = replay({n: events[n] for n in landed[: views[writer]]})
        kind = draw(st.sampled_from(["promote", "promote", "rollback", "archive", "restore", "confirm"]))
        version = draw(st.sampled_from(VERSIONS))
        alias = draw(st.sampled_from(["champion", f"champion:{version.mixture}"]))
        holder = seen.aliases.get(alias)
        fields = {}
        if kind == "promote":
            fields = {"versions": [version.name], "moves": {alias: {"old": holder, "new": version.name}}}
        elif kind == "rollback":
            if holder is None:
                continue
            before = seen.aliases.get(alias.replace("champion", "previous"))
            fields = {"versions": [holder], "moves": {alias: {"old": holder, "new": before}}}
        elif kind != "confirm":
            fields = {"versions": [version.name]}
        name = f"{draw(st.integers(0, 10**6)):07d}-{i}"
        events[name] = event(seen, kind, **fields)
        landed.append(name)
    return events, landed


@settings(max_examples=60, deadline=None)
@given(histories(), st.randoms(use_true_random=False))
def test_every_reader_of_the_same_events_sees_the_same(history, shuffler: random.Random):
    events, landed = history
    shuffler.shuffle(landed)
    assert replay({n: events[n] for n in landed}) == replay(events)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_every_event_comes_after_all_its_writer_had_seen(history):
    events, _ = history
    order = {name: i for i, name in enumerate(ordered(events))}
    assert order.keys() == events.keys()
    assert all(order[p] < order[n] for n in events for p in events[n].parents)


@settings(max_examples=60, deadline=None)
@given(histories())
def test_every_decision_that_stands_was_decided_on_what_was_so(history):
    events, _ = history
    holder: dict[str, str | None] = {}
    for entry in replay(events).history:
        if entry.rejected is None:
            for alias, move in entry.event.moves.items():
                assert holder.get(alias) == move.old
                holder[alias] = move.new
    state = replay(events)
    assert {a: v for a, v in holder.items() if v} == {a: v for a, v in state.aliases.items() if "champion" in a}


@settings(max_examples=60, deadline=None)
@given(histories())
def test_an_alias_never_names_what_is_not_served(history):
    state = replay(history[0])
    served = {v.name for v in state.served}
    assert set(state.aliases.values()) <= served
    assert all(state.versions[v].stage == "production" for a, v in state.aliases.items() if "champion" in a)


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_what_somebody_built_on_is_not_undone_by_what_arrives_later(history, data):
    """A late event: decided on an old view, so its `seq` lies behind that of the newest event."""
    events, landed = history
    now = replay(events)
    top = max(e.seq for e in events.values())
    old = replay({n: events[n] for n in landed[: data.draw(st.integers(1, len(landed)))]})
    if old.seq + 1 >= top:
        return
    version = data.draw(st.sampled_from(VERSIONS))
    move = {"champion": {"old": old.aliases.get("champion"), "new": version.name}}
    late = event(old, "promote", versions=[version.name], moves=move)
    leader = ordered(events)[: ordered(events).index(_newest(events)) + 1]
    after = replay({**events, data.draw(st.sampled_from(["0-", "z-"])): late})
    assert [(e.name, e.rejected) for e in after.history][: len(leader)] == [
        (e.name, e.rejected) for e in now.history[: len(leader)]
    ]


def _newest(events: dict[str, Event]) -> str:
    return min(events, key=lambda n: (-events[n].seq, n))


def test_a_long_history_folds_without_recursion():
    events: dict[str, Event] = {}
    for i in range(3000):
        before = State({}, {}, [], "", seq=i, heads=[f"{i - 1:05d}"] if i else [])
        events[f"{i:05d}"] = event(before, "confirm")
    state = replay(events)
    assert state.heads == ["02999"]
    assert [e.name for e in state.history] == sorted(events)


def test_a_version_registered_before_0_2_is_read() -> None:
    old = VERSIONS[0].model_dump()
    old["verdict"] = old.pop("gate")
    assert Version.model_validate(old) == VERSIONS[0]
