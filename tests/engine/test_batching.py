"""The engine against transformers and PEFT run alone, and each trap that would mix adapters or stop its thread."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from feyntune.engine.api import (
    ContextLengthError,
    EngineDeadError,
    EngineSettings,
    InvalidAdapterError,
    NoFreeSlotError,
    NonFiniteError,
    QueueFullError,
    Sampling,
)
from feyntune.engine.batching import BatchingEngine
from feyntune.engine.lora import install, projections, read_adapter
from feyntune.engine.sampling import adjust, draw
from feyntune.model.load import load_base, prompt
from tests.serving.factories import save_adapter

SMALL = EngineSettings(max_adapters=6, max_rank=8, batch_tokens=64, batch_requests=16, cache_tokens=2048, queue=64)
TEXTS = [
    "The soup needs",
    "A loaf has a good smell. Our oven",
    "the",
    "A wormhole hides 7 apples and",
    "x" * 120,
]


@asynccontextmanager
async def running(base, adapters=(), settings=SMALL, **options):
    """An engine with `adapters` loaded under their variants' names."""
    model = load_base(base, "fp32", "cpu", attention="sdpa")
    engine = BatchingEngine(model, [model.config.eos_token_id], settings, **options)
    engine.start()
    try:
        for name, folder in dict(adapters).items():
            await engine.load_adapter(name, folder)
        yield engine
    finally:
        engine.stop()


async def collect(generation):
    return [token async for token in generation]


async def ids(generation):
    return [token.id async for token in generation]


def greedy(tokens=24, **options):
    return Sampling(max_tokens=tokens, **options)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_a_mixed_batch_gives_every_request_what_it_gets_alone(tiny_base, adapters, alone, tokenizer):
    requests = [(variant, prompt(tokenizer, text)) for variant in (None, *adapters) for text in TEXTS]

    async def mixed():
        largest = []
        async with running(tiny_base, adapters, on_step=largest.append) as engine:
            out = await asyncio.gather(*[ids(engine.submit(v, p, greedy())) for v, p in requests])
        return out, max(largest)

    out, largest = run(mixed())
    assert largest > 8
    assert out == [alone(v, p, 24) for v, p in requests]
    assert len({tuple(o) for (v, p), o in zip(requests, out, strict=True) if p == requests[0][1]}) == 5


def test_requests_join_a_running_batch_and_leave_it_without_touching_the_others(tiny_base, adapters, alone, tokenizer):
    names = [None, *adapters]
    prompts = [prompt(tokenizer, t) for t in TEXTS]
    requests = [(names[i % 5], prompts[(i * 3) % 5], 5 + (i * 7) % 30) for i in range(30)]

    async def staggered():
        async with running(tiny_base, adapters) as engine:

            async def late(i, variant, ids_, tokens):
                await asyncio.sleep(0.01 * i)
                generation = engine.submit(variant, ids_, greedy(tokens))
                if i % 4 == 3:
                    async for _ in generation:
                        break
                    engine.cancel(generation)
                    return None
                return await ids(generation)

            return await asyncio.gather(*[late(i, *r) for i, r in enumerate(requests)])

    for (variant, ids_, tokens), out in zip(requests, run(staggered()), strict=True):
        assert out is None or out == alone(variant, ids_, tokens)


def test_the_same_prompt_under_every_adapter_shares_no_keys_and_values(tiny_base, adapters, alone, tokenizer):
    ids_ = prompt(tokenizer, "The soup has a good smell. Our oven needs bread and butter. " * 6)
    assert len(ids_) > 60

    async def one_after_another_and_together():
        async with running(tiny_base, adapters) as engine:
            first = [await ids(engine.submit(v, ids_, greedy())) for v in (None, *adapters)]
            return first, await asyncio.gather(*[ids(engine.submit(v, ids_, greedy())) for v in (None, *adapters)])

    expected = [alone(v, ids_, 24) for v in (None, *adapters)]
    first, together = run(one_after_another_and_together())
    assert first == expected
    assert together == expected


def test_what_would_kill_the_thread_is_refused_before_it_gets_there(tiny_base, tokenizer):
    async def refused():
        async with running(tiny_base) as engine:
            for bad in ([], [-1], [0, engine.vocabulary]):
                with pytest.raises(ValueError, match="prompt"):
                    engine.submit(None, bad, greedy())
            with pytest.raises(ValueError, match="one to generate"):
                engine.submit(None, [0], greedy(0))
            good = await ids(engine.submit(None, prompt(tokenizer, "The soup"), greedy()))
            return engine.alive(), good

    alive, good = run(refused())
    assert alive
    assert good


def test_a_request_that_could_never_fit_is_refused_and_blocks_nobody(tiny_base, tokenizer):
    async def oversized():
        async with running(tiny_base) as engine:
            with pytest.raises(ContextLengthError, match="256"):
                engine.submit(None, [5] * 250, greedy(7))
            whole = engine.submit(None, [5] * 249, greedy(7, ignore_eos=True))
            return len(await ids(whole)), engine.alive()

    assert run(oversized()) == (7, True)


def test_more_requests_than_the_cache_holds_wait_and_all_come_out_right(tiny_base, adapters, alone, tokenizer):
    settings = EngineSettings(
        max_adapters=4, max_rank=8, batch_tokens=64, batch_requests=16, cache_tokens=256, queue=64
    )
    requests = [(v, prompt(tokenizer, t)) for v in (None, *adapters) for t in TEXTS[:4]]

    async def crowded():
        async with running(tiny_base, adapters, settings) as engine:
            generations = [engine.submit(v, p, greedy(60, ignore_eos=True)) for v, p in requests]
            assert engine.load().waiting > 10
            return await asyncio.gather(*[ids(g) for g in generations])

    no_eos = {"eos_token_id": None}
    assert run(crowded()) == [alone(v, p, 60, **no_eos) for v, p in requests]


def test_a_full_queue_says_when_to_come_back(tiny_base):
    settings = EngineSettings(max_adapters=1, max_rank=4, batch_tokens=64, batch_requests=1, cache_tokens=512, queue=2)

    async def full():
        async with running(tiny_base, settings=settings) as engine:
            generations = [engine.submit(None, [5, 6], greedy(50)) for _ in range(3)]
            with pytest.raises(QueueFullError) as error:
                engine.submit(None, [5, 6], greedy(50))
            for g in generations:
                engine.cancel(g)
            again = await ids(engine.submit(None, [5, 6], greedy(3, ignore_eos=True)))
            return error.value.retry_after, len(again)

    assert run(full()) == (pytest.approx(2, abs=1), 3)


def test_cancelling_frees_the_place_the_cache_and_the_handler(tiny_base, adapters):
    settings = EngineSettings(max_adapters=4, max_rank=8, batch_tokens=64, batch_requests=2, cache_tokens=512, queue=8)

    async def cancelled():
        async with running(tiny_base, adapters, settings) as engine:
            name = next(iter(adapters))
            long = [engine.submit(name, [5, 6, 7], greedy(200, ignore_eos=True)) for _ in range(3)]
            async for _ in long[0]:
                break
            for g in long:
                engine.cancel(g)
                engine.cancel(g)
            assert engine.load().running == engine.load().waiting == 0
            after = await ids(engine.submit(name, [5, 6, 7], greedy(200, ignore_eos=True)))
            await asyncio.sleep(0.3)
            cache = engine._manager.batch_processor.cache
            return len(after), cache.compute_free_capacity(), engine._manager.output_router.result_handlers

    assert run(cancelled()) == (200, 1.0, {})


def test_a_dead_thread_fails_its_requests_and_is_seen(tiny_base, monkeypatch):
    async def dying():
        async with running(tiny_base) as engine:
            assert engine.alive()
            generation = engine.submit(None, [5, 6], greedy(100, ignore_eos=True))
            waiting = asyncio.ensure_future(collect(generation))
            await asyncio.sleep(0.05)
            monkeypatch.setattr(engine._manager.slots, "select", lambda slots: 1 / 0)
            with pytest.raises(EngineDeadError, match="division"):
                await waiting
            assert not engine.alive()
            with pytest.raises(EngineDeadError):
                engine.submit(None, [5, 6], greedy())
            with pytest.raises(EngineDeadError):
                await engine.score(None, [5, 6], 1)
            monkeypatch.setattr(engine._manager, "is_running", lambda: True)  # as in the moment between two looks
            with pytest.raises(EngineDeadError):
                await engine.score(None, [5, 6], 1)
            monkeypatch.undo()

    run(dying())


def test_a_thread_that_stands_still_is_seen(tiny_base):
    settings = EngineSettings(
        max_adapters=1, max_rank=4, batch_tokens=64, batch_requests=4, cache_tokens=512, stall_seconds=0.2
    )

    async def stalled():
        async with running(tiny_base, settings=settings) as engine:
            await asyncio.sleep(0.5)
            idle = engine.alive()
            with engine._manager.pause():
                engine.submit(None, [5, 6], greedy(100))
                time.sleep(0.5)
                return idle, engine.alive()

    assert run(stalled()) == (True, False)


def test_an_adapter_loaded_and_replaced_under_load_changes_nobody_else(tiny_base, adapters, alone, tokenizer, tmp_path):
    (first, first_folder), (second, second_folder), *_ = adapters.items()
    ids_ = prompt(tokenizer, TEXTS[1])
    settings = EngineSettings(max_adapters=2, max_rank=8, batch_tokens=64, batch_requests=16, cache_tokens=2048)

    async def live():
        async with running(tiny_base, {first: first_folder}, settings) as engine:
            before = [engine.submit(v, ids_, greedy(150, ignore_eos=True)) for v in (first, None) * 3]
            tasks = [asyncio.ensure_future(ids(g)) for g in before]
            await asyncio.sleep(0.05)
            await engine.load_adapter(second, second_folder)
            joined = await ids(engine.submit(second, ids_, greedy(30, ignore_eos=True)))
            engine.unload_adapter(first)  # its running requests keep it
            with pytest.raises(NoFreeSlotError):
                await engine.load_adapter("third", first_folder)
            done = await asyncio.gather(*tasks)
            await engine.load_adapter("third", first_folder)
            return done, joined, await ids(engine.submit("third", ids_, greedy(30, ignore_eos=True)))

    done, joined, third = run(live())
    no_eos = {"eos_token_id": None}
    assert done == [alone(v, ids_, 150, **no_eos) for v in (first, None) * 3]
    assert joined == alone(second, ids_, 30, **no_eos)
    assert third == alone(first, ids_, 30, **no_eos)


def test_an_adapter_that_overflows_is_refused_and_spoils_nobody(tiny_base, adapters, alone, tokenizer, tmp_path):
    huge = save_adapter(tmp_path / "huge", tiny_base, strength=1e15)
    name = next(iter(adapters))
    ids_ = prompt(tokenizer, TEXTS[1])

    async def beside():
        async with running(tiny_base, adapters) as engine:
            generations = [engine.submit(v, ids_, greedy(150, ignore_eos=True)) for v in (name, None)]
            tasks = [asyncio.ensure_future(ids(g)) for g in generations]
            with pytest.raises(InvalidAdapterError, match="overflow"):
                await engine.load_adapter("huge", huge)
            assert engine.load().adapters == len(adapters)
            return await asyncio.gather(*tasks)

    assert run(beside()) == [alone(v, ids_, 150, eos_token_id=None) for v in (name, None)]


def test_a_neighbors_overflow_stays_in_its_own_columns():
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.ModuleDict({"q_proj": layer})
    slots, layers = install(model, 2, 2, torch.float32)
    layers["q_proj"].write(1, (torch.full((2, 4), 3e38), torch.ones(2, 4)))
    layers["q_proj"].write(2, (torch.eye(2, 4), torch.ones(2, 4)))
    slots.use(2)
    slots.select([1, 2, 0])
    x = torch.full((1, 3, 4), 100.0)
    out = model["q_proj"](x)[0] - layer(x)[0]
    assert out[0].isinf().all()
    assert out[1:].tolist() == [pytest.approx([200.0] * 4), [0.0] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 9}, "rank 9, over the limit of 8"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"targets": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"strength": float("nan")}, "not finite"),
    ],
)
def test_adapters_it_cannot_serve_are_refused_by_name(tiny_base, tmp_path, change, message):
    folder = save_adapter(tmp_path / "bad", tiny_base, **change)

    async def load():
        async with running(tiny_base) as engine:
            with pytest.raises(InvalidAdapterError, match=message):
                await engine.load_adapter("bad", folder)

    run(load())


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"not json", b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}'])
def test_a_broken_adapter_config_is_refused(tiny_base, adapters, tmp_path, text):
    weights = next(iter(adapters.values())) / "adapter_model.safetensors"
    (tmp_path / "adapter_model.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "adapter_config.json").write_bytes(text)

    async def load():
        async with running(tiny_base) as engine:
            with pytest.raises(InvalidAdapterError, match="adapter_config"):
                await engine.load_adapter("bad", tmp_path)

    run(load())


def test_sampling_by_seed_does_not_depend_on_the_company(tiny_base, adapters, alone, tokenizer):
    name = next(iter(adapters))
    ids_ = prompt(tokenizer, TEXTS[0])
    drawn = Sampling(max_tokens=30, temperature=0.8, top_p=0.9, seed=7)

    async def company():
        async with running(tiny_base, adapters) as engine:
            lonely = await ids(engine.submit(name, ids_, drawn))
            others = [engine.submit(v, prompt(tokenizer, t), greedy()) for v in (None, *adapters) for t in TEXTS[:2]]
            others.append(engine.submit(None, ids_, Sampling(max_tokens=30, temperature=1.5)))
            await asyncio.sleep(0.03)
            accompanied = await ids(engine.submit(name, ids_, drawn))
            other_seed = await ids(engine.submit(name, ids_, Sampling(30, 0.8, 0.9, seed=8)))
            unseeded = [await ids(engine.submit(name, ids_, Sampling(30, 1.5))) for _ in range(2)]
            return lonely, accompanied, other_seed, unseeded, [await ids(g) for g in others[:-1]]

    lonely, accompanied, other_seed, unseeded, others = run(company())
    assert lonely == accompanied != other_seed
    assert unseeded[0] != unseeded[1]
    assert others == [alone(v, prompt(tokenizer, t), 24) for v in (None, *adapters) for t in TEXTS[:2]]


def test_draws_follow_the_tempered_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(max_tokens=1, temperature=0.7, top_p=0.9)
    counts = torch.bincount(torch.stack([draw(logits, sampling, generator) for _ in range(20_000)]), minlength=5)
    p = (logits / 0.7).softmax(-1)
    nucleus = torch.tensor([True, True, False, False, False])  # 0.753 + 0.180 reach 0.9
    expected = torch.where(nucleus, p, 0) / p[nucleus].sum()
    assert (counts / 20_000).tolist() == pytest.approx(expected.tolist(), abs=0.015)


@trials(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    st.floats(0.01, 1),
    st.floats(0.05, 2),
    st.integers(0, 99),
)
def test_a_draw_is_always_inside_the_nucleus(logits, top_p, temperature, seed):
    logits = torch.tensor(logits)
    drawn = int(draw(logits, Sampling(1, temperature, top_p), torch.Generator().manual_seed(seed)))
    p = (logits / temperature).softmax(-1)
    assert p[p > p[drawn]].sum() < top_p + 1e-5


def test_log_probabilities_are_the_models_own(tiny_base, adapters, tokenizer):
    from peft import PeftModel

    name, folder = list(adapters.items())[1]
    ids_ = prompt(tokenizer, TEXTS[1])

    async def both():
        async with running(tiny_base, adapters) as engine:
            plain = engine.submit(None, ids_, greedy(logprobs=None))
            made = await collect(engine.submit(name, ids_, Sampling(12, 0.9, 0.8, seed=3, logprobs=4, ignore_eos=True)))
            whole = ids_ + [t.id for t in made]
            return made, await engine.score(name, whole, 4), await collect(plain)

    made, scored, plain = run(both())
    model = PeftModel.from_pretrained(load_base(tiny_base, "fp32", "cpu", attention="sdpa"), folder).eval()
    whole = ids_ + [t.id for t in made]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = log_p[:-1].gather(1, torch.tensor(whole[1:])[:, None])[:, 0].tolist()
    assert scored[0].logprob is None
    assert [t.logprob for t in scored[1:]] == pytest.approx(expected, abs=1e-4)
    assert [t.logprob for t in made] == pytest.approx(expected[len(ids_) - 1 :], abs=1e-4)
    best = log_p[len(ids_) - 1].topk(4)
    assert [i for i, _ in made[0].top] == best.indices.tolist()
    assert [p for _, p in made[0].top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(t.logprob is None for t in plain)


def test_scoring_under_load_changes_nobody(tiny_base, adapters, alone, tokenizer):
    ids_ = prompt(tokenizer, TEXTS[1])

    async def scoring():
        async with running(tiny_base, adapters) as engine:
            tasks = [asyncio.ensure_future(ids(engine.submit(v, ids_, greedy(60)))) for v in (None, *adapters)]
            for v in (None, *adapters) * 3:
                await engine.score(v, ids_, 2)
            return await asyncio.gather(*tasks)

    assert run(scoring()) == [alone(v, ids_, 60) for v in (None, *adapters)]


def test_scores_asked_for_at_once_are_those_of_each_adapter_alone(tiny_base, adapters, tokenizer):
    """Also while an adapter is loaded and some of those who asked have gone."""
    text, names = prompt(tokenizer, TEXTS[1] * 4), (None, *adapters)
    values = lambda tokens: [t.logprob for t in tokens]

    async def together():
        async with running(tiny_base, adapters) as engine:
            apart = [values(await engine.score(v, text, 0)) for v in names]
            gone = [asyncio.ensure_future(engine.score(v, text, 0)) for v in names]
            await asyncio.sleep(0.01)
            for task in gone:
                task.cancel()
            loading = asyncio.ensure_future(engine.load_adapter("again", next(iter(adapters.values()))))
            asked = await asyncio.gather(*(engine.score(v, text, 0) for v in names * 3))
            await loading
            return apart, [values(tokens) for tokens in asked]

    apart, asked = run(together())
    assert len({tuple(a) for a in apart}) == len(names)
    assert asked == apart * 3


def test_an_adapter_that_poisons_one_token_touches_nobody_else(tiny_base, adapters, alone, tokenizer, tmp_path):
    """It passes the trial on the first tokens and overflows on token 77 only."""
    ids_ = prompt(tokenizer, TEXTS[1])
    folder = save_adapter(tmp_path / "poison", tiny_base, targets=["v_proj"], rank=1, strength=0.0)
    model = load_base(tiny_base, "fp32", "cpu", attention="sdpa")
    normed = model.model.layers[0].input_layernorm(model.get_input_embeddings().weight.detach())
    harmless = torch.linalg.qr(normed[:32].T)[0]
    direction = normed[77] - harmless @ (harmless.T @ normed[77])
    weights = load_file(folder / "adapter_model.safetensors")
    for name, tensor in weights.items():
        if "layers.0." in name:
            weights[name] = 3e19 * (direction[None] if "lora_A" in name else torch.ones_like(tensor))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    async def beside():
        async with running(tiny_base, adapters) as engine:
            await engine.load_adapter("poison", folder)
            others = [asyncio.ensure_future(ids(engine.submit(None, ids_, greedy(150, ignore_eos=True))))]
            await asyncio.sleep(0.05)
            with pytest.raises(NonFiniteError):
                await collect(engine.submit("poison", [5, 77, 6], greedy(20)))
            with pytest.raises(NonFiniteError):
                await engine.score("poison", [5, 77, 6], 1)
            return await asyncio.gather(*others)

    assert run(beside()) == [alone(None, ids_, 150, eos_token_id=None)]


def test_a_held_adapter_answers_after_it_was_unloaded(tiny_base, adapters):
    name = next(iter(adapters))

    async def held():
        async with running(tiny_base, adapters) as engine:
            before = await engine.score(name, [5, 6, 7], 1)
            with engine.hold(name):
                engine.unload_adapter(name)
                assert await engine.score(name, [5, 6, 7], 1) == before
                await collect(engine.submit(name, [5, 6, 7], greedy(3)))
            with pytest.raises(KeyError):
                engine.submit(name, [5, 6, 7], greedy(3))

    run(held())


def test_scores_count_are_bounded_and_end_with_who_asked(tiny_base):
    settings = EngineSettings(max_adapters=1, max_rank=4, batch_tokens=64, batch_requests=4, cache_tokens=512, queue=3)

    async def scores():
        async with running(tiny_base, settings=settings) as engine:
            tasks = [asyncio.ensure_future(engine.score(None, [5] * 60, 1)) for _ in range(3)]
            await asyncio.sleep(0)
            assert engine.load().waiting == 3
            with pytest.raises(QueueFullError):
                await engine.score(None, [5, 6], 1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert engine.load().waiting == 0

    run(scores())


def test_outputs_of_cancelled_requests_are_not_kept(tiny_base):
    async def cancelled():
        async with running(tiny_base) as engine:
            for _ in range(20):
                generation = engine.submit(None, [5] * 50, greedy(50, ignore_eos=True))
                async for _ in generation:
                    break
                engine.cancel(generation)
            await asyncio.sleep(0.2)
            return engine._manager.output_router.output_queue.qsize()

    assert run(cancelled()) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"init_lora_weights": "pissa"},
        {"layers_to_transform": [0]},
        {"another_kind_of_adapter": 3},
        {"use_rslora": "yes"},
        {"rank_pattern": {"q_proj": 2}},
        {"fan_in_fan_out": True},
        {"r": 8.0},
        {"r": True},
    ],
)
def test_an_adapter_of_another_kind_is_refused_by_its_setting(adapters, tmp_path, change):
    config = json.loads((next(iter(adapters.values())) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(InvalidAdapterError, match=next(iter(change))):
        read_adapter(tmp_path, {}, 8)


def test_an_adapter_of_another_rank_than_it_says_is_refused(tiny_base, tmp_path):
    """Its weights would be scaled by the wrong rank."""
    folder = save_adapter(tmp_path / "a", tiny_base, rank=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    layers = projections(load_base(tiny_base, "fp32", "cpu", attention="sdpa"))
    with pytest.raises(InvalidAdapterError, match=r"has rank 4, .* says r is 2"):
        read_adapter(folder, layers, 8)


def test_a_nested_config_and_weights_of_another_type_are_refused(adapters, tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidAdapterError):
        read_adapter(tmp_path, {}, 8)
    config = next(iter(adapters.values())) / "adapter_config.json"
    (tmp_path / "adapter_config.json").write_bytes(config.read_bytes())
    save_file({"x": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapterError, match="I8"):
        read_adapter(tmp_path, {}, 8)


def test_settings_of_sampling_change_the_logits_as_they_say():
    logits = torch.tensor([2.0, -1.0, 1.0, 0.5])
    settings = Sampling(4, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 1.0),))
    assert adjust(logits, settings, [0], [1, 1], []).tolist() == [1.0, -3.25, 1.0, 1.5]
    assert adjust(logits, Sampling(4, min_tokens=2), [0], [1], [2]).tolist()[2] == -torch.inf
    generator = torch.Generator().manual_seed(0)
    assert {int(draw(logits, Sampling(4, 1.0, top_k=2), generator)) for _ in range(200)} == {0, 2}
    assert {int(draw(logits, Sampling(4, 1.0, min_p=0.9), generator)) for _ in range(200)} == {0}
    assert int(draw(logits, Sampling(4, 1e-40), generator)) == 0


def test_owners_are_served_in_turn_and_fill_only_their_own_queue(tiny_base):
    settings = EngineSettings(max_adapters=1, max_rank=4, batch_tokens=64, batch_requests=1, cache_tokens=512, queue=4)

    async def two_owners():
        ended = []
        async with running(tiny_base, settings=settings) as engine:

            async def one(owner, generation):
                await collect(generation)
                ended.append(owner)

            tasks = [one("many", engine.submit(None, [1, 2], greedy(8, ignore_eos=True), "many")) for _ in range(5)]
            with pytest.raises(QueueFullError):
                engine.submit(None, [1, 2], greedy(8), "many")
            tasks.append(one("few", engine.submit(None, [1, 2], greedy(8, ignore_eos=True), "few")))
            await asyncio.gather(*tasks)
        return ended

    assert run(two_owners()).index("few") <= 2  # behind the running one and one that waited


def test_a_request_that_waits_too_long_is_told_to_come_back(tiny_base):
    settings = EngineSettings(max_adapters=1, max_rank=4, batch_tokens=64, batch_requests=1, cache_tokens=512)
    settings = replace(settings, queue_seconds=0.05)

    async def wait():
        async with running(tiny_base, settings=settings) as engine:
            first = engine.submit(None, [1, 2], greedy(200, ignore_eos=True))
            second = engine.submit(None, [1, 2], greedy(2))
            with pytest.raises(QueueFullError) as e:
                await collect(second)
            engine.cancel(first)
            return e.value.retry_after, engine.load().waiting

    retry_after, waiting = run(wait())
    assert retry_after >= 1
    assert waiting == 0
