"""Uploading, starting and following, against a server that speaks the Kubeflow Pipelines API."""

import warnings
from pathlib import Path

import pytest

from feyntune.errors import UserError
from feyntune.kubeflow.submit import run_page, submit, upload
from tests.servers.kubeflow import kubeflow
from tests.servers.plain_http import serving

ONE = {"variant": "hep-th/lora-all"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # the client keeps a context file in it


def test_each_pipeline_is_made_once_with_a_description_and_one_version_a_release() -> None:
    with kubeflow() as server:
        first = upload(server.url, "0.1.0")
        assert upload(server.url, "0.1.0") == first
        assert upload(server.url, "0.2.0") != first
        assert sorted(p["display_name"] for p in server.pipelines.values()) == ["feyntune-suite", "feyntune-variant"]
        assert all(p["description"] for p in server.pipelines.values())
        for versions in server.versions.values():
            assert [v["display_name"] for v in versions] == ["0.1.0", "0.2.0"]


def test_a_version_that_another_client_uploads_meanwhile_is_taken(monkeypatch) -> None:
    with kubeflow() as server:
        ids = upload(server.url, "0.1.0")
        list_versions = server._list_versions
        asked = []

        def late(request, pipeline):
            asked.append(pipeline)
            if len(asked) % 2:  # the first look-up of each pipeline comes too early
                from tests.servers.kubeflow import _listed

                return _listed("pipeline_versions", [])
            return list_versions(request, pipeline)

        monkeypatch.setattr(server, "_list_versions", late)
        assert upload(server.url, "0.1.0") == ids


def test_images_are_taken_from_the_registry_named() -> None:
    with kubeflow() as server:
        upload(server.url, "0.1.0", images="registry.example/team")
        for versions in server.versions.values():
            executors = versions[-1]["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
            images = {e["container"]["image"].rpartition(":")[0] for e in executors.values()}
            assert images == {"registry.example/team/worker", "registry.example/team/trainer"}


def test_a_run_belongs_to_the_uploaded_version_and_says_what_it_is() -> None:
    with kubeflow() as server:
        ids = upload(server.url, "0.1.0-of-the-chart", namespace="physics")
        run_id = submit(server.url, "variant", ONE, namespace="physics")
        (run,) = server.started
        assert run["run_id"] == run_id
        assert run["pipeline_version_reference"]["pipeline_version_id"] == ids["variant"]
        assert run["runtime_config"]["parameters"] == ONE
        assert run["display_name"].startswith("hep-th/lora-all, 2")
        (experiment,) = server.created_experiments
        assert (experiment["namespace"], experiment["display_name"]) == ("physics", "feyntune")
        assert run["experiment_id"] == experiment["experiment_id"]


def test_a_run_on_an_empty_host_uploads_the_pipeline_first() -> None:
    with kubeflow() as server:
        submit(server.url, "suite", {"variants": ["hep-th/lora-all", "hep-th/lora-qkv"]})
        assert [p["display_name"] for p in server.pipelines.values()] == ["feyntune-suite"]
        assert server.started[0]["display_name"].startswith("hep-th/lora-all and 1 more, ")


def test_the_client_library_prints_and_warns_nothing(capfd) -> None:
    with kubeflow() as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        submit(server.url, "variant", ONE)
    raised = [w for w in caught if not issubclass(w.category, ResourceWarning)]  # sockets of other tests end here
    assert [str(w.message) for w in raised] == []
    out, _ = capfd.readouterr()
    assert out == ""


def test_the_page_of_a_run_is_an_address_only_where_the_host_is_the_ui() -> None:
    with kubeflow() as server:
        assert run_page(server.url, "r1") == f"#/runs/details/r1 of the Kubeflow Pipelines UI ({server.url} is its API)"
        server.login = True  # any host that answers with a page
        assert run_page(server.url, "r1") == f"{server.url}/#/runs/details/r1"


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        ("variant", {**ONE, "recipe": {"epochs": None}}, "recipe.epochs is null"),
        ("variant", {"varient": "hep-th/lora-all"}, "variant has no parameter 'varient': it has .*variant"),
        ("variant", {"variant": "hep-th/lora-al"}, "did you mean hep-th/lora-all"),
        ("suite", {"variants": ["nope/x"]}, "There is no variant 'nope/x'"),
        ("suite", {"devices": "three"}, "devices is 'three', but the pipeline takes NUMBER_INTEGER"),
        ("suite", {"recipe": {"train": {"epochz": 1}}}, "epochz"),
        ("suite", {"recipe": {"evaluate": {"papers": "x"}}}, "recipe: evaluate"),
    ],
)
def test_arguments_that_a_run_cannot_take_are_refused_before_the_host_is_asked(pipeline, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        submit("http://127.0.0.1:9", pipeline, arguments)


def test_a_multi_user_host_gets_the_token_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret-of-a-test\n")
    with kubeflow(token="secret-of-a-test") as server:
        for version in ("0.1.0", "0.2.0"):  # the second finds the pipelines of the first in their namespace
            upload(server.url, version, namespace="physics", token_file=str(tmp_path / "token"))
        assert {p["namespace"] for p in server.pipelines.values()} == {"physics"}
        with pytest.raises(UserError, match=r"401.*token") as refused:
            upload(server.url, "0.1.0")
        assert "secret-of-a-test" not in str(refused.value)


def test_a_login_page_is_recognized() -> None:
    with kubeflow() as server:
        server.login = True
        with pytest.raises(UserError, match=r"answered with a web page.*--token-file"):
            submit(server.url, "variant", ONE)
        assert server.started == []


def test_a_host_that_refuses_or_is_away_gives_one_sentence() -> None:
    with kubeflow() as server:
        server.refuse = [(500, "database is away")]
        with pytest.raises(UserError, match="500, database is away") as refused:
            upload(server.url, "0.1.0")
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="does not answer"):
        upload(server.url, "0.1.0")


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("localhost:8888", "is not a web address: write --host http://localhost:8888"),
        ("http://h:99999", "is not a web address"),
        ("http://::1:8888", "is not a web address"),
        ("https://user:secret-of-a-test@kubeflow.example", "holds a user or a password"),
        ("user:secret-of-a-test@kubeflow.example", "is not a web address"),
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(host, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        submit(host, "variant", ONE)
    assert "secret-of-a-test" not in str(refused.value)


def test_an_address_copied_from_a_browser_is_taken_without_its_page() -> None:
    with kubeflow() as server:
        assert submit(f"{server.url}/#/pipelines", "variant", ONE)


@pytest.mark.parametrize("content", [None, b"two tokens", b"", b"\xff\xfe"])
def test_a_token_file_without_a_token_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match=r"--token-file .*: correct it"):
        submit("http://127.0.0.1:9", "variant", ONE, token_file=str(tmp_path / "token"))


def test_kubeflow_is_asked_through_the_proxy_of_the_environment(monkeypatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(lambda method, path: (200, {"content-type": "text/html"}, b"<html>Sign in")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        with pytest.raises(UserError, match="answered with a web page"):
            submit("http://kubeflow.case.invalid", "variant", ONE)
        assert proxy.requests[0][1] == "http://kubeflow.case.invalid/apis/v2beta1/healthz"
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(UserError, match="http_proxy is not an http"):
        submit("http://kubeflow.case.invalid", "variant", ONE)


def test_a_host_where_nothing_listens_is_said_to_be_one() -> None:
    with pytest.raises(UserError, match="nothing listens there"):
        submit("http://127.0.0.1:1", "variant", ONE)
