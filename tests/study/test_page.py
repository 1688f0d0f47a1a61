"""The page raters score on: over HTTP, and in a real browser at phone and desk width."""

import os
import re
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from feyntune.errors import UserError
from feyntune.study.page import HEADERS, ScoreStore, application
from feyntune.study.study import StudyConfig, make, read_sheet, score
from feyntune.tex import set_formulas
from tests.browser import browser  # noqa: F401
from tests.evaluation.browser_helpers import errors, look_at, requested, resize, visit
from tests.study.factories import ALL, QKV, make_evaluation

TEX = r"We find $\mathcal{N}=4$ <b>branes</b> & \"strings\" with $E < mc^2$."


class Served:
    """The page on a free port, in a thread: what `feyntune study serve` does after printing the links."""

    def __init__(self, tmp_path):
        self.study, self.scores = tmp_path / "study", tmp_path / "scores"

    def start(self):
        listening = socket.create_server(("127.0.0.1", 0))
        book = ScoreStore(self.study, self.scores)
        config = uvicorn.Config(application(book), log_level="warning", access_log=False, server_header=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self.thread.start()
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.links = {rater: f"{self.address}/r/{token}" for token, rater in book.raters.items()}

    def stop(self):
        self.server.should_exit = True
        self.thread.join()

    def rows(self, rater):
        return [row for _, row in read_sheet(self.scores / f"{rater}.csv")]


@pytest.fixture
def served(tmp_path):
    systems = {"base": lambda n: "poor text " * 60, QKV: lambda n: TEX, ALL: lambda n: f"text {n}"}
    folder = make_evaluation(tmp_path / "evaluation", systems)
    config = StudyConfig(raters=["ann", "bob"], papers=3, common=1)
    make([folder], tmp_path / "study", tmp_path / "key", config, seed=5)
    made = Served(tmp_path)
    made.start()
    yield made
    made.stop()


def post(served, rater, number, **form):
    return httpx.post(f"{served.links[rater]}/{number}", data=form)


# Over HTTP.


def test_a_score_is_on_disk_before_the_next_text_and_survives_a_kill(served):
    """The command itself, in a process of its own that is killed and started again."""
    command = [sys.executable, "-m", "feyntune", "study", "serve", str(served.study)]
    command += ["--scores", str(served.scores), "--port", "0"]
    tokens = []
    for start in (1, 2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                line = process.stdout.readline()
                assert line.startswith("ann: http://127.0.0.1:"), line
                link = line.split()[1]  # the socket listens before the link is printed
                tokens.append(link.split("/")[-1])
                if start == 1:
                    one = httpx.post(f"{link}/2", data={"score": "7", "comment": "good, really"}, timeout=60)
                    assert one.headers["location"].endswith("/3")
                    assert httpx.post(f"{link}/1", data={"score": "10"}).headers["location"].endswith("/3")
                else:
                    assert httpx.get(link, timeout=60).headers["location"].endswith("/3")
                    page = httpx.get(f"{link}/2").text
                    assert "good, really" in page
                    assert re.search(r'value="7" class="given"', page)
            finally:
                process.kill()
        rows = served.rows("ann")
        assert [(r["score"], r["comment"]) for r in rows[:3]] == [("10", ""), ("7", "good, really"), ("", "")]
    assert tokens[0] == tokens[1]


def test_the_scores_are_sheets_that_can_be_scored(served, tmp_path):
    for rater in served.links:
        total = len(read_sheet(served.study / "sheets" / f"{rater}.csv"))
        for number in range(1, total + 1):
            last = post(served, rater, number, score=str(number % 10 + 1))
        assert last.headers["location"].endswith("/done")
    done = score(served.study, tmp_path / "key", [served.scores], tmp_path / "out")
    assert done.kind == "study-result"


@pytest.mark.parametrize("form", [{}, {"score": "0"}, {"score": "11"}, {"score": "7.5"}, {"score": "x"}])
def test_what_is_no_score_is_refused_in_words_and_saves_nothing(served, form):
    answer = post(served, "ann", 1, comment="kept?", **form)
    assert answer.status_code == 422
    assert "Nothing was saved: choose a score from 1 to 10." in answer.text
    assert not (served.scores / "ann.csv").exists()


def test_a_form_that_is_too_long_is_refused(served):
    assert post(served, "ann", 1, score="5", comment="x" * 5000).status_code == 422
    assert post(served, "ann", 1, score="5", comment="x" * 100_000).status_code == 413
    chunks = httpx.post(f"{served.links['ann']}/1", content=iter([b"score=5"]))  # without a length
    assert chunks.status_code == 413
    assert not (served.scores / "ann.csv").exists()


def test_only_a_rater_s_own_link_opens_the_texts(served):
    for path in ("/", "/r/", "/r/guess/1", "/r/guess", "/r/ann/1", "/docs", "/openapi.json"):
        answer = httpx.get(served.address + path, follow_redirects=True)
        assert answer.status_code == 404, path
        assert "Beginning" not in answer.text
    assert httpx.post(served.address + "/r/guess/1", data={"score": "5"}).status_code == 404
    assert httpx.get(served.links["ann"] + "/99").status_code == 404
    assert os.stat(served.scores / "links.json").st_mode & 0o077 == 0


def test_every_answer_has_the_strict_headers(served):
    answers = [httpx.get(served.address + p) for p in ("/", "/study.css", "/study.js", "/favicon.ico")]
    answers += [
        httpx.get(served.links["ann"]),
        httpx.get(served.links["ann"] + "/1"),
        post(served, "ann", 1, score="3"),
    ]
    for answer in answers:
        for name, value in HEADERS.items():
            assert answer.headers[name] == value
        assert "server" not in answer.headers


def test_damaged_scores_are_refused_with_their_line(served):
    post(served, "ann", 1, score="3")
    served.stop()
    path = served.scores / "ann.csv"
    path.write_text(path.read_text(encoding="utf-8-sig").replace(",3,", ",33,", 1))
    with pytest.raises(UserError, match=r"ann\.csv, line 2, score: '33' is not a whole number"):
        ScoreStore(served.study, served.scores)


# In a browser.

WIDTHS = pytest.mark.parametrize("width", [390, 1280])
LOOK = """
const width = arguments[0];
const box = (e) => e.getBoundingClientRect();
return {
  scroll: document.documentElement.scrollWidth,
  values: [...document.querySelectorAll("button")].map((b) => b.value),
  small: [...document.querySelectorAll("button")].map(box).filter((b) => b.width < 44 || b.height < 44 || b.left < 0 || b.right > width),
  unlabeled: [...document.querySelectorAll("textarea, progress")].filter((e) => !e.labels.length).map((e) => e.id),
  bold: document.querySelectorAll(".text b").length,
};
"""  # noqa: E501


@WIDTHS
def test_the_page_fits_fetches_nothing_from_outside_and_logs_no_error(browser, served, width):  # noqa: F811
    resize(browser, width)
    total = len(read_sheet(served.study / "sheets" / "ann.csv"))
    shown = set()
    for number in range(1, total + 1):
        visit(browser, f"{served.links['ann']}/{number}")
        result = browser.execute_script(LOOK, width)
        assert result["scroll"] <= width
        assert result["values"] == [str(n) for n in range(1, 11)]
        assert result["small"] == []
        assert result["unlabeled"] == []
        assert result["bold"] == 0  # texts are shown, not taken for HTML
        look_at(browser, f"study-{width}-{number}.png")
        shown.add(browser.find_element(By.ID, "continuation").get_attribute("innerHTML"))
    formulas = set_formulas(TEX).count("<math")
    assert any("&lt;b&gt;branes" in text and text.count("<math") == formulas for text in shown)
    visit(browser, served.links["ann"] + "/done")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert errors(browser) == []
    assert [url for url in requested(browser) if not url.startswith(served.address)] == []


def test_the_policy_is_enforced(browser, served):  # noqa: F811
    visit(browser, served.links["ann"])
    browser.execute_script("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert any("Content Security Policy" in line for line in errors(browser))


def at(browser):  # noqa: F811
    return browser.current_url.rsplit("/", 1)[1]


def wait_for(browser, place):  # noqa: F811
    whole = lambda b: at(b) == place and b.execute_script("return document.readyState") == "complete"
    WebDriverWait(browser, 60).until(whole)


def test_scoring_by_keys_alone(browser, served):  # noqa: F811
    visit(browser, served.links["ann"])
    press = lambda *keys: browser.switch_to.active_element.send_keys(*keys)
    press("8")
    wait_for(browser, "2")
    press("0")  # ten
    wait_for(browser, "3")
    press(Keys.ARROW_LEFT)
    wait_for(browser, "2")
    given = browser.find_element(By.CSS_SELECTOR, "button.given")
    assert (given.text, given.get_attribute("aria-pressed")) == ("10", "true")
    browser.find_element(By.ID, "comment").send_keys("cites 1999")  # digits in a comment are no scores
    assert at(browser) == "2"
    browser.find_element(By.CSS_SELECTOR, "button[value='4']").send_keys(Keys.ENTER)  # as from Tab and Enter
    wait_for(browser, "3")
    assert [(r["score"], r["comment"]) for r in served.rows("ann")[:3]] == [("8", ""), ("4", "cites 1999"), ("", "")]


@WIDTHS
def test_scoring_to_the_end_by_click(browser, served, width):  # noqa: F811
    resize(browser, width)
    visit(browser, served.links["bob"])
    total = len(read_sheet(served.study / "sheets" / "bob.csv"))
    for number in range(1, total + 1):
        wait_for(browser, str(number))
        assert f"{number - 1} of {total} scored" in browser.find_element(By.TAG_NAME, "header").text
        browser.find_element(By.CSS_SELECTOR, f"button[value='{number % 10 + 1}']").click()
    wait_for(browser, "done")
    assert f"All {total} texts are scored" in browser.find_element(By.TAG_NAME, "h1").text
    assert [r["score"] for r in served.rows("bob")] == [str(n % 10 + 1) for n in range(1, total + 1)]
    assert errors(browser) == []


def test_the_page_works_without_script(browser, served):  # noqa: F811
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    visit(browser, served.links["ann"])
    browser.find_element(By.CSS_SELECTOR, "button[value='6']").click()
    wait_for(browser, "2")
    assert served.rows("ann")[0]["score"] == "6"
