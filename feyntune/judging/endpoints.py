"""Endpoints that speak OpenAI's protocol: which there are, what they cost, and questions not paid for twice.

Every answer is appended to `.answers/NAME.jsonl` beside the output as it comes, keyed by everything that was sent, so
a killed run goes on with what is missing. Only answers in flight at a kill can be paid for and lost.
"""

import fcntl
import os
import shutil
import signal
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feyntune.artifacts.artifact import sha256_json
from feyntune.errors import Interrupted, UserError
from feyntune.names import BASE
from feyntune.telemetry import log, progress

GIVE_UP = 5  # failures in a row after which an endpoint is taken for broken
OVERHEAD = 64  # tokens that a chat template may add to a question


class Endpoint(BaseModel):
    """One model behind an OpenAI-compatible API.

    Attributes:
        name: how the system or judge is called in tables.
        base_url: up to and with `/v1`.
        key_env, key_file: where its key is; at most one, neither for an endpoint that asks for none.
        api: `chat`, or `completions` for a model that only continues text.
        price_in, price_out: money for a million tokens, in a currency of your choice.
        cap: money that may be spent on all questions of one output folder, this run's and earlier ones'.
        at_once: requests in flight.
        temperature: None leaves it to the endpoint, as some reasoning models demand.
        max_tokens, limit_field: most tokens of an answer, and what the endpoint calls that limit.
        timeout: seconds for one request. retries: of one that timed out, was refused for its rate or met a fault.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    base_url: str
    model: str
    key_env: str | None = None
    key_file: Path | None = None
    api: Literal["chat", "completions"] = "chat"
    price_in: float = Field(ge=0)
    price_out: float = Field(ge=0)
    cap: float = Field(ge=0)
    at_once: int = Field(4, ge=1, le=256)
    temperature: float | None = Field(0.7, ge=0, le=2)
    max_tokens: int = Field(1024, ge=1)
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    timeout: float = Field(120, gt=0)
    retries: int = Field(6, ge=0)

    @field_validator("name")
    @classmethod
    def _not_the_base(cls, name: str) -> str:
        if name == BASE:
            raise ValueError(f"{BASE!r} is the base model's name, choose another")
        return name

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an http(s) address such as https://api.example/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("must hold no key: name a variable (key_env) or a file (key_file) that holds it")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _one_key(self) -> "Endpoint":
        if self.key_env and self.key_file:
            raise ValueError("give key_env or key_file, not both")
        return self

    def key(self) -> str | None:
        """The key; it is never stored or logged.

        Raises:
            UserError: the variable or file is not there or empty.
        """
        if self.key_env:
            if key := os.environ.get(self.key_env, "").strip():
                return key
            raise UserError(f"Endpoint {self.name}: {self.key_env} is not in the environment: set it from a Secret.")
        if self.key_file:
            try:
                if key := self.key_file.read_text().strip():
                    return key
            except OSError as e:
                raise UserError(f"Endpoint {self.name}: {self.key_file}: {e.strerror}: mount the key there.") from e
            raise UserError(f"Endpoint {self.name}: {self.key_file} is empty: put the key into it.")
        return None

    def public(self) -> dict[str, Any]:
        """What tells how answers were made, for manifests: nothing of the key, not even where it is."""
        return self.model_dump(mode="json", include={"name", "base_url", "model", "api", "temperature", "max_tokens"})


class _Endpoints(BaseModel):
    model_config = ConfigDict(extra="forbid")

    endpoints: list[Endpoint] = Field(min_length=1)


def load_endpoints(path: str | Path) -> dict[str, Endpoint]:
    """The endpoints of a YAML (or JSON) file, by name.

    Raises:
        UserError: no such file, not YAML, or a field that is wrong (named; its value is not repeated, it may be a key).
    """
    try:
        parsed = _Endpoints.model_validate(yaml.safe_load(Path(path).read_text()))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}: give a file of endpoints (components/evaluate/README.md).") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: this is not YAML, correct it.") from None
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from None
    names = [e.name for e in parsed.endpoints]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two endpoints have the same name: every name must be its own.")
    return {e.name: e for e in parsed.endpoints}


class Question(NamedTuple):
    """`instruction` is the system message, which an endpoint of kind `completions` does not get."""

    instruction: str
    text: str


class Answer(BaseModel):
    """One answer as it is kept. `metered`: the endpoint counted the tokens; otherwise the most it can have been."""

    key: str
    text: str
    finish: str
    tokens_in: int
    tokens_out: int
    metered: bool
    cost: float
    retries: int


@dataclass
class Answers:
    """Answers in the order of the questions, None where there is none.

    Attributes:
        failures: of questions that got no answer, by number: why.
        stopped: why the rest was not asked, None if all was.
        spent: money, with earlier runs'; bought: answers of this run.
    """

    answers: list[Answer | None]
    failures: dict[int, str] = field(default_factory=dict)
    stopped: str | None = None
    spent: float = 0.0
    bought: int = 0

    def stats(self) -> dict[str, Any]:
        """Counts for a summary."""
        answers = [a for a in self.answers if a]
        return {
            "questions": len(self.answers),
            "answers": len(answers),
            "failed": len(self.failures),
            "stopped": self.stopped,
            "tokens_in": sum(a.tokens_in for a in answers),
            "tokens_out": sum(a.tokens_out for a in answers),
            "cost": sum(a.cost for a in {a.key: a for a in answers}.values()),
            "repeated_requests": sum(a.retries for a in answers),
            "not_metered": sum(not a.metered for a in answers),
        }


def ask(endpoint: Endpoint, questions: Sequence[Question], beside: Path) -> Answers:
    """Ask all questions, several at once, and keep each answer in `beside/.answers` as it comes.

    The client (openai) repeats what was refused for its rate (Retry-After is obeyed), timed out or met a fault. No
    question is sent that could exceed the cap: until its price is known, one counts as if the endpoint needed a token
    a byte and answered with all tokens it may.

    Raises:
        UserError: the key is missing or refused, the model is unknown, or GIVE_UP requests in a row failed.
        Interrupted: SIGTERM or SIGINT came; what was in flight has been waited for and kept.
    """
    import openai

    key = endpoint.key()
    client = openai.OpenAI(
        base_url=endpoint.base_url, api_key=key or "none", timeout=endpoint.timeout, max_retries=endpoint.retries
    )
    keys = [_key(endpoint, q) for q in questions]
    with client, _Journal(beside, endpoint.name) as journal, _Signals() as signals:
        waiting = deque((k, q) for k, q in dict(zip(keys, questions, strict=True)).items() if k not in journal.answers)
        if waiting and len(waiting) < len(keys):
            log.info("%s: %d of %d answers are there already", endpoint.name, len(keys) - len(waiting), len(keys))
        errors: dict[str, str] = {}
        stopped = broken = None
        in_a_row = bought = 0
        running: dict[Future[Answer], tuple[str, float]] = {}
        with (
            ThreadPoolExecutor(endpoint.at_once) as pool,
            progress(f"ask {endpoint.name}", len(waiting), "answers") as bar,
        ):
            while True:
                while waiting and len(running) < endpoint.at_once and not (stopped or broken or signals.came):
                    most = _most(endpoint, waiting[0][1])
                    if journal.spent + sum(m for _, m in running.values()) + most > endpoint.cap:
                        if running:  # what is in flight may turn out cheaper than it could be
                            break
                        stopped = (
                            f"stopped before the cap of {endpoint.cap:g}: {journal.spent:.4g} is spent and the next "
                            f"answer may cost {most:.2g}"
                        )
                        break
                    k, question = waiting.popleft()
                    running[pool.submit(_request, client, endpoint, k, question)] = (k, most)
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    k, _ = running.pop(future)
                    try:
                        journal.add(future.result())
                    except (openai.OpenAIError, ValueError) as e:
                        errors[k] = _reason(e, key)
                        in_a_row += 1
                        fatal = isinstance(
                            e, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError
                        )
                        if fatal or in_a_row >= GIVE_UP:
                            broken = errors[k]
                        log.warning("%s: no answer: %s", endpoint.name, errors[k])
                    else:
                        in_a_row, bought = 0, bought + 1
                    bar.advance(1, spent=float(journal.spent))
        if signals.came:
            raise Interrupted(f"{bought} answers of {endpoint.name} are kept")
        if broken:
            raise UserError(
                f"Endpoint {endpoint.name} gives no answers ({broken}): correct it and start again, the answers it "
                "gave are kept."
            )
        answers = [journal.answers.get(k) for k in keys]
        failures = {i: errors[k] for i, k in enumerate(keys) if k in errors}
        if stopped:
            log.warning("%s %s: %d questions of %d not asked", endpoint.name, stopped, answers.count(None), len(keys))
        return Answers(answers, failures, stopped, journal.spent, bought)


def _key(endpoint: Endpoint, question: Question) -> str:
    """Of everything that decides an answer: the same question to the same model is one purchase."""
    return sha256_json([endpoint.public(), list(question)])


def _most(endpoint: Endpoint, question: Question) -> float:
    """What an answer can cost at most: no tokenizer in use needs more than a token a byte."""
    size = len((question.instruction + question.text).encode()) + OVERHEAD
    return (size * endpoint.price_in + endpoint.max_tokens * endpoint.price_out) / 1e6


def _request(client: Any, endpoint: Endpoint, key: str, question: Question) -> Answer:
    settings: dict[str, Any] = {"model": endpoint.model, endpoint.limit_field: endpoint.max_tokens}
    if endpoint.temperature is not None:
        settings["temperature"] = endpoint.temperature
    if endpoint.api == "chat":
        messages = [{"role": "system", "content": question.instruction}, {"role": "user", "content": question.text}]
        raw = client.chat.completions.with_raw_response.create(messages=messages, **settings)
    else:
        raw = client.completions.with_raw_response.create(prompt=question.text, **settings)
    body = raw.parse()
    choices = getattr(body, "choices", None)
    if not choices:
        raise ValueError("the answer is not of the protocol: it holds no choices")
    text = choices[0].message.content if endpoint.api == "chat" else choices[0].text
    usage = body.usage
    if usage is None:
        tokens_in = len((question.instruction + question.text).encode()) + OVERHEAD
        tokens_out = endpoint.max_tokens
    else:
        tokens_in, tokens_out = usage.prompt_tokens, usage.completion_tokens
    return Answer(
        key=key,
        text=text or "",
        finish=choices[0].finish_reason or "unknown",
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        metered=usage is not None,
        cost=(tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6,
        retries=raw.retries_taken,
    )


def _reason(error: Exception, key: str | None) -> str:
    """One line about an error, without the key, which some servers repeat."""
    status = getattr(error, "status_code", None)
    message = " ".join(f"{f'HTTP {status}, ' if status else ''}{type(error).__name__}: {error}".split())
    if key:
        message = message.replace(key, "***")
    return message[:300]


class _Journal:
    """Answers by key in an append-only file; a line torn by a kill is cut off, and two runs cannot write at once."""

    def __init__(self, beside: Path, name: str):
        self.path = beside / ".answers" / f"{name}.jsonl"
        self.answers: dict[str, Answer] = {}
        self.spent = 0.0

    def __enter__(self) -> "_Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self.file.close()
            raise UserError(f"{self.path} is in use by another run: wait for it.") from e
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                answer = Answer.model_validate_json(line)
            except ValueError as e:
                self.file.close()
                raise UserError(f"{self.path} is damaged at byte {whole}: remove it, its answers are lost.") from e
            self.answers[answer.key] = answer
            self.spent += answer.cost
            whole += len(line)
        self.file.truncate(whole)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()

    def add(self, answer: Answer) -> None:
        self.file.write(answer.model_dump_json().encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.answers[answer.key] = answer
        self.spent += answer.cost


class _Signals:
    """Whether SIGTERM or SIGINT came; the first one is only noted, so that answers in flight are kept."""

    def __init__(self) -> None:
        self.came = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if current_thread() is main_thread():
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.came:  # asked twice
            raise KeyboardInterrupt
        self.came = True
        log.warning("stopping: waiting for the answers in flight")


def is_partial(stats: dict[str, Any]) -> bool:
    """Whether answers are missing, by `Answers.stats`: the cap was met, or requests failed."""
    return bool(stats["stopped"] or stats["failed"])


def archive_partial(out: Path) -> None:
    """Make room for the whole of a result that is there in part, which stays as NAME.part. Its answers were kept."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    os.replace(out, part)
    log.info("%s was there in part, now in %s; only what is missing is asked for", out, part)
