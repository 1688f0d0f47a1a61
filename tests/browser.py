"""A real browser for tests of what people see: headless Chromium, driven by Selenium.

from tests.browser import browser, errors, requested, resize  # noqa: F401

def test_page(browser):
    browser.get(url)
    assert errors(browser) == []
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def start(profile: Path) -> webdriver.Chrome:
    """A browser with a profile of its own; end it with `quit`."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail("no browser to test with: apt-get install -y chromium chromium-driver", pytrace=False)
    options = Options()
    options.binary_location = binary
    for flag in (*_FLAGS, f"--user-data-dir={profile}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, Service(driver))  # the driver is given: Selenium looks for none elsewhere


@pytest.fixture(scope="module")
def running_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(running_browser: webdriver.Chrome) -> webdriver.Chrome:
    """The module's browser on an empty page, at desk width, with nothing in its logs."""
    running_browser.get("about:blank")
    running_browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    resize(running_browser, 1280, 900)
    errors(running_browser)
    requested(running_browser)
    return running_browser


def visit(driver: webdriver.Chrome, url: str) -> None:
    """Open a page and wait until it is complete: `get` alone sometimes returns before style sheets are there."""
    driver.get(url)
    WebDriverWait(driver, 60).until(lambda d: d.execute_script("return document.readyState") == "complete")


def resize(driver: webdriver.Chrome, width: int, height: int = 844) -> None:
    """A page `width` CSS pixels wide: below 500, narrower than a window can be, as a phone shows it."""
    phone: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 500})


def errors(driver: webdriver.Chrome) -> list[str]:
    """What the console has said since the last call; what the content security policy stopped is among it."""
    return [line["message"] for line in driver.get_log("browser")]


def requested(driver: webdriver.Chrome) -> list[str]:
    """Addresses of all requests of pages since the last call; the browser's own pages are not among them."""
    lines = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    urls = [line["params"]["request"]["url"] for line in lines if line["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("chrome:", "chrome-untrusted:", "data:"))]


def picture(driver: webdriver.Chrome, path: Path) -> Path:
    """A picture of the whole page, for looking at."""
    import base64

    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))
    return path
