"""Every command in README.md and docs/ is run, page by page in the order it stands in, or says why it is not.

A fenced block of `sh` runs unless the comment `<!-- not run: REASON -->` stands before it. Blocks of a page run in
one shell and one folder, which begins with a checkout's folders and the tiny base model.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: (.{15,}) -->")


def commands(page: Path) -> list[str]:
    """The text of every block that is to be run."""
    blocks, before = [], ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info.split()[:1] == ["sh"] and not NOT_RUN.search(before):
            blocks.append(token.content)
        if token.type in ("html_block", "fence") or token.type.endswith("_open"):
            before = token.content if token.type == "html_block" else ""
    return blocks


RUN = [page for page in PAGES if commands(page)]


def test_there_are_commands_to_run() -> None:
    assert ROOT / "docs" / "laptop.md" in RUN


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_the_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    for name in ("charts", "components", "manifests", "pipelines", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = tmp_path / "page.sh"
    script.write_text("set -e\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + "\n".join(commands(page)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-x", str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
