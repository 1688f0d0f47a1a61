"""The vLLM engine over a stand-in that answers as vLLM did: requests, adapters, and a server that dies."""

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from feyntune.engine.api import (
    ContextLengthError,
    EngineDeadError,
    EngineSettings,
    EngineUnavailableError,
    InvalidAdapterError,
    NoFreeSlotError,
    NonFiniteError,
    QueueFullError,
    Sampling,
)
from feyntune.errors import UserError
from feyntune.serving.serve import _load_vllm
from tests.servers.fake_vllm import NAN, next_token

FAKE = [sys.executable, str(Path(__file__).parents[1] / "servers" / "fake_vllm.py")]
SETTINGS = EngineSettings(max_adapters=3, max_rank=8, batch_requests=4, batch_tokens=64, cache_tokens=256, queue=8)
PROMPT = [0, 20, 21]


@asynccontextmanager
async def running(base, settings=SETTINGS, adapters=None):
    engine, _, _ = _load_vllm(FAKE, [], base, "fp32", settings, None)
    engine.start()
    try:
        await collect(engine.submit(None, PROMPT, Sampling(1)))
        for name, folder in (adapters or {}).items():
            await engine.load_adapter(name, folder)
        yield engine
    finally:
        engine.stop()


async def collect(generation):
    return [token.id async for token in generation]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 90))


def expected(weights, tokens, vocabulary):
    context = list(PROMPT)
    for _ in range(tokens):
        context.append(next_token(weights, context, vocabulary))
    return context[len(PROMPT) :]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


def server_load(engine):
    client = httpx.Client(transport=httpx.HTTPTransport(uds=str(engine.process.socket)), base_url="http://vllm")
    return client.get("/load").json()["server_load"]


def test_requests_wait_here_and_every_one_gets_its_own(tiny_base, adapters):
    names = dict(list(adapters.items())[:2])

    async def many():
        async with running(tiny_base, replace(SETTINGS, queue=40), names) as engine:
            asked = [None, *names] * 4
            out = await asyncio.gather(*[collect(engine.submit(a, PROMPT, Sampling(9, logprobs=2))) for a in asked])
            return asked, out, engine.vocabulary, engine.load()

    asked, out, vocabulary, load = run(many())
    assert out[0] == expected("base", 9, vocabulary)
    assert len({tuple(o) for o in out}) == 3
    assert all(o == out[asked.index(a)] for a, o in zip(asked, out, strict=True))
    assert (load.running, load.waiting, load.adapters) == (0, 0, 2)


def test_log_probabilities_stop_tokens_and_scores(tiny_base):
    async def ask():
        async with running(tiny_base) as engine:
            first, second = expected("base", 2, engine.vocabulary)
            tokens = [t async for t in engine.submit(None, PROMPT, Sampling(9, logprobs=2, stop_token_ids=(second,)))]
            assert [t.id for t in tokens] == [first, second]
            assert tokens[0].logprob == -1.0
            assert tokens[0].top == ((first, -1.0), (5, -2.0))
            assert [t.logprob for t in await engine.score(None, PROMPT, 1)] == [None, -1.0, -1.0]
            with pytest.raises(ContextLengthError):
                engine.submit(None, PROMPT, Sampling(300))

    run(ask())


def test_what_is_cancelled_ends_at_vllm_too_and_a_full_queue_says_so(tiny_base):
    async def ask():
        async with running(tiny_base) as engine:
            generations = [engine.submit(None, PROMPT, Sampling(200, ignore_eos=True), "a") for _ in range(12)]
            with pytest.raises(QueueFullError):
                engine.submit(None, PROMPT, Sampling(1), "a")
            other = engine.submit(None, PROMPT, Sampling(1), "b")
            await until(lambda: server_load(engine) == 4)
            for generation in generations[1:]:
                engine.cancel(generation)
            assert await collect(other)  # before the first has ended
            assert engine.load().running <= 1
            engine.cancel(generations[0])
            await until(lambda: server_load(engine) == 0)

    run(ask())


def test_adapters_are_checked_kept_while_used_and_given_up_after(tiny_base, adapters, tmp_path):
    one, two, three, four = adapters.values()
    large = tmp_path / "large"
    large.mkdir()
    (large / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
    weights = load_file(one / "adapter_model.safetensors")
    save_file({n: t * 1e6 for n, t in weights.items()}, large / "adapter_model.safetensors")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_bytes((one / "adapter_config.json").read_bytes())
    moved = {n.replace("layers.1", "layers.9"): t for n, t in weights.items()}  # vLLM would leave them out silently
    save_file(moved, foreign / "adapter_model.safetensors")

    async def ask():
        async with running(tiny_base, adapters={"one": one, "two": two, "three": three}) as engine:
            with pytest.raises(NoFreeSlotError):
                await engine.load_adapter("four", four)
            generation = engine.submit("one", PROMPT, Sampling(60, ignore_eos=True))
            copy = engine.process.adapters / "one"
            engine.unload_adapter("one")
            assert copy.is_dir()
            assert len(await collect(generation)) == 60
            await until(lambda: not copy.exists() and not engine._tasks)
            with pytest.raises(KeyError):
                engine.submit("one", PROMPT, Sampling(1))
            for folder, why in ((large, "too large"), (foreign, "layers.9")):
                with pytest.raises(InvalidAdapterError, match=why):
                    await engine.load_adapter("bad", folder)
            await engine.load_adapter("four", four)
            with engine.hold("four"):
                engine.unload_adapter("four")
                assert await collect(engine.submit("four", PROMPT, Sampling(2)))
                await engine.load_adapter("four", four)  # wanted again before it was given up
            assert await collect(engine.submit("four", PROMPT, Sampling(2)))

    run(ask())


def test_a_killed_vllm_comes_back_with_its_adapters_and_what_waited_is_answered(tiny_base, adapters):
    one = next(iter(adapters.values()))

    async def ask():
        async with running(tiny_base, adapters={"one": one}) as engine:
            before = await collect(engine.submit("one", PROMPT, Sampling(5)))
            caught = [engine.submit("one", PROMPT, Sampling(200, ignore_eos=True)) for _ in range(4)]
            waiting = engine.submit("one", PROMPT, Sampling(5))
            for generation in caught:
                await anext(aiter(generation))  # one that nothing was answered to would be tried again
            os.killpg(engine.process.pid, signal.SIGKILL)
            for generation in caught:
                with pytest.raises(EngineUnavailableError):
                    await collect(generation)
            assert engine.alive()
            assert engine.unavailable
            assert await collect(waiting) == before
            assert engine.unavailable is None

    run(ask())


def test_numbers_that_are_not_finite_end_their_request_and_the_cache_that_holds_them(tiny_base, adapters):
    one = next(iter(adapters.values()))

    async def ask():
        async with running(tiny_base, adapters={"one": one}) as engine:
            pid = engine.process.pid
            neighbor = engine.submit(None, PROMPT, Sampling(100, ignore_eos=True))
            with pytest.raises(NonFiniteError):
                await collect(engine.submit("one", [*PROMPT, *NAN], Sampling(5)))
            late = engine.submit(None, PROMPT, Sampling(5))
            assert len(await collect(neighbor)) == 100
            assert len(await collect(late)) == 5
            assert engine.process.pid != pid
            with pytest.raises(NonFiniteError):
                await engine.score("one", [*PROMPT, *NAN], 0)

    run(ask())


def test_a_vllm_that_does_not_start_is_given_up(tiny_base, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")

    async def ask():
        engine, _, _ = _load_vllm(FAKE, [], tiny_base, "fp32", SETTINGS, None)
        engine.start()
        try:
            with pytest.raises(EngineDeadError, match="3 times"):
                await collect(engine.submit(None, PROMPT, Sampling(1)))
            assert not engine.alive()
            with pytest.raises(EngineDeadError):
                engine.submit(None, PROMPT, Sampling(1))
        finally:
            engine.stop()
        assert not engine.process.folder.exists()

    run(ask())


def test_a_missing_command_is_named(tiny_base):
    with pytest.raises(UserError, match="no-such-vllm"):
        _load_vllm(["no-such-vllm"], [], tiny_base, "fp32", SETTINGS, None)


def test_the_base_is_read_by_its_shapes_alone(tiny_base):
    engine, tokenizer, eos = _load_vllm(FAKE, [], tiny_base, "bf16", SETTINGS, None)
    assert engine._projections["model.layers.0.self_attn.q_proj"] == (64, 64)
    assert eos == [tokenizer.eos_token_id]
    assert engine.max_length == 255
    assert "--dtype=bfloat16" in engine.process.command
    assert "lm_head" not in engine.process.command
    assert torch.get_default_device().type == "cpu"
    engine.stop()
