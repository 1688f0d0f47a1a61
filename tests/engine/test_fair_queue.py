"""Owners are served in turn, each in the order of its own requests."""

from hypothesis import given
from hypothesis import strategies as st

from feyntune.engine.fair_queue import FairQueue


def test_one_of_each_owner_after_another():
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert queue.peek() == "a1"
    assert [queue.pop() for _ in range(len(queue))] == ["a1", "b1", "c1", "a2", "b2", "a3"]


@given(st.lists(st.tuples(st.sampled_from(["push", "pop", "discard"]), st.sampled_from("abc"))))
def test_nothing_is_lost_and_no_owner_is_overtaken_twice(steps):
    queue: FairQueue[tuple[str, int]] = FairQueue()
    waiting: list[tuple[str, int]] = []
    overtaken = dict.fromkeys("abc", 0)  # by another owner's second request, since the owner began to wait
    served: list[str] = []
    for n, (step, owner) in enumerate(steps):
        if step == "push":
            queue.push(owner, (owner, n))
            waiting.append((owner, n))
        elif step == "pop" and waiting:
            item = queue.pop()
            assert item == next(w for w in waiting if w[0] == item[0])  # its owner's oldest
            waiting.remove(item)
            served.append(item[0])
            overtaken[item[0]] = 0
            for other in {w[0] for w in waiting} - {item[0]}:
                overtaken[other] += 1
        elif step == "discard" and queue.count(owner):
            item = next(w for w in waiting if w[0] == owner)
            queue.discard(owner, item)
            waiting.remove(item)
        overtaken |= {o: 0 for o in "abc" if not queue.count(o)}
        assert len(queue) == len(waiting)
        assert max(overtaken.values()) <= 2  # each of the two others once
    queue.discard("nobody", ("nobody", 0))
