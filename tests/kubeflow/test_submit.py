"""Uploading and starting, against a server that speaks the Kubeflow Pipelines API."""

from pathlib import Path

import pytest

from feyntune.errors import UserError
from feyntune.kubeflow.submit import submit, upload
from tests.servers.kubeflow import kubeflow


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the client keeps a context file in it


def test_upload_twice_leaves_each_pipeline_once_with_one_version_a_release() -> None:
    with kubeflow() as server:
        first = upload(server.url, "0.1.0")
        assert upload(server.url, "0.1.0") == first
        assert upload(server.url, "0.2.0") != first
        names = sorted(p["display_name"] for p in server.pipelines.values())
        assert names == ["feyntune-suite", "feyntune-variant"]
        for versions in server.versions.values():
            assert [v["display_name"] for v in versions][1:] == ["0.1.0", "0.2.0"]


def test_images_are_taken_from_the_registry_named() -> None:
    with kubeflow() as server:
        upload(server.url, "0.1.0", images="registry.example/team")
        for versions in server.versions.values():
            executors = versions[-1]["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
            images = {e["container"]["image"].rpartition(":")[0] for e in executors.values()}
            assert images == {"registry.example/team/worker", "registry.example/team/trainer"}


def test_submit_starts_a_run_with_its_arguments() -> None:
    with kubeflow() as server:
        run_id = submit(server.url, "variant", {"variant": "hep-th/lora-all"}, namespace="physics")
        (run,) = server.started
        assert run["run_id"] == run_id
        assert run["runtime_config"]["parameters"]["variant"] == "hep-th/lora-all"
        assert server.created_experiments[0]["namespace"] == "physics"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"variant": "hep-th/lora-all", "recipe": {"epochs": None}}, "recipe.epochs is null"),
        ({"varient": "hep-th/lora-all"}, "variant has no parameter 'varient': it has .*variant"),
    ],
)
def test_arguments_that_the_pipeline_cannot_take_are_refused_before_the_host_is_asked(arguments, said) -> None:
    with pytest.raises(UserError, match=said):
        submit("http://127.0.0.1:9", "variant", arguments)


def test_a_multi_user_host_gets_the_token_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-of-a-test\n")
    with kubeflow(token="secret-of-a-test") as server:
        for version in ("0.1.0", "0.2.0"):  # the second finds the pipelines of the first in their namespace
            upload(server.url, version, namespace="physics", token_file=str(tmp_path / "token"))
        assert {p["namespace"] for p in server.pipelines.values()} == {"physics"}
        with pytest.raises(UserError, match=r"401.*token") as refused:
            upload(server.url, "0.1.0")
        assert "secret-of-a-test" not in str(refused.value)


def test_a_host_that_refuses_or_is_away_gives_one_sentence() -> None:
    with kubeflow() as server:
        server.refuse = [(500, "database is away")]
        with pytest.raises(UserError, match="500") as refused:
            upload(server.url, "0.1.0")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="does not answer"):
        upload(server.url, "0.1.0")
