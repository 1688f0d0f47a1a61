"""A server that speaks OpenAI's chat completions and completions, with the faults real ones have, over real HTTP.

`answer` makes the text of an answer from a request's body. `faults` maps the number of a request to one of FAULTS;
`always` is the fault of every other one.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

FAULTS = (
    "429",  # too many requests, with Retry-After
    "500",
    "400",  # refused for its content
    "401",  # repeats the key, as some servers do
    "404",  # no such model
    "stall",  # no answer for longer than a short time-out
    "malformed",  # HTTP 200 with broken JSON
    "empty",  # HTTP 200 and JSON of another kind
    "cut",  # the connection ends in the middle of the body
    "unmetered",  # a good answer without `usage`
    "length",  # an answer that met its limit
    "null usage",  # usage without numbers
    "402",  # no money left (DeepSeek)
    "quota",  # no money left (OpenAI)
    "temperature",  # a setting the model does not take
)


@dataclass
class OpenAI:
    """The protocol; a WSGI application."""

    answer: Callable[[dict[str, Any]], str]
    key: str | None = None
    faults: dict[int, str] = field(default_factory=dict)
    always: str | None = None
    retry_after: float = 1.0
    stall: float = 3.0
    before_answer: Callable[[int], None] | None = None  # called with the number of each request
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: int = 0  # requests that were paid for
    most_at_once: int = 0
    message: dict[str, Any] | None = None  # in place of the message of a chat answer
    finish: str | None = None
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.now = 0

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        with self.lock:
            self.requests.append(json.loads(request.get_data() or b"{}"))
            self.headers.append(dict(request.headers))
            self.times.append(time.monotonic())
            number = len(self.requests)
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        try:
            if self.before_answer:
                self.before_answer(number)
            response = self._respond(request, number)
        finally:
            with self.lock:
                self.now -= 1
        return response(environ, start_response)

    def _respond(self, request: Request, number: int) -> Response:
        body, fault = self.requests[number - 1], self.faults.get(number, self.always)
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if fault == "401" or (self.key is not None and given != self.key):
            return _error(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        if fault == "404":
            return _error(404, f"The model {body.get('model')} does not exist.", "model_not_found")
        if fault == "429":
            return _error(429, "Rate limit reached.", "rate_limit", {"Retry-After": f"{self.retry_after:g}"})
        if fault == "500":
            return _error(500, "The server had an error.", "server_error")
        if fault == "400":
            return _error(400, "The content was filtered.", "content_filter")
        if fault == "402":
            return _error(402, "Insufficient Balance", "invalid_request_error")
        if fault == "quota":
            return _error(429, "You exceeded your current quota.", "insufficient_quota")
        if fault == "temperature":
            return _error(400, "Unsupported value: 'temperature' does not support 0.7.", "unsupported_value")
        if fault == "stall":
            time.sleep(self.stall)
        chat = request.path == "/v1/chat/completions"
        if not chat and request.path != "/v1/completions":
            return _error(404, "There is no such path.", "not_found")
        if fault == "empty":
            return _json({"status": "ok"})
        text = self.answer(body)
        finish = "length" if fault == "length" else "stop"
        asked = "".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text, "logprobs": None}
        answer: dict[str, Any] = {
            "id": f"answer-{number}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": finish, **part}],
        }
        if self.message is not None:
            answer["choices"][0] |= {"message": self.message, "finish_reason": self.finish}
        if fault != "unmetered":
            sizes = (len(asked.split()), len(text.split()))
            answer["usage"] = {
                "prompt_tokens": sizes[0],
                "completion_tokens": sizes[1],
                "total_tokens": sum(sizes),
            }
        if fault == "null usage":
            answer["usage"] = {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None}
        with self.lock:
            self.answered += 1
        raw = json.dumps(answer).encode()
        if fault == "malformed":
            return Response(raw[: len(raw) // 2], mimetype="application/json")
        response = Response(raw, mimetype="application/json")
        if fault == "cut":
            response = Response([raw[: len(raw) // 2]], mimetype="application/json")  # a list: no length is set
            response.automatically_set_content_length = False
            response.headers["Content-Length"] = str(len(raw))
        return response

    @contextmanager
    def running(self) -> Iterator["OpenAI"]:
        server = make_server("127.0.0.1", 0, self, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.port}/v1"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, mimetype="application/json")


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": {"message": message, "type": code, "code": code, "param": None}}, status, headers)
