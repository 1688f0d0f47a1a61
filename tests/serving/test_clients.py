"""Clients as the package index has them today, each in an environment of its own, against a real endpoint."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

# Client: (what to install beside it, a program; its arguments are the endpoint's URL, its port and its gRPC port).
PROGRAMS = {
    "openai": ([], """
        from openai import OpenAI
        client = OpenAI(base_url=url + "/openai/v1", api_key="none")
        assert "champion" in {m.id for m in client.models.list()}
        assert client.completions.create(model="champion", prompt="The soup", max_tokens=3).usage.completion_tokens == 3
        stream = client.completions.create(model="base", prompt="The soup", max_tokens=3, stream=True)
        assert "".join(c.choices[0].text for c in stream if c.choices)
    """),
    "litellm": ([], """
        import litellm
        call = {"model": "text-completion-openai/champion", "api_base": url + "/openai/v1", "api_key": "none"}
        answer = litellm.text_completion(prompt="The soup", max_tokens=3, **call)
        assert answer.choices[0].text
    """),
    "langchain-openai": ([], """
        from langchain_openai import OpenAI
        model = OpenAI(model="champion", base_url=url + "/openai/v1", api_key="none", max_tokens=3)
        assert model.invoke("The soup")
        assert "".join(model.stream("The soup"))
    """),
    "tritonclient[http,grpc]": ([], """
        import numpy, tritonclient.grpc, tritonclient.http
        for module, at in ((tritonclient.http, port), (tritonclient.grpc, grpc_port)):
            client = module.InferenceServerClient(f"127.0.0.1:{at}")
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("champion")
            text = module.InferInput("text", [1], "BYTES")
            text.set_data_from_numpy(numpy.array(["The soup"], dtype=object))
            answer = client.infer("champion", [text], parameters={"max_tokens": 3})
            assert answer.as_numpy("text")[0]
    """),
    "kserve": ([], """
        import asyncio
        from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
        async def main():
            client = InferenceRESTClient(RESTConfig(protocol="v2"))
            assert await client.is_server_ready(url)
            text = InferInput("text", [1], "BYTES", data=["The soup"])
            request = InferRequest(model_name="champion", infer_inputs=[text], parameters={"max_tokens": 3})
            answer = await client.infer(url, request, model_name="champion")
            assert answer.outputs[0].data
        asyncio.run(main())
    """),
    "lm-eval[api]": (["torch", "transformers"], """
        import lm_eval
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI
        model = LocalCompletionsAPI(
            base_url=url + "/v1/completions", model="champion", tokenizer=tokenizer, tokenizer_backend="huggingface",
            add_bos_token=True,
        )
        requests = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
        answers = model.loglikelihood(requests, disable_tqdm=True)
        assert all(abs(answer[0] - own) < 1e-4 for answer, own in zip(answers, in_process, strict=True)), answers
    """),
}  # fmt: skip


PAIRS = [("The soup", " has more salt."), ("A loaf", " needs the long winter.")]


@pytest.fixture(scope="module")
def in_process(tiny_base: str, adapters: dict[str, Path]) -> list[float]:
    """Log-likelihoods of PAIRS under the champion, as `feyntune tasks` computes them."""
    from lm_eval.api.instance import Instance

    from feyntune.tasks.tasks import SystemModels

    model = SystemModels(tiny_base, "fp32", 2).harness_model(adapters["hep-th/lora-all"])
    ask = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    return [float(total) for total, _ in model.loglikelihood(ask, disable_tqdm=True)]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[str]], Path]:
    """Makes an environment for a client and returns its interpreter."""

    def make(client: str, more: list[str]) -> Path:
        folder = tmp_path_factory.mktemp(client.partition("[")[0]) / "venv"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        # torch first and alone, so that pip's index decides on the build
        for packages in ([p] for p in (*more, client)):
            subprocess.run([*map(str, pip), *packages], check=True)
        return folder / "bin" / "python"

    return make


@pytest.mark.parametrize("client", PROGRAMS)
def test_a_client_of_today_gets_its_answers(
    endpoint,
    tiny_base: str,
    in_process: list[float],
    python: Callable[[str, list[str]], Path],
    tmp_path: Path,
    client: str,
) -> None:
    more, program = PROGRAMS[client]
    lines = [f"url, tokenizer, port, grpc_port = {(endpoint.url, tiny_base, endpoint.port, endpoint.grpc_port)!r}"]
    lines += [f"pairs, in_process = {(PAIRS, in_process)!r}"]
    lines += [line.removeprefix(" " * 8) for line in program.splitlines()]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python(client, more)), "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
