"""What OpenAI's completions and chat completions may ask for: fields, their limits, and what has no effect.

A field that would change the answer and is not supported is refused, never ignored. Validation stops at the first
fault: a body of a megabyte can hold a hundred thousand, and pydantic would describe each.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from feyntune.engine.api import Sampling
from feyntune.serving.completions import ApiError

_STOP_CHARACTERS = 400


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("holds half a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
# Tokenizers hold ids in 32 bits; whether the model knows one is looked at later.
# fail_fast: a body of a megabyte can hold a hundred thousand mistakes, and pydantic would describe each.
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Stop = Annotated[Text, StringConstraints(max_length=_STOP_CHARACTERS)]

# Fields that clients send without being asked, at values that ask for nothing; None asks for nothing anywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words", "allowed_token_ids"), ([],)),
    **dict.fromkeys(("tool_calls", "annotations"), ([],)),  # of a message
    **dict.fromkeys(("store", "parallel_tool_calls", "include_reasoning"), (False, True)),
    **dict.fromkeys(("n", "best_of", "length_penalty"), (1, 1.0)),
    **dict.fromkeys(("echo", "stream", "early_stopping", "use_beam_search", "continue_final_message"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "continuous_usage_stats", "return_token_ids"), (False,)),
    "return_tokens_as_token_ids": (False,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "chat_template_kwargs": ({},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
# Change no answer.
_IGNORED = {
    *("metadata", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("priority", "request_id"),
}


def _is_neutral(name: str, value: Any) -> bool:
    same = (value == n and type(value) is type(n) for n in _NEUTRAL.get(name, ()))  # 0 == False, in Python
    return value is None or name in _IGNORED or any(same)


def faulty_field(location: Sequence[int | str]) -> str:
    """The field of a pydantic error, without the names of the types that it could have had: prompt.0."""
    parts = [p for p in location if isinstance(p, int) or not re.search(r"[^\w]|^(str|int|float|body)$", p)]
    return ".".join(map(str, parts)).encode(errors="replace").decode()


class Fields(BaseModel):
    """A JSON object of named fields. What asks for nothing is accepted, the first that asks for anything else is
    refused: pydantic would describe each of them."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _accept_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {}
        for name, value in data.items():
            if name in cls.model_fields:
                known[name] = value
            elif not _is_neutral(name, value):
                shown = name[:60].encode(errors="replace").decode()
                raise ApiError(
                    400, "unsupported", f"{shown}: this server does not support it; leave it out.", param=shown
                )
        return known


_BIASED = 1024


def _few(value: Any) -> Any:
    """pydantic counts the entries of a dict after it has read them all."""
    if isinstance(value, dict) and len(value) > _BIASED:
        raise ValueError(f"has more than {_BIASED} entries")
    return value


class StreamOptions(Fields):
    include_usage: bool | None = False
    include_obfuscation: bool | None = Field(False, description="accepted, and not done")


class SamplingFields(Fields):
    """How a completion is drawn, in every protocol."""

    default_temperature: ClassVar[float] = 1.0

    temperature: float | None = Field(None, ge=0, le=2, description="1 if not given; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = Field(False, description="continue to max_tokens (for measurements)")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1 changes nothing; counts the prompt too")
    top_k: int | None = Field(None, ge=-1, description="-1 or 0: every token")
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int | None = Field(None, ge=0, description="neither EOS nor a stop token before so many")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    logit_bias: Annotated[dict[str, float], BeforeValidator(_few), Field(max_length=_BIASED)] | None = Field(
        None, description="token id, as text, to what is added to its logit: -100 to 100"
    )

    def stops(self, most: int) -> list[str]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > most or not all(stop):
            raise ApiError(
                400, "invalid_value", f"stop: give at most {most} strings, none of them empty.", param="stop"
            )
        return stop

    def biases(self, vocabulary: int) -> tuple[tuple[int, float], ...]:
        biases = []
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocabulary):
                raise ApiError(
                    400, "invalid_value", f"logit_bias: token ids are below {vocabulary}.", param="logit_bias"
                )
            if not -100 <= bias <= 100:
                raise ApiError(400, "invalid_value", "logit_bias: give numbers from -100 to 100.", param="logit_bias")
            biases.append((int(token), bias))
        return tuple(biases)

    def sampling(self, index: int, max_tokens: int, vocabulary: int, logprobs: int | None = None) -> Sampling:
        """Of the completion number `index` of a prompt: with a seed, each of the n has its own and keeps it, whatever
        the prompt's place in a list."""
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.default_temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else (self.seed + index) % 2**63,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            min_tokens=self.min_tokens or 0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.biases(vocabulary),
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )


class OpenAIFields(SamplingFields):
    """What completions and chat completions have in common."""

    model: Name
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class CompletionBody(OpenAIFields):
    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=0, description="16 if not given; 0 needs echo")
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1, description="n, or not given")
    suffix: Literal[""] | None = None
    add_special_tokens: Literal[True] | None = Field(None, description="BOS before the prompt: always")


class Part(BaseModel):
    type: Literal["text"]
    text: Text


class Message(Fields):
    """A message as a client's SDK gave it comes back with its empty fields."""

    role: Literal["system", "user", "assistant", "developer"]
    content: Text | Annotated[list[Part], Field(min_length=1, fail_fast=True)] | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    @property
    def shown(self) -> dict[str, str]:
        """As chat templates read it."""
        return {"role": self.role, "content": self.text}


class ChatBody(OpenAIFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, description="with logprobs")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    add_special_tokens: Literal[False] | None = Field(None, description="the template has them")
