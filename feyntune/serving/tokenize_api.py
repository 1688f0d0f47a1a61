"""`/tokenize` and `/detokenize`, as vLLM answers them."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import ORJSONResponse
from pydantic import Field

from feyntune.serving.completions import ApiError, Server
from feyntune.serving.openai_fields import Fields, Message, Name, Text, TokenId

PATHS = ("/tokenize", "/detokenize")


class TokenizeBody(Fields):
    model: Name | None = Field(None, description="any name of the model list: all share the base's tokenizer")
    prompt: Text | None = Field(None, description="or messages")
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="BOS before a prompt, as completions put it: true")
    add_generation_prompt: bool = Field(True, description="with messages")
    return_token_strs: bool | None = False


class DetokenizeBody(Fields):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


def router(server: Server) -> APIRouter:
    routes = APIRouter(tags=["tokenizer"], default_response_class=ORJSONResponse)
    errors: dict[int | str, dict[str, Any]] = {
        400: {"description": "A field is wrong"},
        401: {"description": "No key, or a wrong one"},
        404: {"description": "There is no such model"},
        413: {"description": "The body is too large"},
        415: {"description": "The body is not sent as application/json"},
        503: {"description": "Loading"},
    }

    @routes.post("/tokenize", responses=errors)
    async def tokenize(asked: TokenizeBody) -> dict[str, Any]:
        """The tokens of a prompt or of a conversation, as a completion would read it."""
        engine, _, tokenizer = server.require_ready()
        if asked.model is not None:
            server.target(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "invalid_value", "Give either prompt or messages.", param="prompt")
        if asked.messages is not None:
            ids = await server.chat_tokens([m.shown for m in asked.messages], asked.add_generation_prompt)
        else:
            ids = await server.tokens(asked.prompt or "")
            if asked.add_special_tokens is False:
                ids = ids[1:]  # BOS
        return {
            "count": len(ids),
            "max_model_len": engine.max_length,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None,
        }

    @routes.post("/detokenize", responses=errors)
    async def detokenize(asked: DetokenizeBody) -> dict[str, str]:
        """The text of tokens, special tokens included."""
        engine, _, tokenizer = server.require_ready()
        if asked.model is not None:
            server.target(asked.model)
        if any(token >= engine.vocabulary for token in asked.tokens):
            message = f"Token {max(asked.tokens)} is not in the vocabulary: ids are below {engine.vocabulary}."
            raise ApiError(400, "invalid_value", message, param="tokens")
        decode = tokenizer.backend_tokenizer.decode
        return {"prompt": await asyncio.to_thread(decode, asked.tokens, skip_special_tokens=False)}

    return routes
