"""A study and judges in the comparison: tables, report, and what is refused."""

import csv
import json
import random

import pytest

from feyntune.errors import UserError
from feyntune.evaluation.compare import compare
from feyntune.judging.endpoints import Endpoint
from feyntune.judging.judges import JudgeConfig, judge
from feyntune.names import slug
from feyntune.study.study import StudyConfig, make, score
from tests.browser import browser  # noqa: F401
from tests.evaluation.browser_helpers import errors, look_at, requested, resize, visit
from tests.evaluation.conftest import ALL, QKV, QUICK
from tests.judging.test_judges import shown
from tests.servers.openai import OpenAI
from tests.study.factories import with_completions
from tests.study.test_study import fill

WORTH = {"base": 3, QKV: 5, ALL: 6}
RATERS = ["ann", "bob"]


def opinion(body):
    worth = {slug(name): value for name, value in WORTH.items()}
    a, b = (worth[text.split()[2]] for text in shown(body))
    return json.dumps({"score_a": a, "score_b": b, "better": "A" if a > b else "B" if b > a else "tie"})


@pytest.fixture(scope="module")
def given(tmp_path_factory, evaluations):
    """The evaluations with completions, and a study and a judgment of them."""
    root = tmp_path_factory.mktemp("told")
    complete = [with_completions(e, root / e.name, "text") for e in evaluations]
    make(complete, root / "study", root / "key", StudyConfig(raters=RATERS, papers=6, common=3), seed=5)
    luck = random.Random(1)
    give = lambda row, hidden: WORTH[hidden["system"]] + luck.choice([-1, 0, 1])
    sheets = fill(root / "study", root, give, RATERS)
    score(root / "study", root / "key", [sheets], root / "result", resamples=499)
    with OpenAI(opinion).running() as server:
        settings = {"price_in": 1, "price_out": 1, "cap": 9}
        endpoint = Endpoint(name="oracle", base_url=server.url, model="big-1", **settings)
        server.faults = {5: "unmetered", 6: "length"}
        judge(complete, endpoint, root / "judged", JudgeConfig(papers=6, resamples=499))
    return {"evaluations": complete, "people": root / "result", "judges": [root / "judged"]}


@pytest.fixture(scope="module")
def compared_with_people(tmp_path_factory, given, adapters, tiny_split):
    out = tmp_path_factory.mktemp("compared") / "comparison"
    opinions = {"people": given["people"], "judges": given["judges"]}
    compare(given["evaluations"], adapters, tiny_split, out, config=QUICK, **opinions)
    return out


def test_the_comparison_holds_what_people_and_judges_said(compared_with_people, given):
    summary = json.loads((compared_with_people / "summary.json").read_text())
    assert summary["study"] == json.loads((given["people"] / "summary.json").read_text())
    duels = {d["system"]: d for d in summary["judges"][0]["duels"]}
    assert duels[ALL]["win_rate"]["mean"] == 1
    study = {r["name"]: r for r in csv.DictReader((compared_with_people / "study.csv").open())}
    assert float(study[QKV]["difference"]) == summary["study"]["systems"][QKV]["difference"]["mean"]
    assert (study["base"]["published"], study["lora-all"]["published"]) == ("3.75", "5.43")
    judged = {r["system"]: r for r in csv.DictReader((compared_with_people / "judges.csv").open())}
    assert judged[ALL]["win_rate"] == "1.0"
    table = (compared_with_people / "table.md").read_text()
    for part in ("## Study", "## Judges", "| oracle | hep-th/lora-qkv | base | 6 | 100% [100%, 100%]", "| 0.49 |"):
        assert part in table


def test_without_people_and_judges_nothing_of_them_is_there(compared):
    page = (compared / "report.html").read_text()
    assert "<h2>Study</h2>" not in page
    assert "<h2>Judges</h2>" not in page
    assert not (compared / "study.csv").exists()


def test_the_same_comparison_is_not_made_twice_and_others_opinions_make_another(
    compared_with_people, given, adapters, tiny_split
):
    again = lambda **o: compare(given["evaluations"], adapters, tiny_split, compared_with_people, config=QUICK, **o)
    assert again(people=given["people"], judges=given["judges"]).kind == "comparison"
    with pytest.raises(UserError, match="holds another comparison"):
        again(people=given["people"])


def test_opinions_on_other_completions_are_refused(tmp_path, given, evaluations, adapters, tiny_split):
    rewritten = [*given["evaluations"][:2], with_completions(evaluations[2], tmp_path / "new", "new text")]
    with pytest.raises(UserError, match=rf"was made on other completions of {ALL.replace('+', '.')}"):
        compare(rewritten, adapters, tiny_split, tmp_path / "out", config=QUICK, people=given["people"])
    with pytest.raises(UserError, match="was made on other completions"):
        compare(evaluations, adapters, tiny_split, tmp_path / "out", config=QUICK, judges=given["judges"])
    with pytest.raises(UserError, match="Judge oracle is there twice"):
        compare(given["evaluations"], adapters, tiny_split, tmp_path / "out", judges=given["judges"] * 2)


LOOK = """
const width = arguments[0];
const box = (e) => e.getBoundingClientRect();
const sections = [...document.querySelectorAll("section")].filter((s) => ["Study", "Judges"].includes(s.querySelector("h2")?.innerText));
return sections.map((s) => ({
  name: s.querySelector("h2").innerText,
  outside: [...s.querySelectorAll("p, svg, figure, h2, h3, pre, .scroll")].filter((e) => box(e).right > width + 1).map((e) => e.tagName),
  bars: [...s.querySelectorAll("svg .bar")].map((e) => box(e).left >= 0 && box(e).right <= width),
  tables: [...s.querySelectorAll("table")].filter((e) => box(e).height > 40).length,
  text: s.innerText,
}));
"""  # noqa: E501


@pytest.mark.parametrize("width", [390, 1280])
def test_the_sections_are_seen_in_a_browser(browser, compared_with_people, width):  # noqa: F811
    resize(browser, width)
    visit(browser, f"file://{compared_with_people}/report.html")
    study, judges = browser.execute_script(LOOK, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert (study["name"], judges["name"]) == ("Study", "Judges")
    for section, tables in ((study, 3), (judges, 1)):
        assert section["outside"] == []
        assert section["bars"] == [True, True]
        assert section["tables"] == tables
    assert "2 raters scored 27 of 27 completions of 6 papers" in study["text"]
    too_few = "6 papers are too few for any significant result: if all of them agreed, p would still be 0.06."
    assert too_few in study["text"]
    for published in ("3.75", "4.92", "5.43", "0.49", "0.46"):
        assert published in study["text"]
    assert "24 of 24 questions were answered" in judges["text"]
    assert errors(browser) == []
    assert requested(browser) == [f"file://{compared_with_people}/report.html"]
    look_at(browser, f"report-{width}.png")
