"""The whole API from its own OpenAPI description: whatever is sent, no 5xx, no hang, and the server keeps answering."""

import asyncio
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from feyntune.engine.api import EngineSettings, InvalidAdapterError, Sampling
from feyntune.engine.batching import BatchingEngine
from feyntune.engine.lora import projections, read_adapter
from feyntune.model.load import load_base
from tests.serving.conftest import gauge, settles
from tests.serving.factories import save_adapter
from tests.serving.hostile import bodies, configs, hostile_adapters, hostile_bodies, kserve_bodies, weight_changes

# The same cases each time, so that a red CI is somebody's change; FEYNTUNE_FUZZ=1000 draws so many new ones.
EXAMPLES = settings(
    max_examples=int(os.environ.get("FEYNTUNE_FUZZ", "25")),
    deadline=None,
    database=None,
    derandomize="FEYNTUNE_FUZZ" not in os.environ,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_nothing_that_is_sent_makes_a_server_error(endpoint):
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    asked = set()
    for operation in schema.get_all_operations():
        asked.add(operation.ok().label)

        @EXAMPLES
        @given(case=operation.ok().as_strategy())
        def ask(case):
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text

        ask()
    assert {"POST /openai/v1/completions", "POST /v2/models/{model_name}/infer"} <= asked


@pytest.mark.slow
def test_after_all_of_it_the_server_answers_and_holds_nothing(endpoint):
    assert settles(lambda: gauge(endpoint, "feyntune_running_requests") == 0)
    assert gauge(endpoint, "feyntune_waiting_requests") == 0
    assert httpx.get(f"{endpoint.url}/v2/health/ready").status_code == 200
    body = {"model": "champion", "prompt": "The soup", "max_tokens": 3}
    assert httpx.post(f"{endpoint.url}/openai/v1/completions", json=body, timeout=60).status_code == 200


@pytest.mark.slow
def test_what_is_hostile_is_refused_and_liveness_answers_throughout(endpoint):
    over = threading.Event()
    slowest = []

    def watch():
        with httpx.Client(base_url=endpoint.url, timeout=30) as client:
            while not over.is_set():
                asked = time.monotonic()
                assert client.get("/v2/health/live").status_code == 200
                slowest.append(time.monotonic() - asked)
                time.sleep(0.02)

    def post(path, content):
        return httpx.post(
            endpoint.url + path, content=content, headers={"content-type": "application/json"}, timeout=60
        )

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for path, content in hostile_bodies():
            answer = post(path, content)
            assert 400 <= answer.status_code < 500, (content[:80], answer.text)

        @EXAMPLES
        @given(bodies, st.sampled_from(["/openai/v1/completions", "/v1/chat/completions", "/tokenize"]))
        def ask(body, path):
            answer = post(path, json.dumps(body))
            assert answer.status_code < 500, answer.text

        @EXAMPLES
        @given(kserve_bodies)
        def ask_kserve(asked):
            path, body = asked
            answer = post(path, json.dumps(body))
            assert answer.status_code < 500, (body, answer.text)

        ask()
        ask_kserve()
    finally:
        over.set()
        watcher.join()
    assert slowest


@EXAMPLES
@given(config=configs, change=weight_changes())
def test_a_hostile_adapter_is_read_or_refused_and_nothing_else(plain_adapter, config, change):
    folder, layers = plain_adapter
    with tempfile.TemporaryDirectory() as tmp:
        weights = change(load_file(folder / "adapter_model.safetensors"))
        settings = json.loads((folder / "adapter_config.json").read_text()) | config
        (Path(tmp) / "adapter_config.json").write_text(json.dumps(settings))
        save_file(weights, Path(tmp) / "adapter_model.safetensors")
        try:
            read = read_adapter(Path(tmp), layers, 8)
        except InvalidAdapterError:
            return
        assert all(torch.isfinite(a).all() and torch.isfinite(b).all() for a, b in read.values())


def test_no_hostile_adapter_can_be_served(tiny_base, tmp_path):
    async def load_all():
        engine = BatchingEngine(
            load_base(tiny_base, "fp32", "cpu", attention="sdpa"), [1], EngineSettings(max_adapters=2)
        )
        engine.start()
        try:
            for variant, folder in hostile_adapters(tmp_path / "hostile", tiny_base).items():
                with pytest.raises(InvalidAdapterError):
                    await engine.load_adapter(variant, folder)
                assert [t async for t in engine.submit(None, [1, 2], Sampling(2, ignore_eos=True))]
        finally:
            engine.stop()

    asyncio.run(load_all())


@pytest.fixture(scope="module")
def plain_adapter(tiny_base, tmp_path_factory):
    model = load_base(tiny_base, "fp32", "cpu", attention="sdpa")
    return save_adapter(tmp_path_factory.mktemp("plain"), tiny_base, rank=4, seed=1), projections(model)
