"""The endpoint through the stock OpenAI client, and what it says to what it cannot do."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from pydantic import ValidationError

from feyntune.constants import VERSION
from feyntune.model.load import load_tokenizer, prompt
from feyntune.names import slug
from feyntune.serving.completions import ApiError
from feyntune.serving.openai_fields import ChatBody
from tests.serving.conftest import gauge, serving, settles

TEXTS = ["The soup needs", "A loaf has a good smell. Our oven", "größe 😀 the"]


@pytest.fixture(scope="module")
def client(endpoint):
    return openai.OpenAI(base_url=f"{endpoint.url}/openai/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def written(alone, tokenizer):
    """Greedy text of `variant` after `text`, by transformers and PEFT alone."""

    def complete(variant, text, tokens):
        ids = alone(variant, prompt(tokenizer, text), tokens)
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return complete


def test_greedy_completions_equal_generate_under_every_name(client, written, registry):
    names = {"base": None}
    for version in registry.versions():
        names |= {
            version.variant: version.variant,
            slug(version.variant): version.variant,
            version.name: version.variant,
        }
    names |= {"champion": "hep-th/lora-all", "previous": "hep-th/lora-qkv", "champion:hep-th": "hep-th/lora-all"}
    for name, variant in names.items():
        for text in TEXTS[:2]:
            out = client.completions.create(model=name, prompt=text, max_tokens=12, temperature=0)
            assert out.choices[0].text == written(variant, text, 12), name


def test_a_stream_is_the_same_text_token_by_token(client, written):
    for name, variant in (("champion", "hep-th/lora-all"), ("base", None)):
        for text in TEXTS:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = list(client.completions.create(model=name, prompt=text, max_tokens=20, temperature=0, **options))
            pieces = [c.choices[0].text for c in chunks if c.choices]
            assert "".join(pieces) == written(variant, text, 20)
            assert sum(bool(p) for p in pieces) > 5
            assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("length", "stop")
            assert chunks[-1].usage.completion_tokens <= 20


def test_the_first_token_of_a_stream_comes_long_before_the_last(client):
    stream = client.completions.create(
        model="champion", prompt="the", max_tokens=200, stream=True, temperature=0, extra_body={"ignore_eos": True}
    )
    started = time.monotonic()
    times = [time.monotonic() - started for _ in stream]
    assert times[0] < times[-1] / 2


def test_scores_asked_for_at_once_are_those_of_each_adapter_alone(client):
    def score(model):
        out = client.completions.create(model=model, prompt=TEXTS[1] * 8, max_tokens=0, echo=True, logprobs=0)
        return model, tuple(out.choices[0].logprobs.token_logprobs)

    names = ("base", "champion", "previous")
    alone = {score(name) for name in names}
    assert len({logprobs for _, logprobs in alone}) == 3
    with ThreadPoolExecutor(9) as pool:
        assert set(pool.map(score, names * 6)) == alone


def test_choices_of_one_request_are_in_order_and_seeded_apart(client):
    ask = {"model": "champion", "max_tokens": 15, "temperature": 1.2, "seed": 5, "extra_body": {"ignore_eos": True}}
    one = client.completions.create(prompt="The soup", n=3, **ask)
    again = client.completions.create(prompt="The soup", n=3, **ask)
    texts = [c.text for c in one.choices]
    assert [c.index for c in one.choices] == [0, 1, 2]
    assert texts == [c.text for c in again.choices]
    assert len(set(texts)) == 3
    assert one.usage.completion_tokens == 45
    chunks = client.completions.create(prompt="The soup", n=3, stream=True, **ask)
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_several_prompts_as_text_or_tokens(client, written, tokenizer):
    expected = [written("hep-th/lora-all", t, 8) for t in TEXTS]
    ask = {"model": "champion", "max_tokens": 8, "temperature": 0}
    ids = [prompt(tokenizer, t) for t in TEXTS]
    assert [c.text for c in client.completions.create(prompt=TEXTS, **ask).choices] == expected
    assert [c.text for c in client.completions.create(prompt=ids, **ask).choices] == expected
    assert client.completions.create(prompt=ids[1], **ask).choices[0].text == expected[1]


def test_a_stop_string_ends_the_text_before_it(client, written):
    whole = written("hep-th/lora-all", TEXTS[1], 30)
    stop = whole[10:14]
    for stream in (False, True):
        out = client.completions.create(
            model="champion",
            prompt=TEXTS[1],
            max_tokens=30,
            temperature=0,
            stop=[stop, "§§"],
            logprobs=0,
            stream=stream,
        )
        choices = [c.choices[0] for c in out] if stream else [out.choices[0]]
        assert "".join(c.text for c in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
        offsets = [o for c in choices for o in c.logprobs.text_offset]
        assert max(offsets) < whole.index(stop)


def test_echo_and_log_probabilities(client, tokenizer, written):
    text = TEXTS[0]
    ask = {"model": "champion", "prompt": text, "temperature": 0, "logprobs": 3, "echo": True}
    with_completion = client.completions.create(max_tokens=6, **ask).choices[0]
    completion = written("hep-th/lora-all", text, 6)
    assert with_completion.text == text + completion
    lp = with_completion.logprobs
    ids = prompt(tokenizer, text)
    assert len(lp.tokens) == len(ids) + 6
    assert lp.token_logprobs[0] is None
    assert all(p < 0 for p in lp.token_logprobs[1:])
    for token, p, top, at in zip(
        lp.tokens[1:], lp.token_logprobs[1:], lp.top_logprobs[1:], lp.text_offset[1:], strict=True
    ):
        assert top[token] == p
        assert 3 <= len(top) <= 4
        assert with_completion.text[at:].startswith(token)
    only = client.completions.create(max_tokens=0, **ask).choices[0]
    assert only.text == text
    assert only.finish_reason == "length"
    assert only.logprobs.token_logprobs[1:] == pytest.approx(lp.token_logprobs[1 : len(ids)], abs=1e-4)
    streamed = list(client.completions.create(max_tokens=6, stream=True, **ask))
    assert "".join(c.choices[0].text for c in streamed) == text + completion
    assert [p for c in streamed for p in c.choices[0].logprobs.token_logprobs] == pytest.approx(
        lp.token_logprobs, abs=1e-4
    )


def test_models_are_listed_with_their_lineage(client, registry):
    models = {m.id: m for m in client.models.list()}
    slugs = {slug(v.variant) for v in registry.versions()}
    assert slugs | {"base", "champion", "previous"} <= models.keys()
    champion = models["champion"]
    assert champion.root == registry.resolve("champion").name
    assert champion.parent == "base"
    assert champion.lineage["split"] == "1" * 64
    assert "champion" in models["hep-th.lora-all"].aliases
    assert client.models.retrieve("hep-th/lora-qkv").digest == registry.resolve("hep-th/lora-qkv").digest
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("hep-th/none")


def test_an_unknown_model_is_named_with_those_there_are(client):
    with pytest.raises(openai.NotFoundError, match=r"gpt-4.*hep-th\.lora-all") as e:
        client.completions.create(model="gpt-4", prompt="x")
    assert e.value.code == "model_not_found"
    assert e.value.param == "model"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**61]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 255}, "prompt"),
        ({"prompt": "x " * 400}, "prompt"),
        ({"prompt": "x", "n": 65}, "n"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "stop": ["a"] * 65}, "stop"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": "x", "tools": [{"type": "function"}]}, "tools"),
        ({"prompt": "x", "frobnicate": True}, "frobnicate"),
    ],
)
def test_what_it_cannot_honor_is_refused_by_field_in_openais_shape(endpoint, body, param):
    answer = httpx.post(
        f"{endpoint.url}/openai/v1/completions",
        content=json.dumps({"model": "base", **body}),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param
    assert error["message"]


def test_a_body_that_is_no_json_or_too_large_is_refused(endpoint):
    url = f"{endpoint.url}/openai/v1/completions"
    broken = httpx.post(url, content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert broken.json()["error"]["code"] == "invalid_request"
    large = httpx.post(url, json={"model": "base", "prompt": "x" * 100_000})
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/openai/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_a_body_of_another_content_type_is_told_which_header_to_send(endpoint, path, kind):
    """`curl -d` without -H. It is not read as JSON: a page of any origin may send these types unasked."""
    headers = {} if kind is None else {"content-type": kind}
    answer = httpx.post(endpoint.url + path, content=b'{"model": "base", "prompt": "x"}', headers=headers)
    assert answer.status_code == 415, answer.text
    assert answer.json()["error"]["message"] == (
        "The body was not read: send JSON with the header content-type: application/json."
    )


def test_chat_with_a_template_streams_one_message(tiny_base, tmp_path):
    base = tmp_path / "chatty"
    shutil.copytree(tiny_base, base, ignore=shutil.ignore_patterns("manifest.json"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = {"model": "base", "messages": [{"role": "user", "content": "The soup"}], "temperature": 0}
    with serving(tmp_path / "registry", base) as running:
        tokens = httpx.post(f"{running.url}/tokenize", json={"messages": asked["messages"]}).json()["tokens"]
        assert load_tokenizer(str(base)).decode(tokens) == "The soup "
        chatting = openai.OpenAI(base_url=f"{running.url}/openai/v1", api_key="none", max_retries=0, timeout=60)
        whole = chatting.chat.completions.create(**asked).choices[0]
        with chatting.chat.completions.stream(**asked) as stream:
            for _ in stream:
                pass
            streamed = stream.current_completion_snapshot.choices[0]
    assert streamed.message.role == whole.message.role == "assistant"
    assert streamed.message.content == whole.message.content
    assert streamed.message.content


def test_chat_is_refused_without_a_template(client):
    with pytest.raises(openai.BadRequestError, match="without a chat template") as e:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hello"}])
    assert e.value.code == "no_chat_template"


def test_a_client_that_goes_away_frees_its_place(endpoint):
    def running():
        return gauge(endpoint, "feyntune_running_requests")

    url = f"{endpoint.url}/openai/v1/completions"
    body = {"model": "champion", "prompt": "the", "max_tokens": 240, "ignore_eos": True, "n": 8}
    with httpx.stream("POST", url, json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()  # kept: dropping it closes the connection
        next(lines)
        assert running() == 8
    assert settles(lambda: running() == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.25)
    assert settles(lambda: running() == 0)
    counted = httpx.get(f"{endpoint.url}/metrics").text
    assert 'feyntune_requests_total{adapter="hep-th.lora-all",outcome="cancelled",protocol="openai"} 2.0' in counted


def test_many_at_once_under_different_names_all_get_their_own(client, written):
    asked = [(name, text) for name in ("base", "champion", "previous", "hep-ph+gr-qc/lora-qkv") for text in TEXTS] * 3
    variants = {"base": None, "champion": "hep-th/lora-all", "previous": "hep-th/lora-qkv"}
    got: dict = {}

    def ask(i, name, text):
        got[i] = client.completions.create(model=name, prompt=text, max_tokens=16, temperature=0).choices[0].text

    threads = [threading.Thread(target=ask, args=(i, *a)) for i, a in enumerate(asked)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, (name, text) in enumerate(asked):
        assert got[i] == written(variants.get(name, name), text, 16)


def test_metrics_count_by_adapter(endpoint, client):
    client.completions.create(model="champion", prompt="The soup", max_tokens=5, temperature=0)
    text = httpx.get(f"{endpoint.url}/metrics").text
    for metric in (
        'feyntune_requests_total{adapter="hep-th.lora-all",outcome="ok",protocol="openai"}',
        'feyntune_time_to_first_token_seconds_count{adapter="hep-th.lora-all"}',
        'feyntune_time_per_token_seconds_count{adapter="hep-th.lora-all"}',
        'feyntune_tokens_total{adapter="hep-th.lora-all",kind="completion"}',
        "feyntune_batch_requests_count",
        "feyntune_waiting_requests",
        'feyntune_adapter_loads_total{adapter="hep-th.lora-all",outcome="loaded"}',
        'feyntune_adapter_served{name="champion",',
    ):
        assert metric in text
    assert "gpt-4" not in text


def test_an_answer_names_the_version_that_gave_it(endpoint, registry):
    champion = registry.snapshot().aliases["champion"]
    for path in ("/openai/v1/completions", "/v1/completions"):
        for body in ({}, {"stream": True}):
            body = {"model": "champion", "prompt": "The soup", "max_tokens": 2, **body}
            answer = httpx.post(endpoint.url + path, json=body, timeout=60)
            assert answer.headers["x-feyntune-version"] == champion
            assert answer.headers["x-feyntune-release"] == VERSION
    listed = {m["id"]: m for m in httpx.get(f"{endpoint.url}/openai/v1/models").json()["data"]}
    assert listed["champion"]["version"] == champion
    assert listed["champion"]["max_model_len"] == listed["base"]["max_model_len"] > 0


def test_every_answer_has_the_requests_own_id_or_a_new_one(endpoint):
    body = {"model": "base", "prompt": "The soup", "max_tokens": 2}
    url = f"{endpoint.url}/openai/v1/completions"
    for sent in (body, body | {"stream": True}, body | {"model": "nobody"}, {}):
        answer = httpx.post(url, json=sent, headers={"X-Request-Id": "mine-1"}, timeout=60)
        assert answer.headers["x-request-id"] == "mine-1"
    made = {httpx.get(f"{endpoint.url}/v2/health/live").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    forged = httpx.get(f"{endpoint.url}/v2/health/live", headers={"X-Request-Id": "a b " * 100 + "c"})
    assert " " not in forged.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/openai/v1/embeddings", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/openai/v1/completions", 405),
        ("DELETE", "/openai/v1/models/base", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/tokenize", 405),
        ("POST", "/openai/v1/completions", 415),
        ("POST", "/openai/v1/completions?a=b", 415),
    ],
)
def test_errors_of_every_route_have_openais_shape(endpoint, method, path, status):
    answer = httpx.request(method, endpoint.url + path, content=b"\xff{")
    assert answer.status_code == status, answer.text
    assert {"message", "type", "param", "code"} == answer.json()["error"].keys()
    if status == 405:
        assert answer.headers["allow"]


def test_a_page_of_another_origin_is_not_let_in_by_default(endpoint):
    preflight = {"Origin": "https://notebook.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{endpoint.url}/openai/v1/completions", headers=preflight)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_tokens_of_a_prompt_and_back(endpoint, tokenizer):
    def ask(path, **body):
        return httpx.post(f"{endpoint.url}/{path}", json=body, timeout=60)

    answer = ask("tokenize", model="champion", prompt=TEXTS[1], return_token_strs=True).json()
    assert answer["tokens"] == prompt(tokenizer, TEXTS[1])
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert ask("tokenize", prompt=TEXTS[1], add_special_tokens=False).json()["tokens"] == answer["tokens"][1:]
    assert ask("detokenize", tokens=answer["tokens"][1:]).json() == {"prompt": TEXTS[1]}
    assert ask("detokenize", model="champion", tokens=[]).json() == {"prompt": ""}
    wrong = [("tokenize", {}), ("tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]})]
    wrong += [("detokenize", {"tokens": [99999]}), ("detokenize", {"tokens": [-1]}), ("detokenize", {})]
    assert [ask(path, **body).status_code for path, body in wrong] == [400] * len(wrong)
    assert ask("tokenize", model="nobody", prompt="x").status_code == 404
    assert ask("tokenize", messages=[{"role": "user", "content": "x"}]).json()["error"]["code"] == "no_chat_template"


def test_settings_of_sampling_change_what_is_drawn(client, tokenizer):
    def tokens(**extra):
        choice = client.completions.create(
            model="champion", prompt="The soup", max_tokens=24, temperature=0, logprobs=0, extra_body=extra
        ).choices[0]
        return choice.logprobs.tokens, choice.finish_reason

    plain, _ = tokens(ignore_eos=True)
    first = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(plain[0]))[0]
    forbidden, _ = tokens(ignore_eos=True, logit_bias={str(first): -100})
    assert forbidden[0] != plain[0]
    stopped, reason = tokens(ignore_eos=True, stop_token_ids=[first])
    assert (len(stopped), reason) == (1, "stop")
    later, _ = tokens(ignore_eos=True, stop_token_ids=[first], min_tokens=5)
    assert len(later) >= 5
    varied, _ = tokens(ignore_eos=True, repetition_penalty=10)
    assert len(set(varied)) > len(set(plain))
    spread, _ = tokens(ignore_eos=True, frequency_penalty=2, presence_penalty=2)
    assert len(set(spread)) > len(set(plain))


NEUTRAL = {
    **{"top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "min_tokens": 0, "stop_token_ids": [], "logit_bias": {}},
    **{"n": 1, "stop": [], "seed": None, "stream": False, "stream_options": None, "presence_penalty": 0, "user": "me"},
    **{"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}},
    **{"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"], "functions": None},
    **{"skip_special_tokens": True, "length_penalty": 1.0, "truncate_prompt_tokens": None, "guided_json": None},
}


def test_fields_that_ask_for_nothing_are_accepted(endpoint):
    own = {"best_of": 1, "suffix": "", "echo": False, "logprobs": None, "add_special_tokens": True}
    body = {"model": "base", "prompt": "The soup", "max_tokens": 2, **NEUTRAL, **own}
    answer = httpx.post(f"{endpoint.url}/openai/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_conversation_of_another_server_is_accepted():
    message = {"role": "assistant", "content": "Yes.", "refusal": None, "annotations": [], "audio": None}
    message |= {"tool_calls": [], "function_call": None, "reasoning": None}
    own = {"logprobs": False, "top_logprobs": 0, "add_generation_prompt": True, "echo": False, "verbosity": "medium"}
    asked = ChatBody.model_validate({"model": "base", "messages": [message], **NEUTRAL, **own})
    assert asked.messages[0].shown == {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    "field",
    [
        {"echo": True},
        {"truncate_prompt_tokens": 1},
        {"prompt_logprobs": 0},
        {"add_special_tokens": True},
        {"tools": [{}]},
        {"tool_choice": "required"},
        {"best_of": True},
        {"continue_final_message": True},
    ],
)
def test_what_would_change_a_conversations_answer_is_refused(field):
    asked = {"model": "base", "messages": [{"role": "user", "content": "x"}], **field}
    with pytest.raises((ApiError, ValidationError), match=next(iter(field))):
        ChatBody.model_validate(asked)


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_probes_of_other_servers_are_answered(endpoint, path):
    for ask in (httpx.get, httpx.head):
        answer = ask(endpoint.url + path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert httpx.get(f"{endpoint.url}/version").json() == {"version": VERSION}


def test_whoever_asks_for_the_head_of_a_page_gets_it(endpoint):
    for path in ("/openai/v1/models", "/v2/health/ready", "/v1/models"):
        answer = httpx.head(endpoint.url + path)
        assert (answer.status_code, answer.content) == (200, b"")
    assert httpx.head(f"{endpoint.url}/openai/v1/completions").status_code == 405


def test_a_prompt_that_begins_with_the_text_of_bos_has_it_once(client, tokenizer):
    ask = {"model": "base", "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 0}
    plain = client.completions.create(prompt="The soup", **ask)
    pasted = client.completions.create(prompt=f"{tokenizer.bos_token}The soup", **ask)
    assert pasted.usage == plain.usage
    assert pasted.choices[0].logprobs.tokens == plain.choices[0].logprobs.tokens
