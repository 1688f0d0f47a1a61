"""The shape of the package: what imports what, how long files are, and what a notebook gets."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import feyntune

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "feyntune"
STEPS = {"ingestion", "splitting", "training", "evaluation", "judging", "study", "registry", "deployment", "serving"}
EXCEPTIONS = {
    ("serving", "registry"): "the endpoint serves what the registry holds",
    ("deployment", "registry"): "what is deployed is read from the registry, and recorded there",
}
MAX_LINES = 500


def _imports(path: Path) -> set[str]:
    """Modules of feyntune that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n for n in names if n.startswith("feyntune.")}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in PACKAGE.rglob("*.py") if "page" not in path.relative_to(ROOT).parts}


def test_imports_have_no_cycle() -> None:
    graph = {name: {i for i in _imports(path) if i in FILES and i != name} for name, path in FILES.items()}
    graph.pop("feyntune")  # its names are imported when they are used
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_steps_do_not_import_each_other() -> None:
    crossing: dict[tuple[str, str], str] = {}
    for name, path in FILES.items():
        step = name.split(".")[1] if "." in name else ""
        for imported in _imports(path) if step in STEPS else ():
            other = imported.split(".")[1]
            if other in STEPS and other != step:
                crossing[step, other] = f"{name} imports {imported}"
    assert crossing.keys() == EXCEPTIONS.keys(), crossing


@pytest.mark.parametrize("folder", ["feyntune", "components", "pipelines", "docs", "benchmarks", "charts"])
def test_no_python_file_is_too_long(folder: str) -> None:
    lengths = {p: p.read_text().count("\n") for p in (ROOT / folder).rglob("*.py") if "node_modules" not in p.parts}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES} == {}


def test_the_commands_are_short_files() -> None:
    assert max(p.read_text().count("\n") for p in (PACKAGE / "cli").glob("*.py")) <= 300


def test_a_notebook_finds_the_functions_it_needs() -> None:
    assert set(feyntune.__all__) <= set(dir(feyntune))
    for name in set(feyntune.__all__) - {"serve"}:
        assert getattr(feyntune, name), name
    assert feyntune.__version__.count(".") >= 2
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = feyntune.trian


def test_a_notebook_can_call_them(tmp_path: Path) -> None:
    feyntune.split(_ingested(tmp_path / "corpus"), tmp_path / "split")
    assert (tmp_path / "split" / "manifest.json").is_file()
    assert feyntune.Registry.open(str(tmp_path / "registry")).versions() == []


def _ingested(folder: Path) -> Path:
    feyntune.ingest("synthetic:300", folder)
    return folder


def test_the_help_and_the_package_import_nothing_slow() -> None:
    code = (
        "import sys, runpy, contextlib, io; import feyntune; sys.argv = ['feyntune', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    runpy.run_module('feyntune', run_name='__main__')\n"
        "print(*sorted({'torch', 'transformers', 'kfp', 'pydantic', 'pyarrow', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert done.stdout.strip() == ""
