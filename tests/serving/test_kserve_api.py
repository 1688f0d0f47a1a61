"""V1 and V2 through KServe's own clients, REST and gRPC."""

import asyncio
import json

import grpc
import httpx
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

from feyntune.model.load import prompt

TEXTS = ["The soup needs", "größe: a loaf"]


@pytest.fixture(scope="module")
def written(alone, tokenizer):
    def complete(variant, text, tokens):
        return tokenizer.decode(alone(variant, prompt(tokenizer, text), tokens), skip_special_tokens=True)

    return complete


def request(model="champion", texts=TEXTS, **parameters):
    tensor = InferInput("text", [len(texts)], "BYTES", data=list(texts))
    return InferRequest(model_name=model, infer_inputs=[tensor], parameters=parameters)


def rest(endpoint, protocol):
    return InferenceRESTClient(RESTConfig(protocol=protocol, timeout=60))


def test_v1_predicts(endpoint, written):
    async def ask():
        client = rest(endpoint, "v1")
        data = {"instances": TEXTS, "parameters": {"max_tokens": 9}}
        assert await client.is_server_live(endpoint.url)
        assert await client.is_model_ready(endpoint.url, "champion")
        return [await client.infer(endpoint.url, data, model_name=m) for m in ("champion", "hep-th.lora-qkv", "base")]

    variants = ("hep-th/lora-all", "hep-th/lora-qkv", None)
    for variant, answer in zip(variants, asyncio.run(ask()), strict=True):
        assert answer == {"predictions": [written(variant, t, 9) for t in TEXTS]}


def test_v2_infers_by_rest(endpoint, written):
    async def ask():
        client = rest(endpoint, "v2")
        assert await client.is_server_ready(endpoint.url)
        assert await client.is_model_ready(endpoint.url, "previous")
        answers = [
            await client.infer(endpoint.url, request(m, max_tokens=9), model_name=m) for m in ("previous", "base")
        ]
        binary = request(max_tokens=9, binary_data_output=True)
        return [*answers, await client.infer(endpoint.url, binary, model_name="champion")]

    for variant, answer in zip(("hep-th/lora-qkv", None, "hep-th/lora-all"), asyncio.run(ask()), strict=True):
        texts, reasons = (answer.get_output_by_name(n).as_numpy().tolist() for n in ("text", "finish_reason"))
        texts = [t.decode() if isinstance(t, bytes) else t for t in texts]
        assert texts == [written(variant, t, 9) for t in TEXTS]
        assert {r.decode() if isinstance(r, bytes) else r for r in reasons} <= {"length", "stop"}


def test_v2_infers_by_grpc(endpoint, written):
    async def ask():
        client = InferenceGRPCClient(f"127.0.0.1:{endpoint.grpc_port}", timeout=60)
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("champion")
        out = await client.infer(request(max_tokens=9, temperature="0.0"))
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await client.infer(request("nobody"))
        with pytest.raises(grpc.aio.AioRpcError) as long:
            await client.infer(request(max_tokens=300))
        return out, unknown.value.code(), long.value.code()

    out, unknown, long = asyncio.run(ask())
    assert [t.decode() for t in out.get_output_by_name("text").data] == [
        written("hep-th/lora-all", t, 9) for t in TEXTS
    ]
    assert (unknown, long) == (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


def test_seeded_sampling_and_stop_strings(endpoint):
    url = f"{endpoint.url}/v1/models/champion:predict"
    ask = {"instances": ["The soup"], "parameters": {"max_tokens": 20, "temperature": 1.1, "seed": 3}}
    first = httpx.post(url, json=ask).json()["predictions"][0]
    assert httpx.post(url, json=ask).json()["predictions"][0] == first
    ask["parameters"]["stop"] = first[4:7]
    assert httpx.post(url, json=ask).json()["predictions"][0] == first[: first.index(first[4:7])]


NEUTRAL = {
    **{"max_tokens": None, "temperature": None, "top_p": None, "seed": None, "stop": None, "top_k": 0, "n": 1},
    **{"stream": False, "best_of": 1, "user": "me", "repetition_penalty": 1.0, "logit_bias": {}, "stop_token_ids": []},
}


def test_parameters_that_ask_for_nothing_are_accepted(endpoint):
    plain = httpx.post(f"{endpoint.url}/v1/models/base:predict", json={"instances": TEXTS}).json()
    asked = {"instances": TEXTS, "parameters": NEUTRAL, "signature_name": "serving_default"}
    assert httpx.post(f"{endpoint.url}/v1/models/base:predict", json=asked).json() == plain
    tensor = {"name": "text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS}
    asked = {"inputs": [tensor], "parameters": NEUTRAL}
    outputs = httpx.post(f"{endpoint.url}/v2/models/base/infer", json=asked).json()["outputs"]
    assert outputs[0]["data"] == plain["predictions"]


def test_a_body_without_a_content_type_is_json_and_one_of_another_type_is_told_which_header(endpoint):
    url, form = f"{endpoint.url}/v1/models/base:predict", {"content-type": "application/x-www-form-urlencoded"}
    body = json.dumps({"instances": TEXTS[:1]}).encode()
    assert httpx.post(url, content=body).json() == httpx.post(url, json={"instances": TEXTS[:1]}).json()
    answer = httpx.post(url, content=body, headers=form)  # `curl -d` without -H
    assert answer.status_code == 400
    assert "with the header content-type: application/json" in answer.json()["error"]
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": TEXTS[:1]}
    body = json.dumps({"inputs": [tensor]}).encode()  # V2 has types of its own for binary tensors
    answer = httpx.post(f"{endpoint.url}/v2/models/base/infer", content=body, headers=form)
    assert answer.status_code == 200, answer.text


def test_settings_of_sampling_are_the_same_in_every_protocol(endpoint, tokenizer):
    ask = {"max_tokens": 6, "temperature": 1.5, "seed": 4, "top_k": 3, "min_p": 0.01, "frequency_penalty": 0.5}
    openai = {"model": "champion", "prompt": TEXTS[0], **ask}
    expected = httpx.post(f"{endpoint.url}/v1/completions", json=openai).json()["choices"][0]["text"]
    answer = httpx.post(f"{endpoint.url}/v1/models/champion:predict", json={"instances": TEXTS[:1], "parameters": ask})
    assert answer.json() == {"predictions": [expected]}

    async def by_grpc():
        client = InferenceGRPCClient(f"127.0.0.1:{endpoint.grpc_port}", timeout=60)
        given = {k: str(v) if isinstance(v, float) else v for k, v in ask.items()}  # this client's way with floats
        return await client.infer(request(texts=TEXTS[:1], **given))

    assert asyncio.run(by_grpc()).get_output_by_name("text").data == [expected.encode()]


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "{",
        "{}",
        '{"instances": "text"}',
        '{"instances": []}',
        '{"instances": [1]}',
        '{"instances": ["\\ud800"]}',
        '{"instances": ["x"], "parameters": 5}',
        '{"instances": ["x"], "parameters": {"max_tokens": 0}}',
        '{"instances": ["x"], "parameters": {"max_tokens": 1000}}',
        '{"instances": ["x"], "parameters": {"stop": [""]}}',
        '{"instances": ["x"], "parameters": {"temperature": "warm"}}',
        '{"instances": ["x"], "parameters": {"max_new_tokens": 20}}',
        '{"instances": ["x"], "parameters": {"n": 2}}',
        '{"instances": ["x"], "parameters": {"top_k": -7}}',
        '{"instances": ["x"], "max_tokens": 20}',
    ],
)
def test_a_wrong_v1_body_is_a_400_with_one_sentence(endpoint, body):
    for content_type in ("application/json", "text/plain"):
        answer = httpx.post(
            f"{endpoint.url}/v1/models/base:predict", content=body, headers={"content-type": content_type}
        )
        assert answer.status_code == 400, answer.text
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": "text", "shape": [1], "datatype": "FP32", "data": [1.0]},
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]},
        {"name": "text", "shape": [3], "datatype": "BYTES", "data": ["x"]},
        {"name": "text", "shape": [0], "datatype": "BYTES", "data": []},
        {"name": "text", "shape": [1], "datatype": "BYTES"},
        {"name": "text", "shape": [1], "datatype": "TEXT", "data": ["x"]},
        {"name": "text", "shape": [-1], "datatype": "BYTES", "data": ["x"]},
        {"name": "text", "shape": "1", "datatype": "BYTES", "data": ["x"]},
    ],
)
def test_a_wrong_v2_tensor_is_a_400(endpoint, tensor):
    answer = httpx.post(f"{endpoint.url}/v2/models/base/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400, answer.text


def test_clients_cannot_load_or_unload(endpoint):
    for verb in ("load", "unload"):
        answer = httpx.post(f"{endpoint.url}/v2/repository/models/champion/{verb}")
        assert answer.status_code == 400
        assert "registry" in answer.json()["error"]
    assert httpx.get(f"{endpoint.url}/v2/models/champion/ready").status_code == 200


@pytest.mark.parametrize(
    "wrong",
    [{"parameters": [1]}, {"outputs": [{"name": "x"}]}, {"outputs": [{"name": "text", "parameters": [1]}]}, {"id": 5}],
)
def test_a_wrong_v2_body_is_a_400(endpoint, wrong):
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    answer = httpx.post(f"{endpoint.url}/v2/models/base/infer", json={"inputs": [tensor], **wrong})
    assert answer.status_code == 400, answer.text
    assert next(iter(wrong)) in answer.json()["error"]


def test_models_describe_themselves(endpoint):
    """`/v1/models` answers KServe's clients and OpenAI's, which both ask there."""
    listed = httpx.get(f"{endpoint.url}/v1/models").json()
    assert {"base", "champion", "previous", "hep-ph_gr-qc.lora-qkv"} <= set(listed["models"])
    assert listed["data"] == httpx.get(f"{endpoint.url}/openai/v1/models").json()["data"]
    one = httpx.get(f"{endpoint.url}/v1/models/champion").json()
    assert (one["name"], one["ready"], one["id"], one["object"]) == ("champion", True, "champion", "model")
    assert httpx.get(f"{endpoint.url}/v1/models/nobody").status_code == 404
    metadata = httpx.get(f"{endpoint.url}/v2/models/champion").json()
    assert metadata["inputs"][0]["name"] == "text"
    assert httpx.get(f"{endpoint.url}/v2/models/nobody").status_code == 404
