"""Endpoints that speak OpenAI's protocol: which there are, what they cost, and questions not paid for twice.

Every answer is appended to `.answers/NAME.jsonl` beside the output as it comes, keyed by everything that was sent, so
an interrupted run requests only what is missing. Only answers in flight at a kill can be paid for and lost.
"""

import fcntl
import os
import shutil
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feyntune.artifacts.artifact import sha256_json
from feyntune.environment import is_sendable, variable
from feyntune.errors import Interrupted, UserError
from feyntune.judging.replies import REFUSAL, describe_error, text_of, why_no_choices
from feyntune.names import BASE
from feyntune.network import httpx_options
from feyntune.telemetry import log, progress

GIVE_UP = 5  # failures in a row after which an endpoint is taken for broken
OVERHEAD = 64  # tokens that a chat template may add to a question


class Endpoint(BaseModel):
    """One model behind an OpenAI-compatible API."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9.-]*$", description="Name of the system or judge in tables: a-z, 0-9, . and -."
    )
    base_url: str = Field(description="Address up to and including `/v1`.")
    model: str = Field(description="The endpoint's name of the model.")
    key_env: str | None = Field(None, description="Environment variable that holds the key.")
    key_file: Path | None = Field(None, description="File that holds the key. Give at most one of the two.")
    api: Literal["chat", "completions"] = Field(
        "chat", description="`completions` for a base model, which continues text and has no chat template."
    )
    price_in: float = Field(0, ge=0, description="Price of a million prompt tokens, in a currency of your choice.")
    price_out: float = Field(0, ge=0, description="Price of a million completion tokens.")
    cap: float | None = Field(
        None,
        ge=0,
        description="Money that may be spent in one folder, earlier runs included. Required where a price is given.",
    )
    max_concurrent_requests: int = Field(4, ge=1, le=256, description="Requests in flight.")
    temperature: float | None = Field(
        0.7, ge=0, le=2, description="`null` leaves it to the endpoint, as some reasoning models require."
    )
    max_tokens: int = Field(1024, ge=1, description="Maximum tokens of an answer, reasoning included.")
    limit_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="The endpoint's name of that limit."
    )
    timeout: float = Field(120, gt=0, description="Seconds for one request.")
    retries: int = Field(
        6, ge=0, description="Retries of a request that timed out, was rate-limited or met a server error."
    )

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and "at_once" in value:  # before 0.2
            raise ValueError("at_once is now called max_concurrent_requests")
        return value

    @model_validator(mode="after")
    def _priced_means_capped(self) -> "Endpoint":
        if self.cap is None and (self.price_in or self.price_out):
            raise ValueError("a price needs a cap: say how much may be spent")
        return self

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
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError("must end before /chat/completions or /completions, as in https://api.example/v1")
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
            if key := variable(self.key_env):
                return self._sendable(key, self.key_env)
            raise UserError(f"Endpoint {self.name}: {self.key_env} is not in the environment: set it from a Secret.")
        if self.key_file:
            try:
                if key := self.key_file.read_text(encoding="utf-8-sig").strip():
                    return self._sendable(key, str(self.key_file))
            except UnicodeDecodeError:
                raise UserError(f"Endpoint {self.name}: {self.key_file} is no text: put the key alone in it.") from None
            except OSError as e:
                raise UserError(f"Endpoint {self.name}: {self.key_file}: {e.strerror}: mount the key there.") from e
            raise UserError(f"Endpoint {self.name}: {self.key_file} is empty: put the key into it.")
        return None

    def _sendable(self, key: str, where: str) -> str:
        if not is_sendable(key):
            raise UserError(
                f"Endpoint {self.name}: the key in {where} holds a line break, a space or a character that is not "
                "ASCII: copy it again."
            )
        return key

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
        parsed = _Endpoints.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}: give a file of endpoints (docs/people.md).") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"{path}{f', line {mark.line + 1}' if mark else ''}: invalid YAML, correct it.") from None
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if where in ("", "endpoints"):
            raise UserError(f"{path}: write a list under `endpoints:`, as docs/people.md shows.") from None
        raise UserError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from None
    names = [e.name for e in parsed.endpoints]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two endpoints have the same name: rename one.")
    return {e.name: e for e in parsed.endpoints}


class Question(NamedTuple):
    """`instruction` is the system message, which an endpoint of kind `completions` does not get."""

    instruction: str
    text: str


class Answer(BaseModel):
    """One answer in the journal.

    Attributes:
        metered: the endpoint counted the tokens; otherwise they are the most it can have been.
        unusable: why the answer is of no use (empty, refused, no judgment); such an answer is paid for, never reused.
    """

    key: str
    text: str
    finish: str
    tokens_in: int
    tokens_out: int
    metered: bool
    cost: float
    retries: int
    unusable: str | None = None


@dataclass
class Answers:
    """Answers in the order of the questions, None where there is none.

    Attributes:
        failures: why a question got no answer, or an unusable one, by number.
        unusable: of those, the unusable answers.
        stopped: why the rest was not asked, None if all was.
        spent: money, with earlier runs'; bought: answers of this run.
    """

    answers: list[Answer | None]
    failures: dict[int, str] = field(default_factory=dict)
    unusable: dict[int, Answer] = field(default_factory=dict)
    stopped: str | None = None
    spent: float = 0.0
    bought: int = 0

    def stats(self) -> dict[str, Any]:
        """Counts for a summary."""
        answers = [a for a in self.answers if a]
        return {
            "questions": len(self.answers),
            "answers": len(answers),
            "failed": len(self.failures) - len(self.unusable),
            "unusable": len(self.unusable),
            "reasons": dict(Counter(self.failures.values()).most_common()),
            "stopped": self.stopped,
            "tokens_in": sum(a.tokens_in for a in answers),
            "tokens_out": sum(a.tokens_out for a in answers),
            "cost": sum({a.key: a.cost for a in [*answers, *self.unusable.values()]}.values()),
            "repeated_requests": sum(a.retries for a in answers),
            "not_metered": sum(not a.metered for a in answers),
        }


def ask(
    endpoint: Endpoint,
    questions: Sequence[Question],
    beside: Path,
    check: Callable[[str], str | None] = lambda text: None,
) -> Answers:
    """Ask all questions, several at once, and keep each answer in `beside/.answers` as it comes.

    The client (openai) retries what was rate-limited (Retry-After is obeyed), timed out or met a server error. No
    question is sent that could exceed the cap: until its price is known, one counts as if the endpoint needed a token
    a byte and answered with all tokens it may. Answers without text, and those that `check` gives a reason against, are
    paid for and kept in the journal, and asked again by the next call.

    Raises:
        UserError: the key is missing or refused, the model is unknown, or GIVE_UP requests in a row failed.
        Interrupted: SIGTERM or SIGINT came; what was in flight has been waited for and kept.
    """
    import openai

    key = endpoint.key()
    http = openai.DefaultHttpxClient(**httpx_options(endpoint.base_url))
    client = openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=key or "none",
        timeout=endpoint.timeout,
        max_retries=endpoint.retries,
        http_client=http,
    )
    keys = [_key(endpoint, q) for q in questions]
    with client, _Journal(beside, endpoint.name) as journal, _Signals() as signals:
        waiting = deque((k, q) for k, q in dict(zip(keys, questions, strict=True)).items() if k not in journal.answers)
        if waiting and len(waiting) < len(keys):
            log.info("%s: %d of %d answers are in the journal", endpoint.name, len(keys) - len(waiting), len(keys))
        errors: dict[str, str] = {}
        stopped = broken = None
        in_a_row = bought = 0
        running: dict[Future[Answer], tuple[str, float]] = {}
        with (
            ThreadPoolExecutor(endpoint.max_concurrent_requests) as pool,
            progress(f"ask {endpoint.name}", len(waiting), "answers") as bar,
        ):
            while True:
                while (
                    waiting
                    and len(running) < endpoint.max_concurrent_requests
                    and not (stopped or broken or signals.came)
                ):
                    most = _most(endpoint, waiting[0][1])
                    committed = journal.spent + sum(m for _, m in running.values()) + most
                    if endpoint.cap is not None and committed > endpoint.cap:
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
                    error: openai.OpenAIError | ValueError | None = None
                    try:
                        answer = future.result()
                        reason = _unusable(answer, endpoint, check)
                        journal.add(answer.model_copy(update={"unusable": reason}))
                    except (openai.OpenAIError, ValueError) as e:
                        error = e
                    if error is not None:  # outside of `except`: a log that fails would print it, perhaps with the key
                        errors[k] = describe_error(error, key)
                        in_a_row += 1
                        fatal = getattr(error, "status_code", None) in (401, 402, 403, 404) or _out_of_quota(error)
                        if fatal or in_a_row >= GIVE_UP:
                            broken = errors[k]
                        log.warning("%s: no answer: %s", endpoint.name, errors[k])
                    else:
                        in_a_row, bought = 0, bought + 1
                        if reason:
                            log.warning("%s: unusable answer: %s", endpoint.name, reason)
                    bar.advance(1, spent=float(journal.spent))
        if signals.came:
            raise Interrupted(f"{bought} answers of {endpoint.name} are saved")
        if broken:
            raise UserError(
                f"Endpoint {endpoint.name} gives no answers ({broken}): correct it and start again, the answers it "
                "gave are saved."
            )
        answers = [journal.answers.get(k) for k in keys]
        unusable = {i: journal.unusable[k] for i, k in enumerate(keys) if k in journal.unusable}
        failures = {i: errors[k] for i, k in enumerate(keys) if k in errors}
        failures |= {i: a.unusable or "" for i, a in unusable.items()}
        if stopped:
            log.warning("%s %s: %d questions of %d not asked", endpoint.name, stopped, answers.count(None), len(keys))
        return Answers(answers, failures, unusable, stopped, journal.spent, bought)


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
        raise ValueError(why_no_choices(raw, body))
    text = text_of(choices[0].message if endpoint.api == "chat" else choices[0])
    usage = body.usage
    tokens_in, tokens_out = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    metered = isinstance(tokens_in, int) and isinstance(tokens_out, int)
    if not (isinstance(tokens_in, int) and isinstance(tokens_out, int)):
        tokens_in = len((question.instruction + question.text).encode()) + OVERHEAD
        tokens_out = endpoint.max_tokens
    return Answer(
        key=key,
        text=text,
        finish=choices[0].finish_reason or "unknown",
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        metered=metered,
        cost=(tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6,
        retries=raw.retries_taken,
    )


_FILTERED = ("content_filter", "refusal", "SAFETY", "RECITATION", "PROHIBITED_CONTENT", "safety")


def _unusable(answer: Answer, endpoint: Endpoint, check: Callable[[str], str | None]) -> str | None:
    """Why an answer is of no use, with what to change; None where it is of use."""
    if answer.text == REFUSAL or (answer.finish in _FILTERED and not answer.text.strip()):
        return "the endpoint refused to answer"
    if answer.finish in _FILTERED:
        return "the endpoint's filter cut the answer off"
    if not answer.text.strip():
        if answer.finish == "length":
            return (
                f"no text: all {answer.tokens_out} tokens went into reasoning, raise max_tokens ({endpoint.max_tokens})"
            )
        return "no text" if answer.finish in ("stop", "unknown") else f"no text (finish_reason {answer.finish[:40]})"
    reason = check(answer.text)
    return f"{reason} (cut off at max_tokens)" if reason and answer.finish == "length" else reason


def _out_of_quota(error: Exception) -> bool:
    """Whether a 429 is no rate limit but an account without money, which no retry helps (OpenAI)."""
    return getattr(error, "code", None) == "insufficient_quota"


class _Journal:
    """Answers by key in an append-only file; a line torn by a kill is cut off, and two runs cannot write at once."""

    def __init__(self, beside: Path, name: str):
        self.path = beside / ".answers" / f"{name}.jsonl"
        self.answers: dict[str, Answer] = {}
        self.unusable: dict[str, Answer] = {}
        self.spent = 0.0

    def __enter__(self) -> "_Journal":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self.file.close()
            raise UserError(f"{self.path} is in use by another run: wait for it.") from e
        except OSError as e:  # some network file systems have no locks
            log.warning("%s: %s: make sure that no other run writes there", self.path, e.strerror)
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
            self._count(answer)
            whole += len(line)
        self.file.truncate(whole)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.file.close()

    def add(self, answer: Answer) -> None:
        self.file.write(answer.model_dump_json().encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self._count(answer)

    def _count(self, answer: Answer) -> None:
        self.spent += answer.cost
        if answer.unusable:
            self.unusable[answer.key] = answer
        else:
            self.answers[answer.key] = answer
            self.unusable.pop(answer.key, None)


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
    """Whether answers are missing, by `Answers.stats`: the cap was met, requests failed or answers were unusable."""
    return bool(stats["stopped"] or stats["failed"] or stats.get("unusable"))


def archive_partial(out: Path) -> None:
    """Rename a partial result to NAME.part, so that the complete one can be written. Its answers are in the journal."""
    partial_path = out.with_name(f"{out.name}.part")
    shutil.rmtree(partial_path, ignore_errors=True)
    os.replace(out, partial_path)
    log.info("%s is partial and was moved to %s; requesting only what is missing", out, partial_path)
