"""Asking endpoints: over real HTTP, with real faults, killed and resumed."""

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from feyntune.errors import UserError
from feyntune.judging.endpoints import Endpoint, Question, ask, load_endpoints
from tests.servers import plain_http
from tests.servers.openai import OpenAI

KEY = "sk-test-0123456789abcdef"


def echo(body):
    return "echo " + body["messages"][-1]["content"]


@pytest.fixture
def server():
    with OpenAI(echo).running() as running:
        yield running


def endpoint(server, **changes):
    settings = {"name": "some-model", "base_url": server.url, "model": "big-1", "price_in": 1, "price_out": 10}
    settings |= {"cap": 100, "timeout": 10, "max_concurrent_requests": 1}
    return Endpoint.model_validate({**settings, **changes})


def questions(count):
    return [Question("Repeat.", f"word {i}") for i in range(count)]


def texts(answers):
    return [a.text if a else None for a in answers.answers]


def test_answers_come_in_the_order_of_the_questions_and_several_at_once(server, tmp_path):
    server.before_answer = lambda number: time.sleep(0.05 * (number % 3))
    result = ask(endpoint(server, max_concurrent_requests=4), questions(20), tmp_path)
    assert texts(result) == [f"echo word {i}" for i in range(20)]
    assert 1 < server.most_at_once <= 4


def test_what_is_sent_is_what_is_configured(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_KEY", KEY)
    server.key = KEY
    ask(endpoint(server, key_env="MODEL_KEY", temperature=0.3, max_tokens=77), questions(1), tmp_path)
    assert server.requests[-1] == {
        "model": "big-1",
        "temperature": 0.3,
        "max_tokens": 77,
        "messages": [{"role": "system", "content": "Repeat."}, {"role": "user", "content": "word 0"}],
    }
    reasoning = endpoint(
        server, key_env="MODEL_KEY", temperature=None, limit_field="max_completion_tokens", max_tokens=5
    )
    ask(reasoning, questions(1), tmp_path)
    assert "temperature" not in server.requests[-1]
    assert server.requests[-1]["max_completion_tokens"] == 5
    server.answer = lambda body: body["prompt"] + " and on"
    result = ask(endpoint(server, key_env="MODEL_KEY", api="completions"), questions(1), tmp_path)
    assert texts(result) == ["word 0 and on"]
    assert "messages" not in server.requests[-1]


def test_nothing_is_asked_twice(server, tmp_path):
    first = ask(endpoint(server), questions(5), tmp_path)
    again = ask(endpoint(server), questions(8), tmp_path)
    assert texts(again)[:5] == texts(first)
    assert server.answered == 8
    assert (first.bought, again.bought) == (5, 3)
    ask(endpoint(server, temperature=0.1), questions(1), tmp_path)  # another question
    assert server.answered == 9


def test_the_same_question_twice_is_one_purchase(server, tmp_path):
    result = ask(endpoint(server), questions(2) * 3, tmp_path)
    assert texts(result) == ["echo word 0", "echo word 1"] * 3
    assert server.answered == 2
    assert result.stats()["cost"] == pytest.approx(result.spent)


def test_a_torn_last_line_is_asked_again_and_a_damaged_journal_is_refused(server, tmp_path):
    ask(endpoint(server), questions(3), tmp_path)
    journal = tmp_path / ".answers" / "some-model.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-30])
    assert texts(ask(endpoint(server), questions(3), tmp_path)) == ["echo word 0", "echo word 1", "echo word 2"]
    assert server.answered == 4
    assert None not in texts(ask(endpoint(server), questions(3), tmp_path))  # nothing of the torn line is left
    assert server.answered == 4
    journal.write_bytes(b"rubbish\n" + whole)
    with pytest.raises(UserError, match="damaged at byte 0"):
        ask(endpoint(server), questions(3), tmp_path)


def test_two_runs_cannot_pay_for_the_same_max_concurrent_requests(server, tmp_path):
    inside, go = threading.Event(), threading.Event()
    server.before_answer = lambda number: (inside.set(), go.wait(30))
    one = threading.Thread(target=ask, args=(endpoint(server), questions(1), tmp_path))
    one.start()
    assert inside.wait(30)
    with pytest.raises(UserError, match="in use by another run"):
        ask(endpoint(server), questions(1), tmp_path)
    go.set()
    one.join()
    assert server.answered == 1


@pytest.mark.parametrize("fault", ["429", "500", "cut", "stall"])
def test_a_passing_fault_is_met_by_asking_again(server, tmp_path, fault):
    server.faults = {2: fault}
    result = ask(endpoint(server, timeout=0.5 if fault == "stall" else 10), questions(3), tmp_path)
    assert texts(result) == ["echo word 0", "echo word 1", "echo word 2"]
    assert len(server.requests) == 4
    assert result.stats()["repeated_requests"] == 1
    if fault == "429":
        assert server.times[2] - server.times[1] >= server.retry_after  # the client's own pause is shorter


@pytest.mark.parametrize(
    ("fault", "message"), [("malformed", "JSON"), ("empty", "no choices"), ("400", "content was filtered")]
)
def test_a_question_without_an_answer_is_named_counted_and_asked_again_by_the_next_run(
    server, tmp_path, fault, message
):
    server.faults = {2: fault}
    result = ask(endpoint(server, retries=0), questions(3), tmp_path)
    assert texts(result) == ["echo word 0", None, "echo word 2"]
    assert message in result.failures[1]
    assert result.stats()["failed"] == 1
    assert texts(ask(endpoint(server), questions(3), tmp_path))[1] == "echo word 1"
    assert len(server.requests) == 4


def test_an_endpoint_that_keeps_failing_is_given_up_with_what_it_gave_kept(server, tmp_path):
    server.faults = dict.fromkeys(range(3, 100), "500")
    with pytest.raises(UserError, match=r"some-model gives no answers \(HTTP 500"):
        ask(endpoint(server, retries=0), questions(50), tmp_path)
    assert len(server.requests) == 7
    server.faults = {}
    assert None not in texts(ask(endpoint(server), questions(50), tmp_path))
    assert server.answered == 50


def test_an_unknown_model_is_said_max_concurrent_requests(server, tmp_path):
    server.always = "404"
    with pytest.raises(UserError, match="big-1 does not exist"):
        ask(endpoint(server), questions(50), tmp_path)
    assert len(server.requests) == 1


def test_the_cost_is_that_of_the_tokens(server, tmp_path):
    result = ask(endpoint(server), questions(4), tmp_path)
    stats = result.stats()
    assert (stats["tokens_in"], stats["tokens_out"]) == (4 * 2, 4 * 3)  # the server counts words
    assert stats["cost"] == pytest.approx((8 * 1 + 12 * 10) / 1e6)
    assert result.spent == pytest.approx(stats["cost"])


def test_an_answer_without_counts_costs_the_most_it_can(server, tmp_path):
    server.always = "unmetered"
    stats = ask(endpoint(server, max_tokens=50), questions(2), tmp_path).stats()
    assert stats["not_metered"] == 2
    assert stats["tokens_out"] == 100
    assert stats["cost"] > 2 * 50 * 10 / 1e6


@pytest.mark.parametrize("max_concurrent_requests", [1, 4])
def test_the_cap_is_never_passed_and_what_there_is_is_given(server, tmp_path, max_concurrent_requests):
    server.answer = lambda body: "word " * 100  # exactly as long as it may be
    capped = endpoint(server, max_tokens=100, cap=0.0105, max_concurrent_requests=max_concurrent_requests)
    result = ask(capped, questions(50), tmp_path)
    assert 0.008 < result.spent <= 0.0105
    assert result.stopped
    assert "before the cap of 0.0105" in result.stopped
    assert result.answers.count(None) == 50 - result.bought
    assert not result.failures
    again = ask(capped, questions(50), tmp_path)  # the cap holds for all runs together
    assert again.bought == 0
    assert server.answered == result.bought
    more = ask(endpoint(server, max_tokens=100, cap=1), questions(50), tmp_path)
    assert None not in more.answers
    assert server.answered == 50


RUN = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from feyntune.judging.endpoints import Endpoint, Question, ask
    from feyntune.errors import Interrupted
    settings = {"price_in": 1, "price_out": 1, "cap": 9, "max_concurrent_requests": 2, "timeout": 60}
    e = Endpoint(name="m", base_url=sys.argv[1], model="b", **settings)
    try:
        result = ask(e, [Question("", f"word {i}") for i in range(12)], Path(sys.argv[2]))
    except Interrupted as stop:
        print(stop)
        sys.exit(75)
    print(sum(a is not None for a in result.answers))
    """
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_and_pays_nothing_twice(server, tmp_path, how):
    go = threading.Event()

    def hold(number):
        if number >= 7:
            go.wait(60)

    server.before_answer = hold
    command = [sys.executable, "-c", RUN, server.url, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    journal = tmp_path / ".answers" / "m.jsonl"
    while len(server.requests) < 8 or journal.read_bytes().count(b"\n") < 6:  # six are kept, two in flight
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    if how == signal.SIGKILL:
        process.wait()
    go.set()
    message = process.communicate()[0]
    stored = len(journal.read_bytes().splitlines())
    if how != signal.SIGKILL:  # what was in flight was waited for
        assert process.returncode == 75
        assert stored == server.answered == 8
        assert f"{stored} answers" in message
    server.before_answer = None
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "12\n"
    assert len(server.requests) == 12 + (2 if how == signal.SIGKILL else 0)
    asked = [r["messages"][-1]["content"] for r in server.requests]
    assert set(asked) == {f"word {i}" for i in range(12)}


@pytest.fixture
def log_that_fails(monkeypatch):
    """The project's log writes to a closed stream: Python prints what it was doing to standard error."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(logging.getLogger("feyntune"), "handlers", [logging.StreamHandler(closed)])


def test_the_key_is_nowhere_but_in_the_request(server, tmp_path, capfd, log_that_fails):
    key_file = tmp_path / "secret" / "key"
    key_file.parent.mkdir()
    key_file.write_text(KEY + "\n")
    server.key = KEY
    out = tmp_path / "out"
    keyed = endpoint(server, key_file=str(key_file))
    ask(keyed, questions(3), out)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    server.faults = {4: "401"}  # answers with the key in its message
    with pytest.raises(UserError, match=r"Incorrect API key provided: \*\*\*") as given:
        ask(keyed, questions(4), out)
    assert KEY not in str(given.value)
    assert KEY not in "".join(capfd.readouterr())
    assert KEY not in json.dumps(keyed.public())
    for path in out.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


GOOD = """
    endpoints:
      - {name: judge, base_url: "https://api.example/v1/", model: m, price_in: 2.5, price_out: 10, cap: 5, key_env: K}
      - {name: other, base_url: "http://127.0.0.1:1/v1", model: n, price_in: 0, price_out: 0, cap: 0}
"""


def test_a_file_of_endpoints(tmp_path, monkeypatch):
    result = load_endpoints(write(tmp_path / "e.yaml", GOOD))
    assert list(result) == ["judge", "other"]
    assert result["judge"].base_url == "https://api.example/v1"
    assert result["other"].key() is None
    monkeypatch.delenv("K", raising=False)
    with pytest.raises(UserError, match="K is not in the environment"):
        result["judge"].key()
    monkeypatch.setenv("K", " abc\n")
    assert result["judge"].key() == "abc"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("key_env: K", "key: sk-secret-1"), "endpoints.0.key: Extra inputs are not permitted"),
        (("api.example/v1/", "me:sk-secret-1@api.example/v1"), "must hold no key"),
        (("v1/", "v1?key=sk-secret-1"), "must hold no key"),
        (("cap: 5,", ""), "a price needs a cap"),
        (("cap: 5,", "cap: 5, at_once: 2,"), "at_once is now called max_concurrent_requests"),
        (("key_env: K", "key_env: K, key_file: /x"), "not both"),
        (("name: judge", "name: base"), "choose another"),
        (("name: judge", "name: other"), "the same name"),
        (("endpoints:", "endpoints: ["), "line"),
        (("https://", "ftp://"), "http"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_field_and_without_its_value(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as given:
        load_endpoints(write(tmp_path / "e.yaml", GOOD.replace(*change)))
    assert "sk-secret-1" not in str(given.value)


@pytest.mark.parametrize(
    ("content", "finish", "text", "reason"),
    [
        (None, "length", None, "raise max_tokens (1024)"),
        ("", "stop", None, "no text"),
        ("<think>so long that", "length", None, "raise max_tokens (1024)"),
        ("<think>hm</think>\n fine", "stop", "\n fine", None),
        ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "fine"}], "stop", "fine", None),
        (None, "content_filter", None, "refused"),
    ],
)
def test_answers_without_text_are_told_apart_and_asked_again(server, tmp_path, content, finish, text, reason):
    server.message, server.finish = {"role": "assistant", "content": content}, finish
    result = ask(endpoint(server), questions(1), tmp_path)
    assert texts(result) == [text]
    assert (reason is None) == (not result.failures)
    if reason:
        assert reason in result.failures[0]
        assert result.stats()["unusable"] == 1
        server.message = None
        assert texts(ask(endpoint(server), questions(1), tmp_path)) == ["echo word 0"]


def test_usage_that_is_null_is_counted_as_the_most_it_can_be(server, tmp_path):
    server.faults = {1: "null usage"}
    result = ask(endpoint(server), questions(1), tmp_path)
    assert texts(result) == ["echo word 0"]
    assert result.stats()["not_metered"] == 1


@pytest.mark.parametrize("fault", ["402", "quota"])
def test_an_account_without_money_stops_at_once(server, tmp_path, fault):
    server.always = fault
    with pytest.raises(UserError, match="gives no answers"):
        ask(endpoint(server, retries=0, max_concurrent_requests=1), questions(5), tmp_path)
    assert len(server.requests) == 1


def test_a_refused_setting_is_named(server, tmp_path):
    server.always = "temperature"
    with pytest.raises(UserError, match="set temperature: null"):
        ask(endpoint(server, retries=0, max_concurrent_requests=1), questions(9), tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_serves(server, tmp_path, monkeypatch, number):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("feyntune.judging.endpoints.fcntl.flock", no_locks)
    assert texts(ask(endpoint(server), questions(2), tmp_path)) == ["echo word 0", "echo word 1"]


def test_a_local_endpoint_needs_no_price_and_no_cap():
    local = Endpoint.model_validate({"name": "local", "base_url": "http://127.0.0.1:1/v1", "model": "m"})
    assert (local.price_in, local.price_out, local.cap) == (0, 0, None)


def _answering(status: int, body: object, kind: str = "application/json"):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda method, path: (status, {"content-type": kind}, raw)


def _chat(content: object, finish: str = "stop") -> dict:
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}], "model": "m", "id": "i"}


def _ask_one(answer, folder, **changes):
    with plain_http.serving(answer) as server:
        settings = {"name": "m", "base_url": f"{server.url}/v1", "model": "x", "retries": 0, "timeout": 10, **changes}
        return ask(Endpoint.model_validate(settings), questions(1), folder)


@pytest.mark.parametrize(
    "content",
    [
        "<think>a</think>B",
        "the template began it\n</think>\n\nB",
        "[THINK]a[/THINK]B",
        "<reasoning>a</reasoning> B",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>B",
        [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}, {"type": "output_text", "text": "B"}],
    ],
)
def test_reasoning_is_no_part_of_an_answer(tmp_path, content):
    assert [t.strip() for t in texts(_ask_one(_answering(200, _chat(content)), tmp_path))] == ["B"]


@pytest.mark.parametrize(
    ("content", "finish", "reason"),
    [
        ("<think>unfinished", "length", "all .* tokens went into reasoning"),
        ("half an ans", "content_filter", "the endpoint's filter cut the answer off"),
        ("", "SAFETY", "the endpoint refused to answer"),
        (None, "tool_calls", r"no text \(finish_reason tool_calls\)"),
    ],
)
def test_an_answer_of_no_use_says_why(tmp_path, content, finish, reason):
    result = _ask_one(_answering(200, _chat(content, finish)), tmp_path)
    assert result.answers == [None]
    assert re.search(reason, result.failures[0])


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_answering(200, {"error": {"message": "Provider returned error"}}), "but the error: Provider returned error"),
        (_answering(200, b"<html>Sign in", "text/html"), "a web page answers: check base_url"),
        (_answering(200, b""), "the answer is not JSON"),
        (_answering(400, {"detail": "use 'max_completion_tokens' instead"}), "set limit_field: max_completion_tokens"),
        (_answering(400, [{"error": {"message": "API key not valid"}}]), "API key not valid"),
        (_answering(400, b"<html>Blocked", "text/html"), "a web page"),
    ],
)
def test_an_error_of_another_form_says_what_the_server_said(tmp_path, answer, reason):
    assert reason in _ask_one(answer, tmp_path).failures[0]


@pytest.mark.parametrize("key", ["sk\na", "sk a", "sk-\u00e4"])
def test_a_key_that_no_request_can_carry_is_one_sentence_without_it(tmp_path, monkeypatch, key):
    monkeypatch.setenv("MODEL_KEY", key)
    with pytest.raises(UserError, match="the key in MODEL_KEY holds") as e:
        _ask_one(_answering(200, _chat("B")), tmp_path, key_env="MODEL_KEY")
    assert key not in str(e.value)


def test_a_key_file_with_a_byte_order_mark_is_read(tmp_path, server):
    (tmp_path / "key").write_bytes(b"\xef\xbb\xbf" + KEY.encode() + b"\r\n")
    server.key = KEY
    assert texts(ask(endpoint(server, key_file=tmp_path / "key"), questions(1), tmp_path)) == ["echo word 0"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "all_proxy is not an http"),
        ("HTTP_PROXY", "ftp://127.0.0.1:1", "http_proxy is not an http"),
    ],
)
def test_a_proxy_of_another_kind_is_one_sentence(tmp_path, monkeypatch, name, value, message):
    for other in ("HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        _ask_one(_answering(200, _chat("B")), tmp_path)


def test_judges_are_asked_through_the_proxy_and_no_proxy_takes_networks(tmp_path, monkeypatch):
    for other in ("ALL_PROXY", "all_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(other, raising=False)
    with plain_http.serving(_answering(200, _chat("by proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "10.0.0.0/8")
        address = {"base_url": "http://judge.case.invalid/v1"}
        assert texts(_ask_one(_answering(500, {}), tmp_path / "a", **address)) == ["by proxy"]
        monkeypatch.setenv("no_proxy", "127.0.0.0/8")
        assert texts(_ask_one(_answering(200, _chat("direct")), tmp_path / "b")) == ["direct"]


def test_an_address_pasted_with_its_last_part_is_refused():
    with pytest.raises(ValueError, match="must end before /chat/completions"):
        Endpoint.model_validate({"name": "m", "base_url": "https://a.b/v1/chat/completions", "model": "x"})
