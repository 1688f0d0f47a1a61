"""A share of the champion's requests goes to a candidate, until too many of them fail.

The candidate is the newest version in staging: it passed the gate and waits for promotion. Both arms are counted,
so that they can be compared; the candidate loses its share for good when its failures are more than chance
explains, and a new candidate starts afresh.
"""

import random
from dataclasses import dataclass, field

from feyntune.serving import metrics
from feyntune.serving.source import Offered
from feyntune.telemetry import log


@dataclass
class Canary:
    """Call `draw` for each of the champion's requests and `count` when it has ended.

    Args:
        share: of the requests that goes to the candidate, 0 to 1.
        allowed: the candidate may fail this much more often than the champion, as a share of its requests.
        least: requests seen before it is judged.
    """

    share: float
    allowed: float = 0.05
    least: int = 20
    chosen: Offered | None = None
    backed_off: str | None = None  # the version that lost its share
    seen: dict[str, list[int]] = field(default_factory=lambda: {"champion": [0, 0], "canary": [0, 0]})

    def choose(self, candidate: Offered | None) -> None:
        """Let `candidate` take part; None, or one that lost its share before, does not."""
        if candidate is not None and candidate.name == self.backed_off:
            candidate = None
        if candidate != self.chosen:
            self.seen = {"champion": [0, 0], "canary": [0, 0]}
        self.chosen = candidate
        metrics.CANARY_SHARE.set(self.share if candidate else 0)

    def draw(self, champion: Offered) -> tuple[str, Offered]:
        if self.chosen is not None and random.random() < self.share:
            return "canary", self.chosen
        return "champion", champion

    def count(self, arm: str, version: Offered, failed: bool) -> None:
        """`failed`: the server's fault (an error or a time-out), not the client's."""
        metrics.CANARY.labels(arm, "failed" if failed else "ok").inc()
        if self.chosen is None or (arm == "canary" and version != self.chosen):
            return
        self.seen[arm][0] += 1
        self.seen[arm][1] += failed
        requests, failures = self.seen["canary"]
        others, their_failures = self.seen["champion"]
        if requests < self.least:
            return
        if failures / requests > their_failures / max(others, 1) + self.allowed:
            log.error(
                "canary %s failed %d of %d requests, the champion %d of %d: it gets no more",
                self.chosen.name, failures, requests, their_failures, others,
            )  # fmt: skip
            self.backed_off = self.chosen.name
            self.choose(None)
