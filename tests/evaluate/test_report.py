import html
import json
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.report import _number, _signed, ticks
from tests.evaluate.conftest import ALL, QKV


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
    assert "11.20" in page  # published


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e6))
def test_ticks_lie_inside_evenly_and_are_few(low, width):
    found = ticks(low, low + width)
    if low + width > low:
        assert 2 <= len(found) <= 12
        assert all(low - 1e-6 * width <= t <= low + width + 1e-6 * width for t in found)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

# The page is put into an iframe by srcdoc, as the Kubeflow UI does, and looked at from outside.
LOOK = """<!doctype html><body><iframe id="page" style="width:WIDTHpx;height:800px;border:0" srcdoc="PAGE"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement, seen = (e) => e.getBoundingClientRect();
  const outside = [...page.querySelectorAll("section, p, svg, pre, figure, h1, h2")]
    .filter(e => seen(e).right > WIDTH + 1 && !e.closest(".scroll")).map(e => e.tagName);
  const found = {
    scroll: root.scrollWidth, outside,
    forest: [...page.querySelectorAll("svg .bar")].map(e => seen(e).right <= WIDTH && seen(e).left >= 0),
    curves: [...page.querySelectorAll("svg polyline.train")].map(e => seen(e).width > 20 && seen(e).height > 5),
    tables: [...page.querySelectorAll("table")].filter(e => seen(e).height > 20).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
  };
  document.body.innerText = "FOUND" + JSON.stringify(found) + "END";
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_everything_is_visible_and_nothing_is_fetched(tmp_path, compared, width):
    page = (compared / "report.html").read_text()
    outer = LOOK.replace("WIDTH", str(width)).replace("PAGE", html.escape(page))
    (tmp_path / "outer.html").write_text(outer)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'outer.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r"FOUND(.*?)END</body>", done.stdout, re.DOTALL)[1]))
    assert found["scroll"] <= width
    assert found["outside"] == []
    assert found["forest"] == [True, True]
    assert found["curves"] == [True, True]
    assert found["tables"] >= 2
    assert found["requests"] == []
    assert "CONSOLE" not in done.stderr, f"{QKV} and {ALL}: the page logs an error"
