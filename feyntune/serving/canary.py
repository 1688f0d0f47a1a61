"""A share of the champion's requests goes to a candidate, until too many of them fail.

The candidate is the newest version in staging: it passed the gate and waits for promotion. Both arms are counted,
so that they can be compared; the candidate loses its share for good when its failures are more than chance
explains, and a new candidate starts afresh.
"""

import random
from dataclasses import dataclass, field

from feyntune.serving import metrics
from feyntune.serving.source import ServedVersion
from feyntune.telemetry import log


@dataclass
class Canary:
    """Call `route` for each of the champion's requests and `record` when it has ended.

    Args:
        share: of the requests that goes to the candidate, 0 to 1.
        max_excess_failure_rate: how much more often than the champion the candidate may fail, 0 to 1.
        min_requests: requests seen before it is judged.
    """

    share: float
    max_excess_failure_rate: float = 0.05
    min_requests: int = 20
    candidate: ServedVersion | None = None
    backed_off: str | None = None  # the version that lost its share
    seen: dict[str, list[int]] = field(default_factory=lambda: {"champion": [0, 0], "canary": [0, 0]})

    def set_candidate(self, candidate: ServedVersion | None) -> None:
        """Let `candidate` take part; None, or one that lost its share before, does not."""
        if candidate is not None and candidate.name == self.backed_off:
            candidate = None
        if candidate != self.candidate:
            self.seen = {"champion": [0, 0], "canary": [0, 0]}
        self.candidate = candidate
        metrics.CANARY_SHARE.set(self.share if candidate else 0)

    def route(self, champion: ServedVersion) -> tuple[str, ServedVersion]:
        if self.candidate is not None and random.random() < self.share:
            return "canary", self.candidate
        return "champion", champion

    def record(self, arm: str, version: ServedVersion, failed: bool) -> None:
        """`failed`: the server's fault (an error or a time-out), not the client's."""
        metrics.CANARY.labels(arm, "failed" if failed else "ok").inc()
        if self.candidate is None or (arm == "canary" and version != self.candidate):
            return
        self.seen[arm][0] += 1
        self.seen[arm][1] += failed
        requests, failures = self.seen["canary"]
        others, their_failures = self.seen["champion"]
        if requests < self.min_requests:
            return
        if failures / requests > their_failures / max(others, 1) + self.max_excess_failure_rate:
            log.error(
                "canary %s failed %d of %d requests, the champion %d of %d: it gets no more",
                self.candidate.name, failures, requests, their_failures, others,
            )  # fmt: skip
            self.backed_off = self.candidate.name
            self.set_candidate(None)
