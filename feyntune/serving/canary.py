"""A share of the champion's requests goes to a candidate, until too many of them fail.

The candidate is the newest version in staging: it passed the gate and waits for promotion. It loses its share for good
when its failures are significantly more frequent than the champion's, and a new candidate starts afresh. Each replica
counts its own requests.

The test looks after 32, 64, 128, ... requests of the candidate. Look k compares the failures of both arms by Fisher's
exact test, one-sided, at the level ERROR_RATE / (k (k + 1)). The levels add up to ERROR_RATE, so a candidate that fails
no more often than the champion is backed off in at most that share of rollouts, however long they last.
"""

import math
import random
from dataclasses import dataclass, field

from feyntune.serving import metrics
from feyntune.serving.source import ServedVersion
from feyntune.telemetry import log

ERROR_RATE = 0.01
FIRST_LOOK = 32  # requests of the candidate


@dataclass
class Canary:
    """Call `route` for each of the champion's requests and `record` when it has ended.

    Args:
        share: of the requests that goes to the candidate, 0 to 1.
    """

    share: float
    candidate: ServedVersion | None = None
    backed_off: str | None = None  # the version that lost its share
    counts: dict[str, list[int]] = field(default_factory=dict)  # arm -> [requests, failures]
    looks: int = 0

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.counts, self.looks = {"champion": [0, 0], "canary": [0, 0]}, 0

    def set_candidate(self, candidate: ServedVersion | None) -> None:
        """Let `candidate` take part; None, or one that lost its share before, does not."""
        if candidate is not None and candidate.name == self.backed_off:
            candidate = None
        if candidate is not None and candidate.name != self.backed_off:
            metrics.CANARY_BACKED_OFF.clear()
        if candidate != self.candidate:
            self._reset()
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
        self.counts[arm][0] += 1
        self.counts[arm][1] += failed
        requests, failures = self.counts["canary"]
        if arm != "canary" or requests < FIRST_LOOK * 2**self.looks:
            return
        self.looks += 1
        champion_requests, champion_failures = self.counts["champion"]
        p = p_value(requests, failures, champion_requests, champion_failures)
        if p <= ERROR_RATE / (self.looks * (self.looks + 1)):
            log.error(
                "canary %s failed %d of %d requests, the champion %d of %d (p = %.2g): it gets no more requests",
                self.candidate.name, failures, requests, champion_failures, champion_requests, p,
            )  # fmt: skip
            metrics.CANARY_BACKED_OFF.clear()
            metrics.CANARY_BACKED_OFF.labels(self.candidate.name).set(1)
            self.backed_off = self.candidate.name
            self.set_candidate(None)


def p_value(requests: int, failures: int, other_requests: int, other_failures: int) -> float:
    """Fisher's exact test: how likely at least `failures` of all failures fall on these `requests` by chance.

    By logarithms, and no further than terms count: this runs on the event loop, and the binomial coefficients of
    some ten thousand requests take minutes to multiply.
    """
    total, failed = requests + other_requests, failures + other_failures
    fewest, most = max(failures, requests - (total - failed)), min(requests, failed)
    ways = lambda n, k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    p = 0.0
    for k in range(fewest, most + 1):
        term = math.exp(ways(failed, k) + ways(total - failed, requests - k) - ways(total, requests))
        p += term
        if term < p * 1e-17:  # terms rise to the most likely number of failures, then fall
            break
    return min(1.0, p)
