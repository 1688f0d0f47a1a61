"""How tests look at a page in the browser of tests/browser.py."""

import base64
import json
import os
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait


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


def look_at(driver: webdriver.Chrome, name: str) -> None:
    """A picture of the whole page, for people to look at, where FEYNTUNE_PICTURES names a folder for it."""
    if "FEYNTUNE_PICTURES" not in os.environ:
        return
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    (Path(os.environ["FEYNTUNE_PICTURES"]) / name).write_bytes(base64.b64decode(shot["data"]))
