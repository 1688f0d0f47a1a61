"""What the documentation says of the code is what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs.components import readme, steps
from docs.reference import pages

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["cli.md", "settings.md", "variants.md", "values.md", "metrics.md", "http.md"])
def test_the_reference_is_fresh(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == pages()[name], "stale: run `make reference`"


@pytest.mark.parametrize("step", steps())
def test_a_components_readme_has_its_inputs_and_outputs(step: str) -> None:
    text = (DOCS.parent / "components" / step / "README.md").read_text()
    assert text == readme(step), "stale: run `make reference`"
    assert "required |  |" not in text, "an input without a meaning"
    assert "```python\n" in text, "no example"


@pytest.mark.parametrize("step", steps())
def test_a_components_metadata_has_the_fields_of_kubeflows_repository(step: str) -> None:
    metadata = yaml.safe_load((DOCS.parent / "components" / step / "metadata.yaml").read_text())
    assert metadata.keys() == {"name", "tier", "stability", "dependencies", "tags", "lastVerified", "ci"}
    assert metadata["name"] == step
    assert metadata["stability"] in ("alpha", "beta", "stable")
    assert metadata["dependencies"]["kubeflow"][0] == {"name": "Pipelines", "version": ">=2.16"}
    assert all(isinstance(tag, str) for tag in metadata["tags"])


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
    page = (tmp_path / "site" / "laptop.html").read_text()
    for tag in ("<script src=", '<link rel="stylesheet" href=', "<img src="):
        assert not re.search(re.escape(tag) + '"?http', page)  # nothing from another host
    assert "search/search_index.js" in {str(p.relative_to(tmp_path / "site")) for p in tmp_path.rglob("*.js")}
    assert not list((tmp_path / "site").rglob("*.py"))
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < 300_000
        assert not re.search(r"href=|src=|url\([\"']?http", picture.read_text(errors="replace"))


def test_every_command_has_an_example_that_it_would_take() -> None:
    """The options of each example exist; what follows `Example:` is typed by people as it stands."""
    import typer.main

    from feyntune.cli.main import app

    def walk(command, path):
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                yield from walk(inner, [*path, name])
        else:
            yield path, command

    for path, command in walk(typer.main.get_command(app), ["feyntune"]):
        example = (command.epilog or "").removeprefix("Example: ")
        assert example.startswith(" ".join(path) + " ") or example == " ".join(path), path
        options = {o for p in command.params for o in p.opts}
        given = set(re.findall(r"(?<= )--[a-z-]+", example))
        assert given <= options, f"{path}: {given - options}"
        required = {p.opts[0] for p in command.params if p.required and p.param_type_name == "option"}
        assert all(any(o in example for o in p.opts) for p in command.params if p.opts[0] in required), path
