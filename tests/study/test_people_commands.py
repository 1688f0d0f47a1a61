"""`feyntune ask`, `judge` and `study`, as typed."""

import json

import pytest
from typer.testing import CliRunner

from feyntune.artifacts.artifact import open_artifact
from feyntune.cli.main import app
from feyntune.errors import UserError
from tests.judging.test_judges import honest_judge
from tests.servers.openai import OpenAI
from tests.study.factories import QKV, make_evaluation


def run(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def evaluation(tmp_path):
    return make_evaluation(tmp_path / "evaluation", {"base": lambda n: f"poor {n}", QKV: lambda n: f"fair {n}"})


def test_from_completions_to_judgments_and_scores(evaluation, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-1")
    reply = lambda body: honest_judge(body) if "<prompt>" in body["messages"][-1]["content"] else "good rest"
    with OpenAI(reply, key="sk-1").running() as server:
        settings = {
            "base_url": server.url,
            "model": "m",
            "price_in": 1,
            "price_out": 1,
            "cap": 5,
            "key_env": "SOME_KEY",
        }
        endpoints = {"endpoints": [{"name": "claude", **settings}, {"name": "gpt", **settings}]}
        (tmp_path / "e.json").write_text(json.dumps(endpoints))
        asked = run("ask", evaluation, "--endpoints", tmp_path / "e.json", "--system", "claude", "--papers", 5,
                    "--out", tmp_path / "answers")  # fmt: skip
        assert "claude: 5 of 5 answers" in asked
        both = ["--completions", evaluation, "--completions", tmp_path / "answers"]
        judged = run("judge", *both, "--endpoints", tmp_path / "e.json", "--judge", "gpt", "--out", tmp_path / "judged")
        assert "claude against base: 100% [100%, 100%] of 5 papers" in judged
        with pytest.raises(UserError, match="has no endpoint other, only claude, gpt"):
            run("judge", *both, "--endpoints", tmp_path / "e.json", "--judge", "other", "--out", tmp_path / "x")
    run("study", "make", *both, "--rater", "a", "--rater", "b", "--papers", 4, "--common", 2,
        "--out", tmp_path / "study", "--key", tmp_path / "key", "--filter", '{"text": "completion"}')  # fmt: skip
    sheet = tmp_path / "study" / "sheets" / "a.csv"
    assert "and runs on" in sheet.read_text()
    assert open_artifact(tmp_path / "key").config["filter"]["text"] == "completion"
    returned = tmp_path / "a.csv"
    returned.write_text(sheet.read_text(encoding="utf-8-sig").replace(",,\n", ",4,\n"))
    table = run("study", "score", tmp_path / "study", "--key", tmp_path / "key", "--sheets", returned,
                "--out", tmp_path / "result")  # fmt: skip
    assert "9 of 18 items scored" in table
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"sk-1" not in path.read_bytes(), path


def test_a_folder_of_evaluations_stands_for_all_of_them(tmp_path):
    for name in ("base", "qkv"):  # as runs/latest/evaluations has them: links
        system = {"base": lambda n: f"poor {n}"} if name == "base" else {QKV: lambda n: f"fair {n}"}
        make_evaluation(tmp_path / "store" / name, system)
        (tmp_path / "evaluations").mkdir(exist_ok=True)
        (tmp_path / "evaluations" / name).symlink_to(tmp_path / "store" / name)
    run("study", "make", "--completions", tmp_path / "evaluations", "--rater", "a",
        "--out", tmp_path / "study", "--key", tmp_path / "key")  # fmt: skip
    sheet = (tmp_path / "study" / "sheets" / "a.csv").read_text()
    assert "poor" in sheet
    assert "fair" in sheet


def test_settings_that_cannot_be_are_named(evaluation, tmp_path):
    make = ["study", "make", "--completions", evaluation, "--out", tmp_path / "s", "--key", tmp_path / "k"]
    with pytest.raises(UserError, match=r"raters: rater 'a/b'"):
        run(*make, "--rater", "a/b")
    with pytest.raises(UserError, match=r"filter.rule: Input should be 'paper' or 'careful'"):
        run(*make, "--rater", "a", "--filter", '{"rule": "mine"}')
    with pytest.raises(UserError, match=r"nothing\.yaml: No such file"):
        run("ask", evaluation, "--endpoints", tmp_path / "nothing.yaml", "--out", tmp_path / "x")
