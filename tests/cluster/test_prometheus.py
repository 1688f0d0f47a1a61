"""The rules and every expression of the dashboard in a running Prometheus that scrapes a real training and endpoint."""

import contextlib
import itertools
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from feyntune.registry.registry import Registry
from feyntune.training.config import TrainConfig
from feyntune.training.train import train
from tests.cluster.charts import tool
from tests.cluster.test_rules import DASHBOARD, FOREIGN, RULES
from tests.serving.conftest import free_port, serving
from tests.serving.factories import register_adapter, seal_adapter

PROMETHEUS = tool("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus on PATH (Debian's package has one)"),
]
RANKS = {"hep-ph+gr-qc/lora-all": 8, "hep-th/lora-qkv": 2, "hep-th/lora-all": 4}  # too large, champion, canary


@pytest.fixture(scope="module")
def prometheus(tiny_base, tiny_split, tmp_path_factory) -> Iterator["Prometheus"]:
    """A Prometheus that has seen a training from its first step to its last, and an endpoint with traffic."""
    tmp = tmp_path_factory.mktemp("prometheus")
    registry = Registry.open(str(tmp / "registry"))
    for variant, rank in RANKS.items():
        register_adapter(registry, variant, seal_adapter(tmp / f"rank-{rank}", tiny_base, variant, rank=rank))
    registry.promote("hep-th/lora-qkv")
    training = free_port()
    with (
        serving(registry.store.uri, tiny_base, max_rank=4, canary_share=0.5) as endpoint,
        _page("\n".join(sorted(f"{s} 1" for s in FOREIGN)) + "\n") as foreign,
        _running(tmp, {"training": training, "serving": endpoint.port, "foreign": foreign}) as server,
    ):
        server.saw("serving", 2)  # it scrapes nothing in its first seconds, which is longer than a training takes
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEYNTUNE_METRICS_PORT", str(training))
            settings = TrainConfig(precision="fp32", epochs=12, learning_rate=0.003, save_every_steps=4)
            place = {"data": tiny_split, "mixture": "hep-th", "method": "lora-qkv", "base": tiny_base}
            until = time.monotonic() + 300
            for attempt in itertools.count():  # the machine may be too busy to be scraped, or faster than the scrapes
                out, saved = tmp / f"out-{attempt}", str(tmp / f"saved-{attempt}")
                thread = threading.Thread(
                    target=train, kwargs={**place, "out": out, "config": settings, "checkpoints": saved}
                )
                thread.start()
                asked = 0
                while thread.is_alive() or asked < 20:
                    body = {"model": ("champion", "base")[asked % 2], "prompt": "We", "max_tokens": 4}
                    httpx.post(f"{endpoint.url}/openai/v1/completions", json=body, timeout=60).raise_for_status()
                    asked += 1
                thread.join()
                assert (out / "manifest.json").exists(), "the training failed"
                if server.scrapes("training") >= 3:
                    break
                assert time.monotonic() < until, "no training was scraped"
        server.settled()
        yield server


class Prometheus:
    """Questions to a running Prometheus."""

    def __init__(self, url: str):
        self.url, self.since = url, time.time()

    def get(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def scrapes(self, job: str) -> int:
        """How often the job has answered."""
        series = self.get("query", query=f'sum_over_time(up{{job="{job}"}}[1h])')["result"]
        return int(series[0]["value"][1]) if series else 0

    def saw(self, job: str, times: int) -> None:
        """Wait until the job has answered that often."""
        until = time.monotonic() + 60
        while self.scrapes(job) < times:
            assert time.monotonic() < until, self.get("targets")
            time.sleep(0.2)

    def settled(self) -> None:
        """Wait until every rule has been evaluated on what is there."""
        until = time.monotonic() + 60
        while not all(r["lastEvaluation"] > "0002" for g in self.get("rules")["groups"] for r in g["rules"]):
            assert time.monotonic() < until, self.get("rules")
            time.sleep(0.2)
        time.sleep(2)

    def values(self, expression: str) -> list[float]:
        """All that the expression has been, at any second since the start, in any of its series; NaN left out."""
        data = self.get("query_range", query=expression, start=self.since, end=time.time(), step=1)
        values = [float(value) for series in data["result"] for _, value in series["values"]]
        return [v for v in values if v == v]


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


@pytest.mark.parametrize(("title", "expression"), expressions())
def test_a_panel_shows_what_was_measured(prometheus, title, expression):
    assert prometheus.values(expression.replace("$variant", ".*").replace("$namespace", ".*")), title


def test_an_expression_about_nothing_is_seen(prometheus):
    assert not prometheus.values("feyntune_train_los")


def test_every_rule_evaluates_without_error(prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for group in yaml.safe_load(RULES.read_text())["groups"])
    assert [(r["name"], r["health"], r.get("lastError")) for r in rules if r["health"] != "ok"] == []


def test_a_refused_adapter_raises_its_alert(prometheus):
    """The others need minutes of trouble, which promtool's clock gives them; this one is true from the start."""
    alerts = {a["labels"]["alertname"]: a for a in prometheus.get("alerts")["alerts"]}
    assert alerts["FeyntuneAdapterRefused"]["labels"]["version"].startswith("hep-ph+gr-qc/lora-all@")


def test_the_figures_are_those_of_the_training_and_the_traffic(prometheus):
    assert max(prometheus.values("feyntune_train_step")) <= max(prometheus.values("feyntune_train_steps"))
    adapters = {s["metric"]["adapter"] for s in prometheus.get("query", query="feyntune_requests_total")["result"]}
    assert "base" in adapters
    assert len(adapters) >= 2
    arms = {s["metric"]["arm"] for s in prometheus.get("query", query="feyntune_canary_requests_total")["result"]}
    assert arms == {"champion", "canary"}


@contextlib.contextmanager
def _running(tmp: Path, ports: dict[str, int]) -> Iterator[Prometheus]:
    """Scraped every half second, rules evaluated as often; the labels are those the operator gives."""
    (tmp / "rules.yaml").write_text(RULES.read_text().replace("interval: 30s", "interval: 500ms"))
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"],
         "labels": {"namespace": "n", "pod": "p"}}]} for job, port in ports.items()
    ]  # fmt: skip
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(tmp / "rules.yaml")],
        "scrape_configs": jobs,
    }
    (tmp / "prometheus.yaml").write_text(json.dumps(config))
    port = free_port()
    command = [PROMETHEUS, f"--config.file={tmp / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp / 'data'}",
               f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
    with (tmp / "log").open("w") as log:
        process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/-/ready").status_code == 200:
                        break
                assert process.poll() is None, (tmp / "log").read_text()
                assert time.monotonic() < until, (tmp / "log").read_text()
                time.sleep(0.1)
            yield Prometheus(url)
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def _page(text: str) -> Iterator[int]:
    """What others than this project measure, on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
