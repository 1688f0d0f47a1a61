import http.server
import socket
import threading
import urllib.request

import pytest

from feyntune.training.metrics import Metrics
from feyntune.training.train import train

FACTS = {"seconds": 2.0, "train_tokens": 9, "tokens_per_second": 4.5, "peak_memory_bytes": 1, "steps": 3}
FACTS["interruptions"] = 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_gauges_are_served_while_it_trains(monkeypatch):
    port = free_port()
    monkeypatch.setenv("FEYNTUNE_METRICS_PORT", str(port))
    metrics = Metrics("hep-th/lora-all", enabled=True)
    metrics.stepped(3, 12, 2.5, 1e-4, 900, 2.0, None)
    metrics.validated(7.0)
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    metrics.close()
    for line in ("loss", "step", "tokens_per_second", "validation_perplexity"):
        assert f'feyntune_train_{line}{{variant="hep-th/lora-all"}}' in page
    assert 'tokens_per_second{variant="hep-th/lora-all"} 450.0' in page


def test_the_facts_are_pushed_once_at_the_end(monkeypatch):
    got = []

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_PUT(self):
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FEYNTUNE_PUSHGATEWAY", f"http://127.0.0.1:{server.server_port}")
    Metrics("hep-th/lora-all", enabled=True).finished(FACTS)
    Metrics("hep-th/lora-all", enabled=False).finished(FACTS)
    server.shutdown()
    server.server_close()
    assert len(got) == 1
    assert "feyntune_train_final_train_tokens 9.0" in got[0][1]


@pytest.mark.timeout(120)
def test_trouble_with_metrics_never_fails_a_run(job, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        monkeypatch.setenv("FEYNTUNE_METRICS_PORT", str(taken.getsockname()[1]))
        monkeypatch.setenv("FEYNTUNE_PUSHGATEWAY", f"http://127.0.0.1:{free_port()}")
        assert train(**job(max_steps=1)).kind == "adapter"
    monkeypatch.setenv("FEYNTUNE_METRICS_PORT", "not a port")
    Metrics("hep-th/lora-all", enabled=True)
