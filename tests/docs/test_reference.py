"""What the documentation says of the code is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.reference import pages

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["cli.md", "settings.md", "variants.md", "values.md", "metrics.md", "http.md"])
def test_the_reference_is_fresh(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == pages()[name], "stale: run `make reference`"


def test_every_setting_metric_and_option_says_what_it_means() -> None:
    for name, text in pages().items():
        for line in text.splitlines():
            if line.startswith(("| `", "* `")):
                meaning = line.rstrip("| ").rpartition("|")[2] if line[0] == "|" else line.rpartition("`")[2]
                assert meaning.strip(" :") or name == "http.md", f"{name}: {line}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "laptop" / "index.html").read_text()
    for tag in ("<script src=", '<link rel="stylesheet" href='):
        assert not re.search(re.escape(tag) + '"?http', page)  # nothing from another host
