"""Dependencies are declared once, in pyproject's extras, and each extra brings what its packages import."""

import ast
import importlib.metadata as metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# The packages that each extra makes work. Everything else of feyntune must do with the core dependencies alone.
WORKS_WITH = {
    "data": ["ingestion", "splitting"],
    "pipeline": ["kubeflow", "deployment"],
    "train": ["training", "model", "engine"],
    "eval": ["evaluation"],
    "tasks": ["tasks"],
    "study": ["study", "judging"],
    "serve": ["serving"],
    "run": ["cli", "demo"],
}
CORE = ["artifacts", "registry"]
# Imports of a module that only some installations have, each behind a check or an error that names it.
OPTIONAL = {"flash_attn", "vllm", "lm_eval", "IPython"}


def declared(extra: str | None) -> set[str]:
    """Names of the distributions that `extra` installs directly, those of the extras it includes too."""
    names: set[str] = set()
    for line in [*PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] if extra else [])]:
        requirement = Requirement(line)
        if requirement.name == "feyntune":
            for inner in requirement.extras:
                names |= declared(inner)
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def imported(folder: Path) -> dict[str, Path]:
    """Top-level names of other projects that the modules under `folder` import, at the top or inside a function."""
    names: dict[str, Path] = {}
    for path in folder.rglob("*.py"):
        if "node_modules" in path.parts:  # npm's own scripts, where the workbench page was built
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            else:
                continue
            names |= {m.partition(".")[0]: path for m in modules}
    return {n: p for n, p in names.items() if n not in sys.stdlib_module_names | OPTIONAL | {"feyntune"}}


DISTRIBUTIONS = metadata.packages_distributions()


@pytest.mark.parametrize(("extra", "package"), [(e, p) for e, packages in WORKS_WITH.items() for p in packages])
def test_an_extra_declares_what_its_packages_import(extra, package):
    have = declared(extra)
    for name, path in imported(ROOT / "feyntune" / package).items():
        owners = {canonicalize_name(d) for d in DISTRIBUTIONS.get(name, [name])}
        assert owners & have, f"{path.relative_to(ROOT)} imports {name}: add {', '.join(owners)} to the extra {extra}"


@pytest.mark.parametrize("package", CORE)
def test_the_core_needs_no_extra(package):
    for name, path in imported(ROOT / "feyntune" / package).items():
        owners = {canonicalize_name(d) for d in DISTRIBUTIONS.get(name, [name])}
        assert owners & declared(None), f"{path.relative_to(ROOT)} imports {name}, which the core does not declare"


def test_every_package_is_in_an_extra_or_in_the_core():
    packages = {p.parent.name for p in (ROOT / "feyntune").glob("*/__init__.py")}
    assert packages == set(CORE).union(*WORKS_WITH.values())


@pytest.mark.parametrize("lock", ["dev", "worker", "trainer", "predictor"])
def test_the_locks_hold_what_the_extras_declare(lock):
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    pinned = {canonicalize_name(n) for n in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)}
    missing = declared(lock) - pinned - {"torch"}  # torch has a lock of its own
    assert not missing, f"run `make lock`: requirements/{lock}.txt lacks {', '.join(sorted(missing))}"


def test_the_installed_version_is_that_of_the_project_and_of_the_chart():
    import yaml

    chart = yaml.safe_load((ROOT / "charts/feyntune/Chart.yaml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == citation["version"] == PROJECT["version"]
