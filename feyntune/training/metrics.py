"""Prometheus metrics of a running training. An error in them is logged and never fails the run.

FEYNTUNE_METRICS_PORT: the port on which the first process serves /metrics; none is served without it.
FEYNTUNE_PUSHGATEWAY: an address that gets the end-of-run stats once, since a finished pod cannot be scraped.
"""

import os
import time
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIServer

import torch
from prometheus_client import CollectorRegistry, Gauge, push_to_gateway, start_http_server

from feyntune.telemetry import log

_LIVE = {
    "step": "Steps done",
    "steps": "Steps in all",
    "loss": "Loss of the last step, nats a token",
    "learning_rate": "Learning rate of the last step",
    "tokens": "Tokens trained on, padding not counted",
    "tokens_per_second": "Tokens trained on a second of stepping",
    "validation_perplexity": "Perplexity a token of the validation papers",
    "gpu_memory_bytes": "GPU memory allocated now",
    "checkpoint_age_seconds": "Age of the newest checkpoint known to be undamaged",
}
_FINAL = ("seconds", "train_tokens", "tokens_per_second", "peak_memory_bytes", "steps", "interruptions")


class Metrics:
    """The gauges `feyntune_train_…` of one training, labeled with its variant."""

    def __init__(self, variant: str, enabled: bool):
        self.variant, self.enabled = variant, enabled
        self.server: WSGIServer | None = None
        self.registry = CollectorRegistry()
        self.gauges = {
            name: Gauge(f"feyntune_train_{name}", help, ["variant"], registry=self.registry).labels(variant)
            for name, help in _LIVE.items()
        }
        port = os.environ.get("FEYNTUNE_METRICS_PORT")
        if enabled and port:
            self._try(lambda: self._serve(int(port)), f"metrics are not served on port {port}")

    def stepped(
        self, step: int, total: int, loss: float, rate: float, tokens: int, seconds: float, checkpointer: Any
    ) -> None:
        """Called after every step. `checkpointer` is the training's Checkpointer, or None."""
        if not self.enabled:
            return
        values = {"step": step, "steps": total, "loss": loss, "learning_rate": rate, "tokens": tokens}
        values["tokens_per_second"] = tokens / max(seconds, 1e-9)
        if torch.cuda.is_available():
            values["gpu_memory_bytes"] = torch.cuda.memory_allocated()
        if checkpointer is not None and checkpointer.saved_at is not None:
            values["checkpoint_age_seconds"] = time.monotonic() - checkpointer.saved_at
        for name, value in values.items():
            self.gauges[name].set(value)

    def validated(self, perplexity: float | None) -> None:
        if self.enabled and perplexity is not None:
            self.gauges["validation_perplexity"].set(perplexity)

    def finished(self, stats: dict[str, Any]) -> None:
        """Push the end-of-run stats, if a gateway is set, and stop serving."""
        gateway = os.environ.get("FEYNTUNE_PUSHGATEWAY")
        if self.enabled and gateway:
            self._try(lambda: self._push(gateway, stats), f"the stats were not pushed to {gateway}")
        self.close()

    def close(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    def _serve(self, port: int) -> None:
        self.server, _ = start_http_server(port, registry=self.registry)

    def _push(self, gateway: str, stats: dict[str, Any]) -> None:
        registry = CollectorRegistry()
        for name in _FINAL:
            Gauge(f"feyntune_train_final_{name}", f"At the end: {name}", registry=registry).set(stats[name])
        push_to_gateway(gateway, "feyntune-train", registry, {"variant": self.variant}, timeout=10)

    def _try(self, action: Callable[[], None], message: str) -> None:
        try:
            action()
        except Exception as e:  # training continues, whatever a metrics system does
            log.warning("%s: %s", message, e)
