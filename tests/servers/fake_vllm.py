"""A stand-in for `vllm serve`: answers in the shapes that vLLM 0.32 gave (recorded on its CPU build), by no model.

    python tests/servers/fake_vllm.py serve BASE --uds=PATH …

The next token is a hash of the adapter's weights and the tokens so far. A prompt that ends with NAN gives numbers that
are not finite, as an adapter that overflows does. FAKE_VLLM_FAILS=1: it ends at the start.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

NAN = [7, 7, 7]
SECONDS_PER_TOKEN = 0.002


def next_token(weights: str, context: list[int], vocabulary: int) -> int:
    digest = hashlib.sha256(json.dumps([weights, context]).encode()).digest()
    return 8 + int.from_bytes(digest[:4], "big") % (vocabulary - 8)


def error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def make_app(base: Path, max_rank: int) -> FastAPI:
    app = FastAPI()
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    adapters: dict[str, str] = {}  # name -> hash of its weights
    load = {"server_load": 0}

    @app.get("/health")
    async def health() -> Response:
        return Response()

    @app.get("/load")
    async def server_load() -> dict:
        return load

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(body: dict) -> Response:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in adapters:
            return error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            return error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > max_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {max_rank}."
            return error(500, "InternalServerError", message)
        adapters[name] = hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(body: dict) -> Response:
        if adapters.pop(body["lora_name"], None) is None:
            return error(404, "NotFoundError", f"The lora adapter '{body['lora_name']}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")

    @app.post("/v1/completions")
    async def completions(body: dict) -> Response:
        if body["model"] != "base" and body["model"] not in adapters:
            return error(404, "NotFoundError", f"The model `{body['model']}` does not exist. Valid aliases: base.")
        weights = adapters.get(body["model"], "base")
        finite = body["prompt"][-3:] != NAN
        if body.get("prompt_logprobs") is not None:
            if not finite:
                return error(400, "BadRequestError", "Out of range float values are not JSON compliant")
            known = [{str(t): {"logprob": -1.0, "rank": 1, "decoded_token": ""}} for t in body["prompt"][1:]]
            return JSONResponse({"choices": [{"index": 0, "text": "", "prompt_logprobs": [None, *known]}]})
        if not body.get("stream"):
            return JSONResponse({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        return StreamingResponse(events(body, weights, finite), media_type="text/event-stream")

    async def events(body: dict, weights: str, finite: bool):
        context = list(body["prompt"])
        load["server_load"] += 1
        try:
            for n in range(body["max_tokens"]):
                await asyncio.sleep(SECONDS_PER_TOKEN)
                token = next_token(weights, context, vocabulary) if finite else 0
                context.append(token)
                logprob = -1.0 if finite else None
                stopped = token in body["stop_token_ids"]
                reason = "stop" if stopped else "length" if n + 1 == body["max_tokens"] else None
                name = f"token_id:{token}"
                logprobs = {"text_offset": [0], "token_logprobs": [logprob], "tokens": [name]}
                logprobs["top_logprobs"] = [{name: logprob, **({"token_id:5": -2.0} if body["logprobs"] > 1 else {})}]
                choice = {"index": 0, "text": "", "logprobs": logprobs, "finish_reason": reason, "token_ids": [token]}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                if stopped:
                    break
            yield "data: [DONE]\n\n"
        finally:
            load["server_load"] -= 1

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("base", type=Path)
    parser.add_argument("--uds", required=True)
    parser.add_argument("--max-lora-rank", type=int, required=True)
    args, _ = parser.parse_known_args()
    if os.environ.get("FAKE_VLLM_FAILS") == "1":
        sys.exit("this one fails")
    assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert not [name for name in os.environ if name.startswith(("AWS_", "S3_"))]
    uvicorn.run(make_app(args.base, args.max_lora_rank), uds=args.uds, log_level="warning")


if __name__ == "__main__":
    main()
