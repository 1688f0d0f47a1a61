"""The server as a process: what it follows, refuses, protects, and how it stops."""

import re
import shutil
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from feyntune.errors import UserError
from feyntune.registry.registry import Registry
from feyntune.serving.serve import serve
from tests.serving.conftest import free_port, gauge, serving, settles
from tests.serving.factories import register_adapter, seal_adapter
from tests.training.processes import wait_until

FAKE_VLLM = [sys.executable, str(Path(__file__).parents[1] / "servers" / "fake_vllm.py")]
SMALL = {"max_adapters": 4, "max_rank": 8, "batch_tokens": 64, "batch_requests": 16, "cache_tokens": 4096}


def complete(running, model, prompt="The soup needs", **body):
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **body}
    return httpx.post(f"{running.url}/openai/v1/completions", json=body, timeout=60)


def test_a_promotion_is_followed_under_load_and_a_bad_version_leaves_the_old_one(tiny_base, adapters, tmp_path):
    registry = Registry.open(str(tmp_path / "registry"))
    qkv, full, *_ = adapters
    register_adapter(registry, qkv, adapters[qkv])
    first = registry.promote(qkv)
    failed, answered, over = [], [], threading.Event()

    with serving(tmp_path / "registry", tiny_base, **SMALL) as running:

        def load():
            while not over.is_set():
                answer = complete(running, "champion", max_tokens=40, ignore_eos=True)
                (answered if answer.status_code == 200 else failed).append(answer.json())

        threads = [threading.Thread(target=load) for _ in range(3)]
        for t in threads:
            t.start()
        try:
            wait_until(lambda: answered)
            register_adapter(registry, full, adapters[full])
            second = registry.promote(full)
            running.wait(lambda d: d["adapters"].get("champion") == second.name, seconds=10)
            assert running.wait(lambda d: True)["adapters"]["previous"] == first.name

            foreign = seal_adapter(tmp_path / "foreign", tiny_base, full, base_digest="f" * 64, seed=9)
            wide = seal_adapter(tmp_path / "wide", tiny_base, full, rank=9, seed=10)
            damaged = seal_adapter(tmp_path / "damaged", tiny_base, full, rank=2, seed=11)
            pickled = seal_adapter(tmp_path / "pickled", tiny_base, full, extra="model.pkl", seed=12)
            for folder, why in ((foreign, "base"), (wide, "rank 9"), (damaged, "sha256"), (pickled, "pkl")):
                version = register_adapter(registry, full, folder)
                stored = tmp_path / "registry" / version.adapter
                if why == "sha256":
                    weights = stored / "adapter_model.safetensors"
                    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
                registry.promote(version.name)
                detail = running.wait(lambda d, name=version.name: name in d["refused"], seconds=10)
                assert why in detail["refused"][version.name]
                assert detail["ready"]
                assert detail["adapters"]["champion"] == second.name
                assert gauge(running, f'feyntune_adapter_refused{{version="{version.name}"}}') == 1
                registry.rollback()
            running.wait(lambda d: d["adapters"].get("champion") == second.name, seconds=10)
            registry.rollback()
            running.wait(lambda d: d["adapters"].get("champion") == first.name, seconds=10)
        finally:
            over.set()
            for t in threads:
                t.join()
        assert running.stop() == 0
    assert not failed
    assert {a["system_fingerprint"] for a in answered} == {first.digest[:16], second.digest[:16]}


def test_a_vllm_that_ends_is_started_again_and_readiness_says_so(tiny_base, registry):
    options = {**SMALL, "max_adapters": 6, "engine": "vllm", "vllm_command": FAKE_VLLM}
    with serving(registry.store.uri, tiny_base, **options) as running:
        body = {"model": "champion", "prompt": "The soup", "max_tokens": 8, "temperature": 0}
        answer = complete(running, **body)
        assert answer.headers["x-feyntune-version"] == registry.resolve("champion").name
        assert answer.json()["choices"][0]["text"] != complete(running, **body | {"model": "base"}).text
        assert running.wait()["engine"] == "running"
        [vllm] = psutil.Process(running.process.pid).children()
        vllm.kill()
        assert not running.wait(lambda d: not d["ready"], seconds=10)["ready"]
        assert httpx.get(f"{running.url}/v2/health/live").status_code == 200
        assert complete(running, **body).json()["choices"] == answer.json()["choices"]  # it waited
        running.wait(seconds=30)
        [vllm] = psutil.Process(running.process.pid).children()
        assert running.stop() == 0
        assert not vllm.is_running()


def test_sigterm_lets_running_requests_end(tiny_base, registry):
    with serving(registry.store.uri, tiny_base, **SMALL, linger_seconds=1.0) as running:
        client = openai.OpenAI(base_url=f"{running.url}/openai/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="champion", prompt="the", max_tokens=240, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [next(stream)]
        running.process.terminate()
        assert settles(lambda: httpx.get(f"{running.url}/v2/health/ready").status_code == 503)
        assert complete(running, "base").status_code == 200  # until every load balancer has noticed
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        running.process.join(30)
        assert running.process.exitcode == 0
        with pytest.raises(httpx.ConnectError):
            complete(running, "base")


def test_the_log_has_one_format(tiny_base, registry):
    with serving(registry.store.uri, tiny_base, **SMALL) as running:
        assert httpx.post(f"{running.url}/openai/v1/completions", content="no JSON").status_code == 415
        lines = running.output().splitlines()
    assert any("listening on http://127.0.0.1:" in line for line in lines)
    assert all(re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line) for line in lines), lines


def test_keys_are_asked_for_reread_and_never_logged(tiny_base, registry, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# team a\nfirst-secret\n")
    with serving(registry.store.uri, tiny_base, **SMALL, keys_file=str(keys)) as running:

        def status(key):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx.get(f"{running.url}/openai/v1/models", headers=headers).status_code

        assert [status(k) for k in (None, "wrong", "first-secret")] == [401, 401, 200]
        assert httpx.post(f"{running.url}/v1/models/base:predict", json={"instances": ["x"]}).status_code == 401
        for path in ("/metrics", "/v2/health/live", "/v2/health/ready"):
            assert httpx.get(running.url + path).status_code == 200
        denied = httpx.get(f"{running.url}/openai/v1/models")
        assert denied.json()["error"]["code"] == "invalid_api_key"
        assert denied.headers["www-authenticate"] == "Bearer"

        import asyncio

        import grpc
        from kserve import InferenceGRPCClient, InferInput, InferRequest

        async def by_grpc(headers):
            client = InferenceGRPCClient(f"127.0.0.1:{running.grpc_port}", timeout=60)
            tensor = InferInput("text", [1], "BYTES", data=["x"])
            return await client.infer(InferRequest("base", [tensor]), headers=headers)

        with pytest.raises(grpc.aio.AioRpcError) as e:
            asyncio.run(by_grpc(()))
        assert e.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert asyncio.run(by_grpc((("authorization", "Bearer first-secret"),)))

        keys.write_text("second-secret\n")
        assert [status(k) for k in ("first-secret", "second-secret")] == [401, 200]
        keys.unlink()
        assert status("second-secret") == 200
        running.stop()
        for secret in ("first-secret", "second-secret", "wrong"):
            assert secret not in running.output()


def test_a_full_queue_is_a_429_and_a_slow_answer_a_504(tiny_base, registry):
    small = {**SMALL, "batch_requests": 1, "queue": 2, "request_seconds": 1.0}
    with serving(registry.store.uri, tiny_base, **small) as running:
        answers = []

        def ask():
            answers.append(complete(running, "base", max_tokens=200, ignore_eos=True, n=2))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        busy = [a for a in answers if a.status_code == 429]
        assert busy
        assert {a.status_code for a in answers} <= {200, 429, 504}
        assert all(int(a.headers["retry-after"]) >= 1 for a in busy)
        assert busy[0].json()["error"]["type"] == "rate_limit_error"
        slow = httpx.post(
            f"{running.url}/openai/v1/completions",
            json={"model": "base", "prompt": ["the"] * 3, "max_tokens": 250, "ignore_eos": True},
            timeout=60,
        )
        assert slow.status_code in (200, 504)
        assert settles(lambda: gauge(running, "feyntune_running_requests") == 0)
        assert complete(running, "base").status_code == 200


def test_a_registry_that_is_away_or_empty_stops_nothing(tiny_base, adapters, tmp_path):
    registry = Registry.open(str(tmp_path / "registry"))
    with serving(tmp_path / "registry", tiny_base, **SMALL) as running:
        assert complete(running, "base").status_code == 200
        assert complete(running, "champion").status_code == 404
        name = next(iter(adapters))
        register_adapter(registry, name, adapters[name])
        registry.promote(name)
        running.wait(lambda d: "champion" in d["adapters"], seconds=10)
        shutil.move(tmp_path / "registry" / "events", tmp_path / "away")
        (tmp_path / "registry" / "events").mkdir()
        (tmp_path / "registry" / "events" / ("0000000001-" + "0" * 64 + ".json")).write_text("{")
        detail = running.wait(lambda d: d["registry_error"], seconds=10)
        assert detail["ready"]
        assert complete(running, "champion").status_code == 200
        shutil.rmtree(tmp_path / "registry" / "events")
        shutil.move(tmp_path / "away", tmp_path / "registry" / "events")
        running.wait(lambda d: not d["registry_error"], seconds=10)


def test_it_is_alive_but_not_ready_while_the_base_loads(tiny_base, registry, tmp_path):
    from tests.serving.conftest import Running

    running = Running(registry.store.uri, tiny_base, **SMALL)
    try:
        seen = set()
        until = time.monotonic() + 60
        while time.monotonic() < until and (200, 200) not in seen:
            try:
                live = httpx.get(f"{running.url}/v2/health/live").status_code
                seen.add((live, httpx.get(f"{running.url}/v2/health/ready").status_code))
                if seen == {(200, 503)}:
                    early = complete(running, "base")
            except httpx.TransportError:
                time.sleep(0.02)
        assert seen == {(200, 503), (200, 200)}
        assert early.status_code in (200, 503)
    finally:
        running.kill()


def test_a_given_template_makes_a_base_chat_and_pages_of_a_named_origin_may_ask(tiny_base, registry, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    origins = ["https://notebook.example"]
    options = {"chat_template": str(template), "cors_origins": origins, "keys_file": str(keys)}
    with serving(registry.store.uri, tiny_base, **SMALL, **options) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
        choice = client.chat.completions.create(
            model="champion", messages=[{"role": "user", "content": "The soup"}], max_tokens=4,
            logprobs=True, top_logprobs=2, temperature=0,
        ).choices[0]  # fmt: skip
        assert choice.message.content
        assert all(len(t.top_logprobs) == 2 for t in choice.logprobs.content)
        path = f"{running.url}/openai/v1/completions"
        for origin, allowed in ((origins[0], True), ("https://other.example", False)):
            preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = httpx.options(path, headers=preflight)
            assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
        denied = httpx.post(path, json={}, headers={"Origin": origins[0]})
        assert denied.status_code == 401  # and the page may read why
        assert denied.headers["access-control-allow-origin"] == origins[0]
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_rank": 0}, "max_rank"),
        ({"cache_tokens": 10}, "cache_tokens"),
        ({"batch_tokens": 4, "batch_requests": 8}, "batch_requests"),
        ({"canary_share": 1.5}, "canary_share"),
        ({"queue_seconds": 0}, "queue_seconds"),
        ({"chat_template": "nowhere.jinja"}, "Chat template nowhere.jinja"),
        ({"keys_file": "nowhere"}, "Keys file nowhere"),
        ({"base": "nowhere/at/all"}, "no such folder"),
    ],
)
def test_a_wrong_setting_ends_it_with_one_sentence(tiny_base, tmp_path, settings, message):
    arguments = {"base": tiny_base, "port": free_port(), "grpc_port": free_port(), **settings}
    with pytest.raises(UserError, match=message):
        serve(str(tmp_path), arguments.pop("base"), **arguments)


def test_a_port_that_is_taken_ends_it_with_one_sentence(tiny_base, tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="Port"):
        serve(str(tmp_path), tiny_base, port=taken.getsockname()[1])
