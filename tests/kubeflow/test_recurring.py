"""A recurring run over an archive, such as a nightly harvest: what it reads again and what it reuses."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from feyntune.ingestion.synthetic import synthetic_records
from feyntune.kubeflow import local, preflight
from feyntune.registry.registry import Registry
from tests.servers.oai import OaiServer, from_kaggle

VARIANT = "hep-th/lora-qkv"
RECIPE = {
    "train": {"precision": "fp32", "learning_rate": 3e-3, "epochs": 1},
    "evaluate": {"precision": "fp32", "categories": ["hep-th"], "completions": False},
}
PHYSICS = ("hep-th", "hep-ph", "gr-qc")


def test_an_archive_is_another_source_each_day_and_a_file_when_it_was_written(monkeypatch, tmp_path):
    path = tmp_path / "papers.jsonl"
    path.write_text("{}\n")
    file, archive = [], []
    for day in (1, 1, 2):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return datetime(2026, 3, day, tzinfo=tz or UTC)

        monkeypatch.setattr(preflight, "datetime", Clock)
        archive.append(preflight.source_fingerprint("oai:https://oai.example/oai"))
        file.append(preflight.source_fingerprint(f"jsonl:{path}"))
    assert archive[0] == archive[1] != archive[2]
    assert len(set(file)) == 1
    path.write_text("{} \n")
    assert preflight.source_fingerprint(f"jsonl:{path}") != file[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_night_with_nothing_new_ends_well_without_training(tiny_base: str, tmp_path: Path):
    """Each night has a folder of its own, with the store and the registry of the night before and nothing else."""
    records = list(synthetic_records(300, seed=7, categories=PHYSICS))
    nights: list[Path] = []

    def night(url: str) -> tuple[set[str], dict[str, Any]]:
        """Names of the steps that ran, and the summary."""
        workdir = tmp_path / f"night-{len(nights)}"
        workdir.mkdir()
        if nights:
            for kept in ("store", "registry"):
                shutil.move(nights[-1] / kept, workdir / kept)
            shutil.rmtree(workdir / "store" / "harvests")  # which a bucket does not have
        nights.append(workdir)
        folder = local.run(
            f"oai:{url}", [VARIANT], workdir, categories=list(PHYSICS), base=str(tiny_base), recipe=RECIPE
        )
        assert (folder / "report.html").is_file()
        steps = {
            path.name
            for path in (workdir / "steps").glob("feyntune-suite-*/**/")
            if (path / "executor_output.json").is_file()
        }
        return steps, json.loads((folder / "summary.json").read_text())

    def registered() -> list[str]:
        return [v.digest for v in Registry.open((nights[-1] / "registry").as_uri()).versions()]

    with OaiServer(from_kaggle(records), page=1000).running() as archive:
        steps, first = night(archive.url)
        assert {"train", "evaluate", "evaluate-base"} <= steps
        versions, asked = registered(), len(archive.requests)
        steps, second = night(archive.url)
        assert len(archive.requests) > asked  # the archive was read again
        assert {"preflight", "ingest", "split", "check-cache", "compare", "register", "fail-if-any-failed"} <= steps
        assert not {"train", "evaluate", "evaluate-base"} & steps
        assert second["corpus"]["digest"] == first["corpus"]["digest"]
        assert second["variants"][VARIANT]["adapter_sha256"] == first["variants"][VARIANT]["adapter_sha256"]
        assert second["variants"][VARIANT]["delta"] == first["variants"][VARIANT]["delta"]
        assert registered() == versions
