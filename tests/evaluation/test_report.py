import html
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from feyntune.artifacts.artifact import read_manifest, write_artifact
from feyntune.cli.main import app
from feyntune.evaluation.compare import compare
from feyntune.evaluation.report import _flat, _ingest_command, _number, _points, _published, _signed, ticks
from feyntune.evaluation.tables import table
from feyntune.ingestion.ingest import ingest
from feyntune.tex import set_formulas
from tests.evaluation.conftest import QUICK
from tests.evaluation.test_evaluate import reseal


def test_the_page_is_whole_in_itself(compared):
    page = (compared / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"""(src|href)\s*=|url\(|@import""", page)


def test_the_page_shows_every_system_its_interval_and_every_failure(compared):
    page = (compared / "report.html").read_text()
    summary = json.loads((compared / "summary.json").read_text())
    for name, variant in summary["variants"].items():
        assert page.count(name) > 3
        assert _number(variant["perplexity"]["abstract_mean"], 2) in page
        assert _signed(variant["delta"]["low"]) in page
    assert "out of &lt;memory&gt;" in page
    assert summary["split"]["digest"] in page
    assert "11.20" not in page  # the paper's figures stand only beside those of its base


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_lie_inside_evenly_and_are_few(low, width):
    result = ticks(low, low + width)
    if low + width > low:
        assert 2 <= len(result) <= 12
        assert all(low - 1e-6 * width <= t <= low + width + 1e-6 * width for t in result)


# The page as it is, and as the Kubeflow UI shows it: in an iframe by srcdoc.
FRAME = """<!doctype html><meta name="viewport" content="width=device-width"><body style="margin:0">
<iframe id="page" style="width:100%;height:800px;border:0" srcdoc="PAGE"></iframe>"""
SEEN = """
const root = document.documentElement, seen = e => e.getBoundingClientRect();
const all = s => [...document.querySelectorAll(s)];
const inside = e => seen(e).left >= -1 && seen(e).right <= innerWidth + 1;
return {
  width: innerWidth, scroll: root.scrollWidth,
  outside: all("section, article, p, svg, pre, figure, h1, h2, h3, h4").filter(e => !inside(e) && !e.closest(".scroll"))
    .map(e => e.tagName + " " + e.textContent.slice(0, 40)),
  sections: all("h2").filter(e => seen(e).height > 10).map(e => e.textContent),
  tables: all("table").filter(e => !e.closest("details"))
    .map(e => seen(e).height > 20 && seen(e.closest(".scroll")).width > 200),
  forest: all("svg .bar").map(inside),
  curves: all("svg polyline.train").map(e => seen(e).width > 20 && seen(e).height > 5),
  marks: all("mark").map(e => getComputedStyle(e).textDecorationLine + " " + getComputedStyle(e).fontWeight),
  unnamed: all("svg[role=img], [role=region]")
    .filter(e => !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")).length,
  headless: all("table").filter(e => !e.querySelector("th[scope=col]")).length,
};
"""


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_everything_is_visible_and_nothing_is_fetched(tmp_path, compared, browser, width, framed):
    shown = compared / "report.html"
    if framed:
        shown = tmp_path / "outer.html"
        shown.write_text(FRAME.replace("PAGE", html.escape((compared / "report.html").read_text())))
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(shown.as_uri())
    if framed:
        browser.switch_to.frame("page")
    result = browser.execute_script(SEEN)
    assert result["width"] == width
    assert result["scroll"] <= width
    assert result["outside"] == []
    assert result["sections"] == SECTIONS
    assert result["forest"] == [True, True]
    assert result["curves"] == [True, True]
    assert len(result["tables"]) == 10
    assert all(result["tables"])
    assert result["marks"]
    assert set(result["marks"]) == {"underline 600"}  # not by color alone
    assert (result["unnamed"], result["headless"]) == (0, 0)
    assert browser.get_log("browser") == []
    asked = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    own = ("chrome:", "chrome-untrusted:", "data:")  # the browser's first empty tab; data: fetches nothing
    assert {u for u in urls if not u.startswith(own)} <= {shown.as_uri(), "about:srcdoc"}


# In the order of the issue: conclusion and perplexity first, how to reproduce last.
SECTIONS = [
    "Failed branches",
    "Perplexity",
    "Transfer and retention",
    "At equal compute",
    "Learning curves",
    "Completions",
    "Memorization",
    "Completions side by side",
    "Training papers reproduced",
    "Corpus and audit",
    "How to reproduce",
]


def test_the_page_says_what_the_completions_are_and_shows_some(compared):
    page = (compared / "report.html").read_text()
    result = json.loads((compared / "summary.json").read_text())["completions"]
    assert len(result["examples"]) == 3
    for example in result["examples"]:
        assert str(set_formulas(example["reference"])) in page
        assert example["systems"][0]["system"] == "base"
    assert result["similarity"]["digest"][:12] in page
    assert "one sample, seed 42" in page
    assert "the reference continuation" in page


def test_published_figures_stand_beside_those_of_the_same_base_alone(compared):
    summary = json.loads((compared / "summary.json").read_text())
    assert summary["base"]["name"] == "tiny"
    assert _published(summary, table(summary)) == []
    assert table(summary)[0]["published"] is None
    summary["base"]["name"] = "meta-llama/Llama-3.1-8B"
    assert [p["published"] for p in _published(summary, table(summary))] == ["11.20", "9.83", "0.88", "0.90"]
    assert table(summary)[0]["published"] == 11.2
    summary["test"]["category"] = "gr-qc"
    assert _published(summary, table(summary)) == []


def test_the_first_screen_has_an_example_and_formulas_are_set(compared):
    page = (compared / "report.html").read_text()
    first, _, rest = page.partition("<h2")
    assert "of the 3 examples below" in first
    assert "the abstract itself" in first
    assert "the abstract itself" not in rest
    pytest.importorskip("latex2mathml")
    assert "<math" in rest


def test_lists_are_shown_and_long_ones_say_how_long():
    flat = dict(_flat({"categories": ["hep-th", "gr-qc"], "none": [], "many": list(range(30)), "pairs": [["a", 1]]}))
    assert flat["categories"] == "hep-th; gr-qc"
    assert flat["none"] == "none"
    assert flat["many"].endswith("19 … (30 in all)")
    assert flat["pairs"] == "a, 1"


def test_a_page_without_completions_or_similarity_says_so(tmp_path, compared, evaluations, adapters, tiny_split):
    bare = []
    for evaluation in evaluations:
        manifest = read_manifest(evaluation)
        stats = {**manifest.stats["completions"], "similarity": {"missing": "the hub is <away>"}}
        bare.append(reseal(evaluation, tmp_path / evaluation.name, stats={**manifest.stats, "completions": stats}))
    compare(bare, adapters, tiny_split, tmp_path / "out", config=QUICK)
    page = (tmp_path / "out/report.html").read_text()
    assert "No semantic similarity:</strong> the hub is &lt;away&gt;" in page
    assert "0.88" not in page
    assert "Similarity" not in page.replace("No semantic similarity", "").replace("similarity: all-mpnet", "")


def test_the_report_names_the_command_that_makes_its_corpus_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = ingest("synthetic:120:3", tmp_path / "first", until="2024-08-22", categories=["hep-th", "gr-qc"])
    command = _ingest_command(made)
    assert command == "feyntune ingest synthetic:120:3 --out corpus --until 2024-08-22 --categories gr-qc,hep-th"
    done = CliRunner().invoke(app, command.split()[1:])
    assert done.exit_code == 0, done.output
    assert read_manifest("corpus").digest == made.digest


def test_an_oai_corpus_is_named_by_its_address_and_prefix(tmp_path):
    with write_artifact(
        tmp_path / "corpus", "corpus", config={"source": "oai-arXiv", "until": None, "categories": None}
    ) as folder:
        folder.stats["given"] = "https://oai.example/oai"
    sentences = _ingest_command(read_manifest(tmp_path / "corpus"))
    assert sentences == "feyntune ingest oai:https://oai.example/oai --out corpus --prefix arXiv --converted-text"


def test_a_training_without_validation_papers_has_a_curve_all_the_same():
    assert _points({"loss": [1.0, 2.0], "validation": [{"step": 0, "perplexity": None}]}) == ([(1, 1.0), (2, 2.0)], [])
