import json
import re

import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import open_artifact
from feyntune.artifacts.completions import CompletionFilter, read_completions
from feyntune.errors import UserError
from feyntune.judging.endpoints import Endpoint
from feyntune.judging.external import AskConfig, ask, truncate
from feyntune.judging.judges import JudgeConfig, Judgment, judge, parse
from tests.servers.openai import OpenAI
from tests.study.factories import ALL, QKV, SEEDS, completion_rows, make_evaluation

QUICK = JudgeConfig(papers=8, resamples=499)
QUALITY = {"poor": 3, "fair": 5, "good": 8}


def endpoint(server, **changes):
    settings = {"name": "judge", "base_url": server.url, "model": "big-1", "price_in": 1, "price_out": 10, "cap": 9}
    return Endpoint.model_validate({**settings, "timeout": 20, **changes})


def shown(body):
    """The two continuations a judge was shown."""
    text = body["messages"][-1]["content"]
    return [re.search(f"<continuation_{x}>\n(.*?)\n</", text, re.DOTALL)[1] for x in "ab"]


def honest_judge(body):
    """Goes by the first word of a continuation."""
    a, b = (QUALITY[text.split()[0]] for text in shown(body))
    better = "A" if a > b else "B" if b > a else "tie"
    return "Let me see {both}.\n" + json.dumps({"score_a": a, "score_b": b, "better": better, "reason": "so"})


@pytest.fixture
def server():
    with OpenAI(honest_judge).running() as running:
        yield running


@pytest.fixture
def folders(tmp_path):
    one = make_evaluation(tmp_path / "base", {"base": lambda n: f"poor {n}"})
    mixed = lambda n: f"{'fair' if n % 2 else 'poor'} tries {n}"
    return [one, make_evaluation(tmp_path / "both", {QKV: mixed, ALL: lambda n: f"good {n}"})]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_win_rates_count_both_orders_and_ties(server, folders, tmp_path):
    judge(folders, endpoint(server), tmp_path / "out", QUICK)
    result = {d["system"]: d for d in summary_of(tmp_path / "out")["duels"]}
    papers = read_completions(folders, QUICK.filter).first(8)
    odd = sum(int(p[-3:]) % 2 == 0 for p in papers)  # hep-th/9901001 is number 0
    assert (result[ALL]["wins"], result[ALL]["ties"], result[ALL]["losses"]) == (8, 0, 0)
    assert (result[QKV]["wins"], result[QKV]["ties"], result[QKV]["losses"]) == (odd, 8 - odd, 0)
    assert result[ALL]["win_rate"]["mean"] == 1
    assert result[ALL]["win_rate"]["p_holm"] == pytest.approx(2 * 2 / 2**8)  # of two systems
    assert result[QKV]["win_rate"]["mean"] == pytest.approx((odd + (8 - odd) / 2) / 8)
    assert result[QKV]["win_rate"]["low"] < result[QKV]["win_rate"]["mean"] < result[QKV]["win_rate"]["high"]
    assert (result[ALL]["score"], result[ALL]["score_difference"]["mean"], result[ALL]["flipped"]) == (8, 5, 0)
    position = summary_of(tmp_path / "out")["position"]
    assert position["first"] == position["second"]
    assert position["share_first"]["mean"] == 0.5


def test_a_judge_that_always_prefers_one_place_is_seen_and_decides_nothing(server, folders, tmp_path):
    server.answer = lambda body: '{"score_a": 9, "score_b": 2, "better": "A", "reason": "first"}'
    judge(folders, endpoint(server), tmp_path / "out", QUICK)
    summary = summary_of(tmp_path / "out")
    assert summary["position"]["share_first"]["low"] == 1
    for duel in summary["duels"]:
        assert duel["win_rate"]["mean"] == 0.5
        assert (duel["ties"], duel["flipped"]) == (8, 8)
        assert duel["score_difference"]["mean"] == 0


def test_the_judge_sees_texts_in_both_orders_and_no_name(server, folders, tmp_path):
    judge(folders, endpoint(server, max_concurrent_requests=1), tmp_path / "out", QUICK)
    given = read_completions(folders, QUICK.filter)
    asked = [body["messages"][-1]["content"] for body in server.requests]
    assert len(asked) == 2 * 2 * 8
    for word in ("base", "lora", "qkv", "hep-th", "9901", "reference continuation"):
        assert not any(word in text for text in asked)
    pairs = [tuple(shown(body)) for body in server.requests]
    for paper in given.first(8):
        texts = [given.texts[s][paper].strip() for s in (ALL, "base")]
        assert pairs.count(tuple(texts)) == pairs.count(tuple(reversed(texts))) == 1
    given = server.requests[0]["messages"][0]["content"]
    assert given == (tmp_path / "out" / "rubric.txt").read_text().strip()


def test_the_published_continuation_is_shown_when_asked_for(server, folders, tmp_path):
    judge(folders, endpoint(server), tmp_path / "out", QUICK.model_copy(update={"show_reference": True}))
    assert all("The reference continuation of" in body["messages"][-1]["content"] for body in server.requests)


def test_all_pairs(server, folders, tmp_path):
    judge(folders, endpoint(server), tmp_path / "out", QUICK.model_copy(update={"pairs": "all"}))
    duels = {(d["system"], d["against"]): d["win_rate"]["mean"] for d in summary_of(tmp_path / "out")["duels"]}
    assert set(duels) == {(ALL, "base"), (QKV, "base"), (QKV, ALL)}
    assert duels[QKV, ALL] == 0


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ('{"score_a": 7, "score_b": 3, "better": "A"}', Judgment(score_a=7, score_b=3, better="a")),
        ('```json\n{"better": " TIE", "score_b": 3, "score_a": 3}\n```', Judgment(score_a=3, score_b=3, better="tie")),
        ('In \\frac{1}{2} {"score_a": 1, "score_b": 10, "better": "b"}.', Judgment(score_a=1, score_b=10, better="b")),
        ("A is better.", "no JSON object"),
        ('{"score_a": 7, "score_b":', "no JSON object"),
        ('{"score_a": 11, "score_b": 3, "better": "A"}', "score_a: Input should be less than or equal to 10"),
        ('{"score_a": 7, "score_b": 3, "better": "both"}', "better: Input should be 'a', 'b' or 'tie'"),
        ('{"score_a": 7, "better": "A"}', "score_b: Field required"),
        ('{"score_a": 7, "score_b": 3, "better": "B"}', "contradicts its scores"),
        (
            'First {"score_a": 2, "score_b": 9, "better": "B"}? No: {"score_a": 7, "score_b": 3, "better": "A"}',
            Judgment(score_a=7, score_b=3, better="a"),
        ),
        ("{" * 5000, "no JSON object"),
        (r'{"score_a": 7, "score_b": 3, "better": "A", "reason": "\alpha, \beta and \\gamma"}',
         Judgment(score_a=7, score_b=3, better="a", reason=r"\alpha, \beta and \gamma")),
        ('{"score_a": 7, "score_b": 3, "better": "A", "reason": "two\nlines",}',
         Judgment(score_a=7, score_b=3, better="a", reason="two\nlines")),
        ('{"Score_A": "7/10", "Score_B": 3, "Better": "Continuation A.", "reason": null}',
         Judgment(score_a=7, score_b=3, better="a")),
        ('{"score_a": 5, "score_b": 5, "better": "equal"}', Judgment(score_a=5, score_b=5, better="tie")),
        ('{"judgment": {"score_a": 7, "score_b": 3, "better": "continuation_a"}}',
         Judgment(score_a=7, score_b=3, better="a")),
        ('{"score_a": 11, "score_b": 3, "better": "A", "more": {"x": 1}}',
         "score_a: Input should be less than or equal to 10"),
    ],
)  # fmt: skip
def test_judgments_and_what_is_none(answer, result):
    assert parse(answer) == result


def test_answers_of_no_use_are_counted_and_kept(server, folders, tmp_path):
    useless = {3: "I cannot judge this.", 6: '{"score_a": 7, "score_b": 3, "better": "B"}'}
    server.answer = lambda body: useless.get(len(server.requests), "") or honest_judge(body)
    server.faults = {9: "400"}
    judge(folders, endpoint(server, max_concurrent_requests=1, retries=0), tmp_path / "out", QUICK)
    summary = summary_of(tmp_path / "out")
    assert (summary["unusable"]["count"], summary["unusable"]["of"]) == (3, 32)
    assert {"no JSON object": 1, "contradicts its scores": 1}.items() <= summary["unusable"]["reasons"].items()
    rows = pq.read_table(tmp_path / "out" / "judgments.parquet").to_pylist()
    assert len(rows) == 32
    assert {r["answer"] for r in rows if r["unusable"]} == {*useless.values(), None}
    assert sum(d["papers"] for d in summary["duels"]) == 16 - 3
    assert sum(d["one_order_only"] for d in summary["duels"]) == 3
    assert summary["judge"]["failed"] == 1


def test_unusable_judgments_are_asked_again_by_the_same_command(server, folders, tmp_path):
    server.answer = lambda body: "Hmm." if len(server.requests) == 3 else honest_judge(body)
    once = endpoint(server, max_concurrent_requests=1)
    judge(folders, once, tmp_path / "out", QUICK)
    assert summary_of(tmp_path / "out")["unusable"]["reasons"] == {"no JSON object": 1}
    judge(folders, once, tmp_path / "out", QUICK)
    assert summary_of(tmp_path / "out")["unusable"]["count"] == 0
    assert len(server.requests) == 33


def test_a_judge_without_any_judgment_is_an_error_that_says_why(server, folders, tmp_path):
    server.answer = lambda body: "I like both."
    with pytest.raises(UserError, match=r"no usable judgment on 32 questions \(no JSON object\)"):
        judge(folders, endpoint(server), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    server.answer = honest_judge
    judge(folders, endpoint(server), tmp_path / "other", QUICK)  # the useless answers are not reused
    assert summary_of(tmp_path / "other")["judge"]["answers"] == 32


def test_a_cap_leaves_whole_papers_and_says_so(server, folders, tmp_path):
    capped = endpoint(server, cap=0.004, max_tokens=100, max_concurrent_requests=1)
    judge(folders, capped, tmp_path / "out", QUICK)
    summary = summary_of(tmp_path / "out")
    assert 4 < summary["judge"]["answers"] < 32
    assert summary["judge"]["cost"] <= 0.004
    assert "before the cap" in summary["judge"]["stopped"]
    assert summary["unusable"]["reasons"]["not asked: the cap"] == 32 - summary["judge"]["answers"]
    counts = [d["papers"] for d in summary["duels"]]
    assert max(counts) - min(counts) <= 1
    asked = len(server.requests)
    judge(folders, endpoint(server, cap=9, max_tokens=100), tmp_path / "out", QUICK)  # the same command, a higher cap
    assert summary_of(tmp_path / "out")["judge"]["answers"] == 32
    assert len(server.requests) - asked == 32 - summary["judge"]["answers"]
    assert summary_of(tmp_path / "out.part") == summary


def test_a_judgment_names_what_it_judged_and_is_not_made_twice(server, folders, tmp_path):
    made = judge(folders, endpoint(server), tmp_path / "out", QUICK)
    both = open_artifact(folders[1])
    assert made.inputs["test"] == both.inputs["test"]
    assert made.inputs[f"completions of {QKV}"] == both.files["completions/hep-th.lora-qkv.parquet"].sha256
    assert judge(folders, endpoint(server), tmp_path / "out", QUICK) == made
    with pytest.raises(UserError, match="judgments of other completions"):
        judge(folders, endpoint(server), tmp_path / "out", QUICK.model_copy(update={"papers": 4}))
    judge(folders, endpoint(server), tmp_path / "other", QUICK)
    assert server.answered == 32


# Gathering what is judged.


def test_the_chosen_completions_are_taken(folders):
    for filter, mark in (
        (CompletionFilter(), f"[{SEEDS[0]}]"),
        (CompletionFilter(seed=SEEDS[1]), f"[{SEEDS[1]}]"),
        (CompletionFilter(text="completion"), "and runs on"),
    ):
        given = read_completions(folders, filter)
        assert len(given.papers) == 10  # without the hold-out
        assert all(text.endswith(mark) for text in given.texts[QKV].values())
    greedy = read_completions(folders, CompletionFilter(decoding="greedy", rule="careful", split="holdout"))
    assert [p.prompt for p in greedy.papers.values()] == [f"Beginning {n} under the careful rule." for n in (10, 11)]
    assert list(greedy.texts) == ["base", ALL, QKV]


def test_what_does_not_belong_together_is_refused(folders, tmp_path):
    filter = CompletionFilter()
    with pytest.raises(UserError, match="The base model's completions are not given"):
        read_completions(folders[1:], filter)
    with pytest.raises(UserError, match="base is given twice"):
        read_completions([folders[0], folders[0]], filter)
    other = make_evaluation(tmp_path / "other", {QKV: str}, test="8" * 64)
    with pytest.raises(UserError, match="was made on test set 8888888888888888"):
        read_completions([folders[0], other], filter)
    changed = {QKV: [{**row, "prompt": row["prompt"] + "!"} for row in completion_rows(str)]}
    with pytest.raises(UserError, match="Not all systems were given the same prompt of hep-th/9901001"):
        read_completions([folders[0], make_evaluation(tmp_path / "changed", changed)], filter)
    with pytest.raises(UserError, match=r"has no sampled completions \(rule paper, test, seed 99\)"):
        read_completions(folders, CompletionFilter(seed=99))


def test_fewer_papers_are_among_more(folders):
    given = read_completions(folders, CompletionFilter())
    assert given.first(3) == given.first(7)[:3]
    assert given.first(10) != sorted(given.papers)


# Endpoints as systems.


def test_an_endpoint_completes_the_same_prompts_and_becomes_a_system(server, folders, tmp_path):
    def answer(body):
        given = body["messages"][-1]["content"]
        number = int(given.split()[1])
        return f"{given} good repeats {number}" if number % 2 else f"good {number}\n\nI hope this helps!"

    server.answer = answer
    ask(folders[0], [endpoint(server, name="claude", model="c-1")], tmp_path / "asked", AskConfig(papers=6))
    table = pq.read_table(tmp_path / "asked" / "completions" / "claude.parquet")
    rows = table.to_pylist()
    assert table.column_names == list(completion_rows(str)[0])
    assert [r["id"] for r in rows] == sorted(read_completions(folders, CompletionFilter()).first(6))
    for r in rows:
        assert r["completion"].startswith(" good")
        assert r["truncated"].split()[0] == "good"
        assert "hope" not in r["truncated"]
        assert (r["seed"], r["temperature"], r["decoding"], r["stop_reason"]) == (None, 0.7, "sampled", "eos")
    server.answer = honest_judge
    judge([*folders, tmp_path / "asked"], endpoint(server, model="c-1"), tmp_path / "out", QUICK)
    result = {d["system"]: d for d in summary_of(tmp_path / "out")["duels"]}
    assert result["claude"]["wins"] == result["claude"]["papers"] == 6
    assert summary_of(tmp_path / "out")["judge"]["judges_itself"] == ["claude"]


def test_an_endpoint_cannot_take_the_name_of_a_measured_system(server, tmp_path):
    folder = make_evaluation(tmp_path / "both", {"base": str, "mine": str})
    with pytest.raises(UserError, match="give it another"):
        ask(folder, [endpoint(server, name="mine")], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "truncated"),
    [
        (" one two three", " one two three"),
        (" one two three four five", " one two three"),
        ("\n\n one two\n\nthree", " one two"),
        ("", ""),
    ],
)
def test_truncation(text, truncated):
    assert truncate(text, "as many words") == truncated
