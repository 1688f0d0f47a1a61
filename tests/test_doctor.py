"""`feyntune doctor` finds each missing thing and says what to do."""

import os
from pathlib import Path

import pytest

from feyntune import doctor
from tests.servers.kubeflow import kubeflow


def checks(store: str | None = None, host: str | None = None) -> dict[str, doctor.Check]:
    return {c.what: c for c in doctor.run_checks(store, host)}


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_on_a_laptop_nothing_is_missing_and_what_a_cluster_needs_is_named() -> None:
    results = checks()
    assert {c.what for c in results.values() if c.state == "missing"} <= {"memory", "disk"}
    for what in ("GPU", "store keys", "store", "Kubeflow", "cluster", "hub token"):
        assert results[what].state in ("optional", "ok")
        assert results[what].sentence.endswith(".")


def test_a_store_without_keys_or_with_wrong_ones_is_missing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks(s3)["store keys"].state == "ok"
    assert checks(s3)["store"].state == "ok"
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    results = checks(s3)
    assert results["store keys"].state == "missing"
    assert "AWS_SECRET_ACCESS_KEY" in results["store keys"].sentence
    assert results["store"].state == "missing"


def test_a_kubeflow_host_answers_or_is_named() -> None:
    with kubeflow() as server:
        assert checks(host=server.url)["Kubeflow"].state == "ok"
    assert "does not answer" in checks(host=server.url)["Kubeflow"].sentence


def test_a_graphics_driver_without_a_card_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert checks()["GPU"].state == "missing"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A100, 40960 MiB, 550.54'\n")
    results = checks()["GPU"]
    assert "A100" in results.sentence
    assert results.state == "missing"  # torch here is the CPU build, and that is what it says
    assert "CUDA build" in results.sentence


def test_a_cluster_that_is_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".kube").mkdir()
    (tmp_path / ".kube" / "config").write_text("not: a config\n")
    assert checks()["cluster"].state == "missing"


def test_the_hub_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-a-test")
    assert all("secret-of-a-test" not in c.sentence for c in doctor.run_checks())


def test_memory_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no /proc/meminfo and its sysconf no SC_AVPHYS_PAGES."""
    read = Path.read_text

    def without_proc(path: Path, **options: str) -> str:
        if path.parts[:2] == ("/", "proc"):
            raise FileNotFoundError(path)
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", without_proc)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 4 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert doctor._memory().sentence.startswith("16 GiB free")


@pytest.mark.parametrize(("system", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_both_systems(monkeypatch: pytest.MonkeyPatch, system: str, factor: int) -> None:
    import resource

    from feyntune import telemetry

    monkeypatch.setattr(telemetry.sys, "platform", system)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert telemetry.peak_memory_bytes() >= kilobytes * factor
    assert telemetry.peak_memory_bytes() < kilobytes * factor * 2


@pytest.mark.parametrize(("version", "state"), [((3, 10), "missing"), ((3, 13), "ok"), ((3, 14), "missing")])
def test_pythons_that_run_it(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], state: str) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 0))
    assert doctor._python().state == state
