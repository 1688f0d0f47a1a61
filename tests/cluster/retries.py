"""When Argo starts an ended step again: processNodeRetries of workflow/controller/operator.go (4.0)."""

from typing import Any, NamedTuple

STOCK = {"limit": "2", "retryPolicy": "OnError"}  # of Kubeflow's controller in 2.16 and 2.17
FITTING = {"limit": "0", "retryPolicy": "Always"}  # manifests/prerequisites/pipelines


class Attempt(NamedTuple):
    started: float  # seconds
    finished: float
    phase: str  # Failed: its container ended badly (a crash, the OOM killer, an eviction). Error: its pod was deleted.


class Strategy(NamedTuple):
    limit: int
    policy: str
    duration: float = 0.0  # seconds
    factor: float = 1.0
    max_duration: float | None = None


def strategy_of(task: dict[str, Any], default: dict[str, Any]) -> Strategy:
    """What Kubeflow writes of a task's policy (limit and backoff, no policy) over the controller's default."""
    limit, policy = int(default["limit"]), default["retryPolicy"]
    stated = task.get("retryPolicy")
    if not stated:
        return Strategy(limit, policy)
    seconds = {key: float(stated[key].removesuffix("s")) for key in ("backoffDuration", "backoffMaxDuration")}
    return Strategy(
        stated["maxRetryCount"],
        policy,
        seconds["backoffDuration"],
        stated["backoffFactor"],
        seconds["backoffMaxDuration"],
    )


def next_start(strategy: Strategy, attempts: list[Attempt]) -> tuple[float, str]:
    """When the next attempt starts, or why there is none.

    The time limit counts from the start of the first attempt, however long that one ran.
    """
    last = attempts[-1]
    left = len(attempts) <= strategy.limit
    start = last.finished + (strategy.duration * strategy.factor ** (len(attempts) - 1) if left else 0)
    if start > deadline(strategy, attempts):
        return 0.0, "Max duration limit exceeded"
    retried = {"Always": ("Failed", "Error"), "OnFailure": ("Failed",), "OnError": ("Error",)}[strategy.policy]
    if last.phase not in retried:
        return 0.0, f"Node not set to be retried after status: {last.phase}"
    if not left:
        return 0.0, "No more retries left"
    return start, ""


def deadline(strategy: Strategy, attempts: list[Attempt]) -> float:
    """When the pod of a retry is ended and no other is started; infinite for the first attempt and without a limit."""
    if not attempts or strategy.max_duration is None:
        return float("inf")
    return attempts[0].started + strategy.max_duration
