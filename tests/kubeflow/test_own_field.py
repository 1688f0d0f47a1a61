"""A corpus of another field than arXiv's physics: one run, from JSON lines and mixtures of your own to a registry."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feyntune.cli.main import app
from feyntune.errors import UserError
from feyntune.ingestion.synthetic import synthetic_records
from feyntune.kubeflow import local
from feyntune.kubeflow.preflight import choose_variants

MIXTURES = """
mixtures:
  - name: galaxies
    parts: {astro-ph.GA: all}
  - name: galaxies80+cosmos20
    parts: {astro-ph.GA: 80%, astro-ph.CO: 20%}
    size: galaxies
"""
FEW = {"papers": 3, "max_new_tokens": 8, "similarity": False}
RECIPE = {
    "train": {"precision": "fp32", "learning_rate": 3e-3, "epochs": 1},
    "evaluate": {"precision": "fp32", "completions": FEW},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 papers as somebody's own JSON lines, one line of them bad."""
    path = tmp_path / "mine.jsonl"
    with path.open("w", encoding="utf-8") as f:
        for k, r in enumerate(synthetic_records(300, seed=3, categories=("hep-th",))):
            category = "astro-ph.GA" if k % 3 else "astro-ph.CO"
            day = f"2020-01-{1 + k % 28:02d}"
            f.write(json.dumps({"id": f"p{k}", "text": r["abstract"], "date": day, "category": category}) + "\n")
        f.write(json.dumps({"id": "bad", "text": None}) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_corpus_and_mixtures_of_another_field_run_to_the_registry(corpus: Path, tiny_base: str, tmp_path: Path):
    (tmp_path / "mixtures.yaml").write_text(MIXTURES)
    command = [sys.executable, "-m", "feyntune", "run", "--source", f"jsonl:{corpus.name}", "--json"]
    command += ["--mixtures", "mixtures.yaml", "--variants", "galaxies80+cosmos20/lora-qkv", "--max-bad", "0.01"]
    command += ["--base", tiny_base, "--recipe", json.dumps(RECIPE)]
    done = subprocess.run(command, check=True, cwd=tmp_path, stdout=subprocess.PIPE)
    summary = json.loads(done.stdout)
    assert list(summary["variants"]) == ["galaxies80+cosmos20/lora-qkv"]
    assert summary["variants"]["galaxies80+cosmos20/lora-qkv"]["train_tokens"] > 0
    assert summary["arguments"]["categories"] == ["astro-ph.GA", "astro-ph.CO"]
    assert summary["arguments"]["recipe"]["evaluate"]["categories"] == ["astro-ph.GA", "astro-ph.CO"]
    assert (tmp_path / "runs" / "latest" / "report.html").is_file()


def test_what_is_not_asked_for_is_named_with_the_option_that_asks(corpus: Path, tmp_path: Path):
    from feyntune.ingestion.ingest import ingest

    with pytest.raises(UserError, match=r"--categories names what to keep: it has astro-ph\.(CO|GA)"):
        ingest(f"jsonl:{corpus}", tmp_path / "c", categories=["hep-th"], max_bad=0.01)


def asked(monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """What the command passes on to the run."""
    given: dict[str, Any] = {}

    def run(source: str, names: list[str], workdir: Path, **options: Any) -> Path:
        given.update(options, variants=names)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run", run)
    CliRunner().invoke(app, ["run", *options])
    return given


def test_categories_alone_make_one_mixture_of_all_their_papers(monkeypatch: pytest.MonkeyPatch):
    given = asked(monkeypatch, "--categories", "astro-ph.GA, q-fin")
    assert given["categories"] == ["astro-ph.GA", "q-fin"]
    assert given["variants"] == []
    assert [(m["name"], m["parts"]) for m in given["mixtures"]] == [
        ("astro-ph.ga+q-fin", {"astro-ph.GA": "all", "q-fin": "all"})
    ]
    assert choose_variants([], given["mixtures"]) == ["astro-ph.ga+q-fin/lora-qkv", "astro-ph.ga+q-fin/lora-all"]


def test_options_of_the_corpus_reach_the_run(monkeypatch: pytest.MonkeyPatch):
    given = asked(monkeypatch, "--max-bad", "0.02", "--converted-text", "--variants", "all")
    assert (given["max_bad"], given["converted_text"], given["mixtures"]) == (0.02, True, None)
    assert len(given["variants"]) == 20
    assert len(asked(monkeypatch)["variants"]) == 3
