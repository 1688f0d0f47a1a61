"""The page at `/`, by a real browser against a real endpoint whose models write TeX."""

import json
import math
import re
import shutil
import subprocess
import sys

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from feyntune.registry.registry import Registry
from feyntune.serving import workbench
from feyntune.training.tiny_base import make_tiny_base
from tests.browser import browser  # noqa: F401
from tests.conftest import texts
from tests.serving.conftest import free_port, gauge, serving, settles
from tests.serving.factories import register_adapter, seal_adapter

SMALL = {"max_adapters": 4, "max_rank": 8, "batch_tokens": 128, "batch_requests": 16, "cache_tokens": 4096}
AXE = workbench.PAGE.parent / "workbench/node_modules/axe-core/axe.min.js"
PHONE, DESK = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def physicist(tmp_path_factory) -> str:
    """A mini base that writes sentences with formulas in them."""
    assert (workbench.PAGE / "index.html").is_file(), "The page is not built: make workbench"
    folder = tmp_path_factory.mktemp("physicist") / "mini-physicist"
    sizes = {"vocab": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 512}
    make_tiny_base(folder, texts("hep-th", 300), steps=100, tokens_per_step=1024, **sizes)
    return str(folder)


@pytest.fixture(scope="module")
def school(physicist, tmp_path_factory) -> str:
    """Address of a registry: a champion close to that base, and a babbler that hardly ever ends."""
    root = tmp_path_factory.mktemp("school")
    registry = Registry.open(str(root / "registry"))
    for variant, strength, seed in (("hep-th/lora-all", 0.05, 1), ("gr-qc/lora-all", 0.5, 2)):
        folder = seal_adapter(root / variant.replace("/", "."), physicist, variant, strength=strength, seed=seed)
        register_adapter(registry, variant, folder)
    registry.promote("hep-th/lora-all")
    return registry.store.uri


@pytest.fixture(scope="module")
def lectern(school, physicist):
    with serving(school, physicist, **SMALL) as running:
        yield running


class Page:
    """The workbench in a browser."""

    def __init__(self, driver, url: str):
        self.driver, self.url = driver, url
        self.allowed: list[str] = []  # what the console may complain about

    def open(self, size=DESK, dark=False) -> "Page":
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get(self.url)
        return self

    def ready(self) -> "Page":
        assert settles(lambda: self.all(".system")), self.driver.page_source
        return self

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def button(self, text: str):
        return next(b for b in self.all("form button") if b.text == text)

    def fill(self, selector: str, value) -> None:
        field = self.one(selector)
        field.send_keys(Keys.CONTROL, "a")
        self.driver.execute_cdp_cmd("Input.insertText", {"text": str(value)})  # typed keys cannot be emoji

    def ask(self, prompt: str, *systems: str, button="Complete", **settings) -> None:
        self.fill("form textarea", prompt)
        for system in self.all(".system:not(.names *)"):
            box = system.find_element(By.CSS_SELECTOR, "input")
            if box.is_selected() != (system.text.split()[0] in systems):
                box.click()
        for name, value in settings.items():
            self.fill(f"input[name={name}]", value)
        self.button(button).click()

    def ended(self, seconds=30.0) -> None:
        over = "[data-state=done], [data-state=stopped], [data-state=failed]"
        assert settles(lambda: self.all(".panel") and len(self.all(over)) == len(self.all(".panel")), seconds)

    def panel(self, model: str):
        return self.one(f".panel[data-model='{model}']")

    def tokens(self, model: str) -> list[dict]:
        """What is drawn of a completion, token by token, TeX switched off."""
        return self.js(
            "return [...arguments[0].querySelectorAll('.token')].map(t => "
            "({text: t.textContent, title: t.title, level: Number(/ s(\\d)/.exec(t.className)?.[1])}))",
            self.panel(model),
        )

    def press(self, *keys) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        return self.js(
            "const e = document.activeElement; return e.getAttribute('aria-label') || e.textContent || e.name"
        )

    def copied(self, form: str, model: str) -> str:
        grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": self.url.rstrip("/")}
        self.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
        button = next(b for b in self.panel(model).find_elements(By.TAG_NAME, "button") if b.text == form)
        button.click()
        assert settles(lambda: f"{form} copied" in self.panel(model).text)
        return self.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")

    def close(self) -> None:
        """No complaint in the console (a breach of the policy would be one), and nobody else was asked for anything."""
        messages = [e["message"] for e in self.driver.get_log("browser")]
        assert [m for m in messages if not any(a in m for a in self.allowed)] == []
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        asked = {(s["documentURL"], s["request"]["url"]) for s in sent if s["documentURL"].startswith("http")}
        assert (self.url, self.url + "openai/v1/models") in asked
        assert {(document, url) for document, url in asked if not url.startswith(document)} == set()


@pytest.fixture
def page(browser, lectern):  # noqa: F811
    opened = Page(browser, lectern.url + "/").open().ready()
    yield opened
    opened.close()


def completion(endpoint, **body) -> dict:
    return httpx.post(f"{endpoint.url}/openai/v1/completions", json=body, timeout=60).json()["choices"][0]


# Of every panel, at every change: how many tokens are drawn and whether it is still at work.
WATCH = """
window.seen = [];
new MutationObserver(() => seen.push(Object.fromEntries([...document.querySelectorAll('.panel')].map(p =>
  [p.dataset.model, [p.querySelectorAll('.token').length, p.dataset.state]]))))
  .observe(document.querySelector('.panels'), {childList: true, subtree: true, characterData: true, attributes: true});
"""


def test_two_systems_are_seen_to_write_side_by_side(page, lectern):
    page.js(WATCH)
    page.one(".view label input").click()  # TeX off: every token on its own
    prompt = "The brane shows"
    page.ask(prompt, "base", "champion", max_tokens=60, temperature=0)
    page.ended()
    seen = page.js("return seen")
    for model in ("base", "champion"):
        partial = {s[model][0] for s in seen if model in s and s[model][1] == "writing"}
        assert len(partial) >= 5, f"{model} was not seen to grow: {sorted(partial)}"
    both = [s for s in seen if len(s) == 2 and all(n > 0 and state == "writing" for n, state in s.values())]
    assert both, "the two never wrote at the same time"

    for model in ("base", "champion"):
        truth = completion(lectern, model=model, prompt=prompt, max_tokens=60, temperature=0, logprobs=0)
        drawn = page.tokens(model)
        assert "".join(t["text"] for t in drawn).removesuffix("∎") == truth["text"]
        assert page.one(f"[data-model={model}] .lead").text == prompt
        logprobs = [p for p, t in zip(truth["logprobs"]["token_logprobs"], drawn, strict=True)]
        assert [float(re.search(r"([\d.]+) nats", t["title"])[1]) for t in drawn] == pytest.approx(
            [-p for p in logprobs], abs=0.006
        )
        assert {t["level"] for t in drawn} == {None}  # a model's own sample is not shaded
    assert "nats a token" not in page.one(".panels").text
    assert page.one(".panels").text.count("Point at a token") == 1  # said once, beside the first answer


def test_surprise_is_told_apart_without_color_and_explained(page):
    page.ask("The brane shows its large limit", "base", button="Score")
    page.ended()
    shades = page.js(
        "return [...document.querySelectorAll('.legend .token')].map(t => { const s = getComputedStyle(t);"
        "return [t.textContent, s.borderBottomStyle + s.borderBottomWidth, s.backgroundColor] })"
    )
    assert [name for name, _, _ in shades] == ["0–1", "1–2", "2–4", "4–7", "over 7"]
    assert len({line for _, line, _ in shades}) == len({color for _, _, color in shades}) == 5
    assert len({t["level"] for t in page.tokens("base")}) > 1
    page.one(".view label:nth-of-type(1) input").click()
    assert {t["level"] for t in page.tokens("base")} == {None}  # shading off


def test_tex_is_set_in_prompt_and_completion_even_across_their_border(page, lectern):
    prompt = r"The gauge theory has $\sqrt{\vec{x}^2} \le \frac{1}{2}$ and a dual black hole gives its large $N"
    text = completion(lectern, model="base", prompt=prompt, max_tokens=60, temperature=0)["text"]
    assert "$" in text, "this base closes no formula: the test needs another prompt"
    page.ask(prompt, "base", max_tokens=60, temperature=0)
    page.ended()
    formulas = page.js(
        "return [...document.querySelectorAll('.output .katex')].map(k => [k.querySelector('annotation').textContent,"
        "k.closest('[data-token], .lead').className, k.getBoundingClientRect().width])"
    )
    assert formulas[0][0] == r"\sqrt{\vec{x}^2} \le \frac{1}{2}"
    assert formulas[0][1] == "lead"
    assert formulas[1][0].startswith("N")
    assert "token" in formulas[1][1]
    assert all(width > 5 for _, _, width in formulas)
    assert page.js("return document.fonts.check('16px KaTeX_Math') && document.fonts.check('16px KaTeX_Main')")
    assert page.js("return [...document.fonts].map(f => f.display)").count("swap") == page.js(
        "return document.fonts.size"
    )  # a formula can be read while its font loads
    assert "$" not in page.js(
        "const o = document.querySelector('.output').cloneNode(true);"
        "o.querySelectorAll('.katex').forEach(k => k.remove()); return o.textContent"
    )
    page.ask(r"A broken $\frac{1}{$ and $5 or $6 and \href{javascript:alert(1)}{x}", "base", max_tokens=5)
    page.ended()
    assert r"A broken $\frac{1}{$ and $5 or $6" in page.one(".output").text
    assert not page.all(".output a")


def test_stop_ends_the_work_on_the_server_too(page, lectern):
    cancelled = 'feyntune_requests_total{adapter="gr-qc.lora-all",outcome="cancelled",protocol="openai"}'
    before = gauge(lectern, cancelled)
    made = gauge(lectern, 'feyntune_tokens_total{adapter="gr-qc.lora-all",kind="completion"}')
    page.js(
        "new MutationObserver(() => { if (document.querySelector('.panel .token'))"
        "[...document.querySelectorAll('form button')].find(b => b.textContent === 'Stop').click() })"
        ".observe(document.querySelector('.panels'), {childList: true, subtree: true})"
    )
    page.ask("The brane", "gr-qc/lora-all", max_tokens=500, temperature=1)
    page.ended()
    assert page.panel("gr-qc.lora-all").get_attribute("data-state") == "stopped"
    assert "stopped" in page.panel("gr-qc.lora-all").text
    assert page.one(".said").text == "Stopped."
    assert 0 < len(page.tokens("gr-qc.lora-all")) < 400
    assert settles(lambda: gauge(lectern, cancelled) == before + 1)
    assert settles(lambda: gauge(lectern, "feyntune_running_requests") == 0)
    assert gauge(lectern, 'feyntune_tokens_total{adapter="gr-qc.lora-all",kind="completion"}') - made < 450


def test_a_score_tells_the_surprise_of_the_text_itself(page, lectern):
    prompt = "größe 😀 the brane shows its large $N$ limit."
    page.one(".view label input").click()  # TeX off
    page.ask(prompt, "base", "champion", button="Score")
    page.ended()
    for model in ("base", "champion"):
        truth = completion(lectern, model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        known = [p for p in truth["logprobs"]["token_logprobs"] if p is not None]
        assert f"perplexity {math.exp(-sum(known) / len(known)):.2f}" in page.panel(model).text
        drawn = page.tokens(model)
        assert "".join(t["text"] for t in drawn) == prompt
        assert next(t for t in drawn if " brane" in t["text"] or t["text"].endswith("ane"))["title"]


def test_a_score_shows_what_a_system_predicts_better_than_the_base(page, lectern):
    prompt = "The brane shows its large limit and a gauge theory has a hidden supersymmetry."
    page.ask(prompt, "base", "champion", button="Score")
    page.ended()
    surprise = {}
    for model in ("base", "champion"):
        truth = completion(lectern, model=model, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        surprise[model] = [p for p in truth["logprobs"]["token_logprobs"] if p is not None]
    base = surprise["base"]
    gains = [champion - b for b, champion in zip(base, surprise["champion"], strict=True)]
    assert f"better than the base on {sum(g > 0 for g in gains)} of {len(gains)}" in page.panel("champion").text
    assert "better than the base" not in page.panel("base").text
    # Not of the first token, which has no probability, and those that share a character are drawn once.
    drawn = {
        model: page.js(
            "return [...arguments[0].querySelectorAll('.token')].map(t => "
            "[Number(t.dataset.token), / ([gsw]\\d)/.exec(t.className)[1], t.title]).filter(t => t[0] > 0)",
            page.panel(model),
        )
        for model in ("base", "champion")
    }
    assert len(drawn["champion"]) == len(drawn["base"]) > len(base) / 2
    for index, shade, _ in drawn["base"]:
        assert shade == f"s{sum(-base[index - 1] >= bound for bound in (1, 2, 4, 7))}"
    for index, shade, title in drawn["champion"]:
        gain = gains[index - 1]
        size = 0 if abs(gain) <= 0.2 else 1 if abs(gain) <= 1 else 2
        assert shade == f"{'w' if gain < 0 and size else 'g'}{size}"
        assert re.search(r"[\d.]+ nats (better|worse) than the base", title)[1] == ("worse" if gain < 0 else "better")


def test_the_copied_calls_make_the_same_completion(page, lectern):
    prompt = 'It\'s "the brane" of $N$ \\alpha 😀 `id` $(id) shows'
    page.ask(prompt, "champion", max_tokens=25, temperature=0.9, seed=7)
    page.ended()
    whole = page.copied("text", "champion")
    assert whole.startswith(prompt)
    curl = page.copied("curl", "champion")
    done = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["text"] == whole.removeprefix(prompt), done
    python = page.copied("Python", "champion")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60)
    assert done.stdout.removesuffix("\n") == whole.removeprefix(prompt), done
    assert "# it was hep-th.lora-all@" in python


def test_a_key_is_asked_for_kept_to_the_page_and_never_copied(browser, school, physicist, tmp_path):  # noqa: F811
    (tmp_path / "keys").write_text("the-real-key\n")
    with serving(school, physicist, **SMALL, keys_file=str(tmp_path / "keys")) as running:
        page = Page(browser, running.url + "/").open()
        page.allowed = ["401 (Unauthorized)"]
        assert settles(lambda: page.all("input[type=password]"))
        assert page.one(".error").text == "This endpoint asks for a key."
        assert settles(lambda: "Key" in page.js("return document.activeElement.parentElement.textContent"))
        page.press("a-wrong-key", Keys.TAB)
        assert settles(lambda: "valid key" in page.one(".error").text)
        page.fill("input[type=password]", "the-real-key")
        page.press(Keys.TAB)
        page.ready()
        assert not page.all(".error")
        page.ask("The brane", "champion", max_tokens=10, temperature=0)
        page.ended()
        copied = page.copied("text", "champion").removeprefix("The brane")
        curl, python = page.copied("curl", "champion"), page.copied("Python", "champion")
        assert "the-real-key" not in curl + python
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "FEYNTUNE_KEY": "the-real-key"}
        for command, read in (
            (["sh", "-c", curl], lambda out: json.loads(out)["choices"][0]["text"]),
            ([sys.executable, "-c", python], lambda out: out.removesuffix("\n")),
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
            assert read(done.stdout) == copied, done
        storage = "return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert "the-real-key" not in page.js(storage) + page.js("return document.documentElement.outerHTML")
        assert "the-real-key" not in running.output()
        page.close()


def test_an_adapter_shows_its_lineage_and_its_model_card(page, lectern, school):
    version = Registry.open(school).resolve("champion")
    system = next(s for s in page.all(".system") if s.text.startswith("hep-th/lora-all"))
    system.find_element(By.TAG_NAME, "summary").click()
    shown = system.find_element(By.TAG_NAME, "dl").text
    assert version.name in shown
    assert f"rank {version.rank} on" in shown
    assert all(digest[:16] in shown for digest in version.lineage.values())
    assert "−1.00 [−1.50, −0.50]" in system.text
    system.find_element(By.CSS_SELECTOR, "button.link").click()
    assert settles(lambda: page.all("dialog[open] .card"))
    assert page.one("dialog .card h3").text == "card"
    page.press(Keys.ESCAPE)
    assert settles(lambda: not page.all("dialog"))
    assert httpx.get(f"{lectern.url}/cards/champion").headers["content-type"].startswith("text/markdown")
    assert httpx.get(f"{lectern.url}/cards/base").status_code == 404


def test_all_of_it_by_keyboard(page):
    def tab_to(name: str, back=False) -> None:
        for _ in range(60):
            page.press(*([Keys.SHIFT, Keys.TAB] if back else [Keys.TAB]))
            if name in page.focused():
                ring = page.js(
                    "const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth"
                )
                assert ring not in ("none0px", "none3px"), f"{name} shows no focus"
                return
        raise AssertionError(f"{name} is not reached by Tab")

    page.js("document.querySelector('form textarea').focus()")
    page.press(Keys.CONTROL, "a")
    page.press("The brane shows")
    tab_to("Complete")  # right after the text
    tab_to("A brane in a teapot")
    page.press(Keys.SPACE)
    assert "teapot" in page.one("form textarea").get_attribute("value")
    page.js("document.querySelectorAll('.system')[2].querySelector('input').setAttribute('aria-label', 'third')")
    tab_to("third")
    page.press(Keys.SPACE)
    assert page.all(".system")[2].find_element(By.CSS_SELECTOR, "input").is_selected()
    tab_to("lineage".title())
    page.press(Keys.ENTER)
    assert page.all("details[open] dd")
    tab_to("max_tokens")
    page.press(Keys.CONTROL, "a")
    page.press("30", Keys.ENTER)
    page.ended()
    assert len(page.all(".panel")) == 3
    tab_to("Completion by base")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert re.match(r"2/\d+ .* nats, p = [\d<> .]+ %", page.one(".readout").text)
    page.press(Keys.END)
    assert re.match(r"(\d+)/\1 ", page.one(".readout").text)
    page.press(Keys.HOME, Keys.ARROW_LEFT)
    assert page.one(".readout").text.startswith("1/")
    tab_to("Copy curl of base")
    page.js("document.querySelector('form textarea').focus()")
    page.press(Keys.CONTROL, Keys.ENTER)
    assert settles(
        lambda: page.one(".said").text == "3 systems are answering." or page.one(".said").text == "Finished."
    )
    page.ended()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_and_axe_finds_nothing(page, size, dark):
    axe = AXE.read_text()

    def check() -> None:
        assert page.js("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        page.js(axe)
        violations = page.driver.execute_async_script(
            "axe.run({rules: {'scrollable-region-focusable': {enabled: true}}}).then(r => arguments[0]("
            "r.violations.map(v => [v.id, v.nodes.map(n => n.html + n.failureSummary)])))"
        )
        assert violations == []

    page.open(size, dark).ready()
    page.one("details.names > summary").click()
    for details in page.all(".system details summary"):
        details.click()
    check()
    prompt = (
        r"A very long formula $$\sum_{a=1}^{N} \int d^4x\, a_1 b_1 c_1 d_1 e_1 f_1 g_1 h_1 i_1 j_1 k_1 l_1 m_1 n_1$$"
    )
    page.ask(prompt + " supercalifragilistic" * 3, "base", "champion", "gr-qc/lora-all", max_tokens=40, temperature=1.5)
    page.ended()
    check()


def test_a_field_stays_as_typed_while_answers_come(page):
    page.js(
        "const field = document.querySelector('input[name=temperature]');"
        "const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
        "new MutationObserver((_, observer) => { if (!document.querySelector('.panel .token')) return;"
        "observer.disconnect(); set.call(field, ''); field.dispatchEvent(new Event('input', {bubbles: true})) })"
        ".observe(document.querySelector('.panels'), {childList: true, subtree: true})"
    )
    page.ask("The brane", "base", "gr-qc/lora-all", max_tokens=60, temperature=1)
    page.ended()
    assert page.tokens("gr-qc.lora-all")
    assert page.one("input[name=temperature]").get_attribute("value") == ""


def test_answers_stand_in_the_order_of_the_list(page):
    names = [s.text.split()[0] for s in page.all(".system:not(.names *)")]
    assert names[:2] == ["base", "champion"]
    page.ask("The brane", "base", "champion", "gr-qc/lora-all", max_tokens=5)
    page.ended()
    assert [p.text.split()[0] for p in page.all(".panel h2")] == ["base", "champion", "gr-qc/lora-all"]
    tops = page.js("return [...document.querySelectorAll('.panel')].map(p => p.getBoundingClientRect().top)")
    assert len(set(tops)) == 1  # three columns


@pytest.mark.parametrize("size", [PHONE, DESK, (1366, 768)], ids=["phone", "desk", "laptop"])
def test_complete_is_in_the_first_screen(page, size):
    page.open(size).ready()
    assert page.js("return arguments[0].getBoundingClientRect().bottom", page.button("Complete")) < size[1] * 0.6


def test_examples_are_of_the_run_that_measured_the_adapters(browser, physicist, tmp_path):  # noqa: F811
    registry = Registry.open(str(tmp_path / "registry"))
    folder = seal_adapter(tmp_path / "adapter", physicist, "hep-th/lora-all", strength=0.05, seed=1)
    prompts = ["We study $x^2$ branes on a circle.", "The horizon hums in tune with us."]
    register_adapter(registry, "hep-th/lora-all", folder, examples=prompts)
    registry.promote("hep-th/lora-all")
    with serving(registry.store.uri, physicist, **SMALL) as running:
        page = Page(browser, running.url + "/").open().ready()
        assert [b.text for b in page.all(".examples button")] == [
            "We study … branes on a …",
            "The horizon hums in tune with …",
        ]
        assert page.one("form textarea").get_attribute("value") == prompts[0]
        page.all(".examples button")[1].click()
        assert page.one("form textarea").get_attribute("value") == prompts[1]


def test_what_goes_wrong_is_said_in_plain_words(page, browser, school, physicist):  # noqa: F811
    page.allowed = ["400 (Bad Request)"]
    page.ask("The brane", "base", max_tokens=600)
    page.ended()
    assert "together at most 512 fit" in page.one(".panel .error").text
    assert page.one(".said").text == "1 of 1 failed."
    page.ask("The brane", max_tokens=10)
    assert settles(lambda: page.all(".missing"))
    assert page.one(".missing").text == "Tick at least one system to compare."

    with serving(school, physicist, **SMALL) as running:
        other = Page(browser, running.url + "/").open().ready()
        running.kill()
        other.ask("The brane", "base")
        other.ended()
        assert other.one(".panel .error").text == "The endpoint cannot be reached: is it still running?"
        page.allowed += ["net::ERR_CONNECTION"]


def test_the_page_is_fenced_in_and_kserve_keeps_its_liveness(lectern):
    page = httpx.get(lectern.url, headers={"Accept": "text/html,*/*"})
    policy = dict(d.split(" ", 1) for d in page.headers["content-security-policy"].split("; "))
    assert policy.pop("require-trusted-types-for") == "'script'"
    own = {"script-src", "style-src", "font-src", "img-src", "connect-src"}
    assert {k for k, v in policy.items() if v == "'self'"} == own
    assert {v for k, v in policy.items() if k not in own} == {"'none'"}
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} <= policy.keys()
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["vary"] == "Accept"
    assert not re.search(r"<script(?![^>]*src=)|style=|<style|\son\w+=|https?:", page.text)
    again = httpx.get(lectern.url, headers={"Accept": "text/html", "If-None-Match": page.headers["etag"]})
    assert again.status_code == 304

    files = re.findall(r'(?:src|href)="\./(workbench/[^"]+)"', page.text)
    assert len(files) == 3
    for name in files:
        file = httpx.get(f"{lectern.url}/{name}")
        assert file.status_code == 200
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert file.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{lectern.url}/workbench/..%2f..%2fserve.py").status_code == 404
    assert httpx.get(lectern.url).json() == {"status": "alive"}


def test_the_setting_switches_it_off(school, physicist, tmp_path):
    port = free_port()
    arguments = ["serve", "--base", physicist, "--registry", school, "--no-workbench"]
    command = [sys.executable, "-m", "feyntune", *arguments, f"--port={port}", f"--grpc-port={free_port()}"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:

            def answers() -> bool:
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
                except httpx.TransportError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    return False

            assert settles(answers, 300), (tmp_path / "log").read_text()
            answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"Accept": "text/html"})
            assert (answer.status_code, answer.text) == (404, "The workbench is switched off on this endpoint.\n")
            script = next((workbench.PAGE / "workbench").glob("*.js")).name
            assert httpx.get(f"http://127.0.0.1:{port}/workbench/{script}").status_code == 404
        finally:
            process.kill()


def test_without_the_built_page_it_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(workbench, "PAGE", tmp_path)
    app = FastAPI()

    async def live() -> dict[str, str]:
        return {"status": "alive"}

    workbench.add_workbench(app, True, live)
    client = TestClient(app)
    answer = client.get("/", headers={"Accept": "text/html"})
    assert answer.status_code == 503
    assert answer.text.count(".") == 1
    assert "`make workbench`" in answer.text
    assert client.get("/").json() == {"status": "alive"}


def test_the_wheel_holds_the_page_and_nothing_of_its_workshop(tmp_path):
    root = workbench.PAGE.parents[2]
    for name in ("pyproject.toml", "README.md", "LICENSE", "feyntune", "pipelines"):
        ignore = shutil.ignore_patterns("node_modules", "__pycache__")
        source = root / name
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    from zipfile import ZipFile

    names = ZipFile(next(tmp_path.glob("*.whl"))).namelist() if done.returncode == 0 else done.stderr
    held = {n.removeprefix("feyntune/serving/page/") for n in names if n.startswith("feyntune/serving/page/")}
    built = {str(p.relative_to(workbench.PAGE)) for p in workbench.PAGE.rglob("*") if p.is_file()}
    assert held == built
    assert not [n for n in names if n.startswith("feyntune/serving/workbench/")]
