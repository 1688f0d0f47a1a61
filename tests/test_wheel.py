"""The wheel, installed into empty environments: what it holds, what each extra brings, a run among foreign packages."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Entry modules of each extra; the extras of the images are unions of these. `run` is tested by a run.
ENTRIES = {
    "data": ["feyntune.ingestion.ingest", "feyntune.splitting.split"],
    "pipeline": ["feyntune.kubeflow.submit", "feyntune.kubeflow.chart_jobs", "feyntune.deployment.deploy"],
    "train": ["feyntune.training.train", "feyntune.training.launch"],
    "eval": ["feyntune.evaluation.evaluate", "feyntune.evaluation.compare"],
    "study": ["feyntune.study.study", "feyntune.study.page", "feyntune.judging.judges"],
    "serve": ["feyntune.serving.serve", "feyntune.engine.batching"],
}
NEEDS_TORCH = {"train", "eval", "serve", "run"}


def call(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def check(*command: str | Path, **options) -> str:
    done = call(*command, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools writes into the folder it builds from."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "feyntune", "pipelines"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    check(sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('.')", cwd=source)
    return next(source.glob("*.whl"))


@pytest.fixture(scope="module")
def torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of torch, fetched by pip as the Makefile does, so that its index decides on the build."""
    folder = tmp_path_factory.mktemp("torch")
    download = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    check(*download, "-d", folder, "-r", ROOT / "requirements" / "torch.txt")
    return next(folder.glob("torch-*.whl"))


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, wheel: Path, request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """Makes an environment that holds the wheel with an extra (or none), and returns its folder of commands."""
    uv = Path(sys.executable).with_name("uv")
    variables = dict(os.environ)
    index = check(sys.executable, "-m", "pip", "config", "list").partition("global.index-url='")[2].partition("'")[0]
    if index:
        variables.setdefault("UV_DEFAULT_INDEX", index)

    def make(extra: str) -> Path:
        folder = tmp_path_factory.mktemp(extra or "core") / "venv"
        check(uv, "venv", "-q", "--python", sys.executable, folder)
        install = [uv, "pip", "install", "-q", "--python", folder, "-c", ROOT / "requirements" / "dev.txt"]
        if extra in NEEDS_TORCH:
            check(*install, request.getfixturevalue("torch"), env=variables)
        check(*install, f"{wheel}[{extra}]" if extra else wheel, env=variables)
        return folder / "bin"

    return make


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    assert {n.partition("/")[0] for n in names if ".dist-info/" not in n} == {"feyntune"}
    for name in ("compiled/suite.yaml", "recipes/paper.yaml", "demo/base/model.safetensors", "py.typed"):
        assert f"feyntune/{name}" in names
    assert not [n for n in names if "node_modules" in n or n.endswith((".ts", ".tsx", ".pyc"))]


def test_the_core_alone_names_the_extra_that_a_command_needs(
    environment: Callable[[str], Path], tmp_path: Path
) -> None:
    commands = environment("")
    assert "Domain-adapted" in check(commands / "feyntune", "--help", cwd=tmp_path)
    base = next(commands.parent.glob("lib/python*/site-packages/feyntune/demo/base"))
    for extra, arguments in {"run": ["run"], "serve": ["serve", "--base", base, "--registry", "registry"]}.items():
        done = call(commands / "feyntune", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].endswith(f"pip install 'feyntune[{extra}]'.")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("extra", ENTRIES)
def test_an_extra_brings_what_its_modules_import(
    environment: Callable[[str], Path], tmp_path: Path, extra: str
) -> None:
    code = "; ".join(f"import {module}" for module in ENTRIES[extra])
    check(environment(extra) / "python", "-c", code, cwd=tmp_path)


def test_a_run_among_foreign_packages_of_the_same_names(environment: Callable[[str], Path], tmp_path: Path) -> None:
    """Python puts the working directory first: what lies there must not be imported in place of ours."""
    for name in ("components", "pipelines", "recipes", "docs", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a foreign package was imported')\n")
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    output = check(
        environment("run") / "feyntune",
        *("run", "--source", "synthetic:600", "--variants", "hep-th/lora-all"),
        cwd=tmp_path,
        env=variables,
    )
    assert "hep-th/lora-all" in output
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()
