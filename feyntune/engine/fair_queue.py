"""A queue that serves its owners in turn, so that nobody's requests stand behind all of somebody else's."""

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each owner; one of each owner after another."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}  # in the order of their turns; no deque is empty

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def count(self, owner: str) -> int:
        return len(self._waiting.get(owner, ()))

    def push(self, owner: str, item: T) -> None:
        self._waiting.setdefault(owner, deque()).append(item)

    def peek(self) -> T:
        """What `pop` gives next.

        Raises:
            IndexError: nothing waits.
        """
        for waiting in self._waiting.values():
            return waiting[0]
        raise IndexError("nothing waits")

    def pop(self) -> T:
        item = self.peek()
        owner = next(iter(self._waiting))
        waiting = self._waiting.pop(owner)
        waiting.popleft()
        if waiting:
            self._waiting[owner] = waiting  # the next turn is another's
        return item

    def discard(self, owner: str, item: T) -> None:
        """Take out an item that may be waiting."""
        waiting = self._waiting.get(owner)
        if waiting is None or item not in waiting:
            return
        waiting.remove(item)
        if not waiting:
            del self._waiting[owner]
