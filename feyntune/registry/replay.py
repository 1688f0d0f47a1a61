"""From events to the state of the registry: a pure function, the same for every reader of the same events."""

from typing import Any

from feyntune.registry.models import CHAMPION, KINDS, PREVIOUS, Entry, Event, State, Version


def replay(events: dict[str, Event], revision: str = "") -> State:
    """The state that `events` add up to: the same for everybody who has read the same events.

    They take effect in the order of `ordered`. A decision whose grounds no longer hold is rejected: a promotion or
    rollback of an alias that is not where its writer saw it, a promotion of a version that failed the gate or
    is archived, an archiving of a champion.
    """
    versions: dict[str, Version] = {}
    stacks: dict[str, list[str]] = {}  # alias -> versions that held it, the holder last
    history = []
    for name in ordered(events):
        event = events[name]
        rejected = _rejection(event, versions, stacks)
        history.append(Entry(name=name, event=event, rejected=rejected))
        if rejected is None:
            _apply(event, versions, stacks)
    aliases = {}
    for alias in sorted(stacks):
        if stacks[alias]:
            aliases[alias] = stacks[alias][-1]
            before = _before(stacks[alias], versions)
            if before is not None:
                aliases[alias.replace(CHAMPION, PREVIOUS)] = before
    return State(
        versions=versions,
        aliases=aliases,
        history=history,
        revision=revision,
        seq=max((e.seq for e in events.values()), default=0),
        heads=sorted(events.keys() - {p for e in events.values() for p in e.parents}),
    )


def ordered(events: dict[str, Event]) -> list[str]:
    """Names of `events`, each after all it had seen; among unconnected ones those of conditional writes go first,
    then the higher `seq`, then the smaller name.

    Conditional events are a chain, one for each `seq`, so nothing that arrives later comes before one of them.

    So an event that arrives late (decided long ago, `seq` behind the others) takes its place after everything
    decided meanwhile and can undo none of it.
    """
    order: dict[str, None] = {}
    first = lambda names: sorted(names, key=lambda n: ("-" in n, -events[n].seq, n), reverse=True)  # taken from the end
    waiting = first(events)
    while waiting:
        name = waiting.pop()
        unseen = [p for p in events[name].parents if p not in order]
        if unseen and name not in order:
            waiting += [name, *first(unseen)]
        else:
            order[name] = None
    return list(order)


def diff(a: Version, b: Version) -> dict[str, tuple[Any, Any]]:
    """The fields in which two versions differ, as `lineage.corpus: (value of a, value of b)`."""
    left, right = _flat(a.model_dump()), _flat(b.model_dump())
    return {k: (left.get(k), right.get(k)) for k in left | right if left.get(k) != right.get(k)}


def _rejection(event: Event, versions: dict[str, Version], stacks: dict[str, list[str]]) -> str | None:
    """Why `event` has no effect, or None."""
    if event.kind not in KINDS:
        return f"{event.kind!r} is a decision of a newer version of feyntune"
    for name in event.versions:
        if name not in versions:
            return f"{name} is not registered"
        version = versions[name]
        if event.kind == "promote" and version.stage == "archived":
            return f"{name} is archived"
        if event.kind == "promote" and not version.gate.passed:
            return f"{name} did not pass the gate"
        held = [alias for alias, stack in stacks.items() if stack[-1:] == [name]]
        if event.kind == "archive" and held:
            return f"{name} is {held[0]}"
        if event.kind == "rollback" and not event.moves.keys() >= set(held):
            return f"{name} had become {' and '.join(sorted(set(held) - event.moves.keys()))} by then"
    for alias, move in event.moves.items():
        stack = stacks.get(alias, [])
        holder = stack[-1] if stack else None
        if holder != move.old:
            return f"{alias} was {holder or 'nobody'} by then, not {move.old or 'nobody'}"
        if event.kind == "promote" and move.new not in event.versions:
            return f"{alias} would go to a version that is not promoted"
        if event.kind == "rollback" and move.new != _before(stack, versions):
            return f"the version before {holder} was no longer {move.new or 'nobody'}"
    return None


def _apply(event: Event, versions: dict[str, Version], stacks: dict[str, list[str]]) -> None:
    def update(name: str, **fields: Any) -> None:
        versions[name] = versions[name].model_copy(update=fields)

    for new in event.add:
        existing = versions.get(new.name)
        keep = {"stage": "candidate", "added": event.time, "promoted": ""}
        if existing:
            keep = {"stage": existing.stage, "added": existing.added, "promoted": existing.promoted}
        versions[new.name] = new.model_copy(update=keep)
        if versions[new.name].stage in ("candidate", "staging"):
            update(new.name, stage="staging" if new.gate.passed else "candidate")
    for name in event.versions:
        version = versions[name]
        if event.kind == "promote":
            update(name, stage="production", promoted=version.promoted or event.time)
        elif event.kind == "archive":
            update(name, stage="archived")
        elif event.kind == "rollback" or (event.kind == "restore" and version.stage == "archived"):
            update(name, stage="staging" if version.gate.passed else "candidate")
    for alias, move in event.moves.items():
        stack = stacks.setdefault(alias, [])
        if event.kind == "promote" and move.new is not None:
            stack.append(move.new)
        elif event.kind == "rollback":
            while stack and stack[-1] != move.new:
                stack.pop()
            if move.new is not None:
                update(move.new, stage="production")


def _before(stack: list[str], versions: dict[str, Version]) -> str | None:
    """Who held an alias before its holder: the last one that is another version and not archived."""
    for name in reversed(stack[:-1]):
        if name != stack[-1] and versions[name].stage != "archived":
            return name
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
