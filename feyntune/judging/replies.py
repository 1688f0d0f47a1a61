"""What servers of OpenAI's protocol send: the text of an answer in its many forms, and errors in words."""

import json
import re
from typing import Any


def why_no_choices(raw: Any, body: Any) -> str:
    """Routers pass a provider's error on with status 200; a login page has it too."""
    if "html" in raw.headers.get("content-type", ""):
        return "a web page answers: check base_url, and whether a login or a proxy is in between"
    error = getattr(body, "error", None)
    message = error.get("message") if isinstance(error, dict) else error
    why = f" but the error: {' '.join(str(message).split())[:200]}" if message else ""
    return f"the answer does not follow the protocol: it has no choices{why}"


def text_of(message: Any) -> str:
    """The text of an answer: of a list of parts the text parts, and without the reasoning before it."""
    content = getattr(message, "content", None) if hasattr(message, "content") else getattr(message, "text", None)
    if isinstance(content, list):  # Mistral's reasoning models
        parts = [p if isinstance(p, dict) else getattr(p, "__dict__", {}) for p in content]
        content = "".join(str(p.get("text") or "") for p in parts if p.get("type") in ("text", "output_text"))
    text = _without_reasoning(content) if isinstance(content, str) else ""
    return text or (getattr(message, "refusal", None) and REFUSAL) or ""


# How models mark their reasoning where the server leaves it in the text: the beginning, the end.
_REASONING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)


def _without_reasoning(text: str) -> str:
    """What follows the reasoning; nothing where it was cut off.

    Where the chat template begins it, the text only ends it.
    """
    for begin, end in _REASONING:
        if end in text:
            return text.rpartition(end)[2]
        if text.lstrip().startswith(begin):
            return ""
    return text


REFUSAL = "\0refused"  # an answer's text where the endpoint put a refusal in a field of its own


# What commercial endpoints refuse with 400, and the setting that helps.
HINTS = {
    "max_completion_tokens": "set limit_field: max_completion_tokens",
    "temperature": "set temperature: null",
    "chat template": "set api: completions",
    "chat_template": "set api: completions",
}


def describe_error(error: Exception, key: str | None) -> str:
    """One line about an error, without the key, which some servers repeat."""
    status = getattr(error, "status_code", None)
    text = str(error)
    if isinstance(error, json.JSONDecodeError):
        text = "the answer is not JSON"
    elif (response := getattr(error, "response", None)) is not None and re.fullmatch(r"Error code: \d+", text):
        page = "html" in response.headers.get("content-type", "")
        text += " - a web page" if page else f" - {response.text[:250]}"  # a body of another form than OpenAI's
    elif status is None and error.__cause__ is not None:
        text += f" {error.__cause__}"
    message = " ".join(f"{f'HTTP {status}, ' if status else ''}{type(error).__name__}: {text}".split())
    if key:
        message = message.replace(key, "***")
    hint = next((fix for word, fix in HINTS.items() if status in (400, 422) and word in message), "")
    return message[:300] + (f" ({hint})" if hint else "")
