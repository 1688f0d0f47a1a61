"""A cluster's own values in the compiled pipelines, and the verbs of the chart's Jobs."""

import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from feyntune.artifacts.store import open_store
from feyntune.errors import UserError
from feyntune.kubeflow import chart_jobs as cluster
from feyntune.kubeflow.adapt import COMPILED, Settings, adapt, read_settings
from feyntune.kubeflow.preflight import pod_resources

SUITE = (COMPILED / "suite.yaml").read_text()


def executors(text: str) -> tuple[dict, dict]:
    spec, platform = yaml.safe_load_all(text)
    return spec["deploymentSpec"]["executors"], platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_no_settings_change_nothing():
    assert list(yaml.safe_load_all(adapt(SUITE, Settings()))) == list(yaml.safe_load_all(SUITE))


def test_every_image_moves_to_the_prefix_and_tag():
    made, _ = executors(adapt(SUITE, Settings(images="registry.example:5000/team", tag="2")))
    images = {e["container"]["image"] for e in made.values()}
    assert images == {"registry.example:5000/team/worker:2", "registry.example:5000/team/trainer:2"}


def test_pool_and_queue_reach_the_steps_with_gpus_and_no_others():
    settings = Settings(nodeSelector={"pool": "a"}, tolerations=[{"key": "a", "operator": "Exists"}], queue="q")
    made, steps = executors(adapt(SUITE, settings))
    with_gpus = {n for n, e in made.items() if "accelerator" in e["container"]["resources"]}
    assert with_gpus
    assert with_gpus != made.keys()
    for name in made:
        step = steps[name]
        assert (step.get("nodeSelector") == {"labels": {"pool": "a"}}) == (name in with_gpus)
        assert (step.get("tolerations") == [{"key": "a", "operator": "Exists"}]) == (name in with_gpus)
        queue = step.get("podMetadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name")
        assert (queue == "q") == (name in with_gpus)


@pytest.mark.parametrize("gpus", [None, 0])
def test_a_volume_for_bases_is_mounted_by_the_steps_that_load_one(gpus):
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as pb

    made, steps = executors(adapt(SUITE, Settings(cacheClaim="bases", gpus=gpus, env={"A": "b"})))
    mounted = {name for name, step in steps.items() if "pvcMount" in step}
    assert mounted == {"exec-train", "exec-evaluate", "exec-evaluate-base"}
    for name, executor in made.items():
        env = {e["name"]: e["value"] for e in executor["container"]["env"]}
        assert env["A"] == "b"
        assert env.get("FEYNTUNE_CACHE") == ("/var/cache/feyntune" if name in mounted else None)
    config = json_format.ParseDict(steps["exec-train"], pb.KubernetesExecutorConfig())
    (mount,) = config.pvc_mount
    assert (mount.pvc_name_parameter.runtime_value.constant.string_value, mount.mount_path) == (
        "bases",
        "/var/cache/feyntune",
    )


def test_defaults_variables_and_logins_are_those_of_the_settings():
    settings = Settings(
        defaults={"store": "s3://mine", "nobody": "x"}, env={"HOME": "/h", "A": "b"}, pullSecrets=["login"]
    )
    text = adapt(SUITE, settings)
    spec = next(iter(yaml.safe_load_all(text)))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["store"]["defaultValue"] == "s3://mine"
    assert "nobody" not in parameters
    made, steps = executors(text)
    for name, executor in made.items():
        env = [(e["name"], e["value"]) for e in executor["container"]["env"]]
        assert ("HOME", "/h") in env
        assert ("A", "b") in env
        assert len(dict(env)) == len(env)
        assert steps[name]["imagePullSecret"] == [{"secretName": "login"}]


def test_a_training_asks_for_as_many_gpus_as_the_run_says_and_the_settings_give_the_default():
    text = adapt(SUITE, Settings(gpus=2))
    made, _ = executors(text)
    asked = {n: e["container"]["resources"].get("accelerator", {}).get("resourceCount") for n, e in made.items()}
    assert {n for n, count in asked.items() if count == "1"} == {"exec-evaluate", "exec-evaluate-base"}
    assert asked["exec-train"] == "{{$.inputs.parameters['pipelinechannel--gpus']}}"
    spec = next(iter(yaml.safe_load_all(text)))
    assert spec["root"]["inputDefinitions"]["parameters"]["devices"]["defaultValue"] == 2


def test_a_limit_on_how_many_variants_run_at_once_is_one_of_both_loops():
    spec = next(iter(yaml.safe_load_all(adapt(SUITE, Settings(parallelism=3)))))
    dags = [component["dag"]["tasks"].values() for component in spec["components"].values() if "dag" in component]
    loops = [task for tasks in dags for task in tasks if "parameterIterator" in task]
    assert [loop["iteratorPolicy"] for loop in loops] == [{"parallelismLimit": 3}] * 2


def test_a_default_of_the_wrong_kind_is_refused():
    with pytest.raises(UserError, match="store is 3, but the pipeline takes STRING"):
        adapt(SUITE, Settings(defaults={"store": 3}))


@pytest.mark.parametrize(
    ("text", "names"),
    [("imges: x", "imges"), ("queue: [1]", "queue: "), ("{", "is not YAML"), ("- 1", "has no settings")],
)
def test_a_settings_file_that_cannot_be_is_refused_by_name(tmp_path, text, names):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(UserError, match=names):
        read_settings(tmp_path / "settings.yaml")


def test_the_store_check_writes_reads_compares_and_leaves_nothing(s3):
    cluster.check_store(s3)
    assert list(open_store(s3).names()) == []


def test_the_store_check_sees_changed_bytes(s3, monkeypatch):
    from feyntune.artifacts.s3 import S3Store

    put = S3Store.put_file

    def damaging(self, name, path):
        put(self, name, path)
        if name.endswith("small.txt"):
            self.put(name, b"Feyntune")

    monkeypatch.setattr(S3Store, "put_file", damaging)
    with pytest.raises(UserError, match=r"small\.txt"):
        cluster.check_store(s3)
    assert list(open_store(s3).names()) == []


def test_a_bucket_is_made_once(s3):
    cluster.bucket("another-bucket")
    cluster.bucket("another-bucket")
    open_store("s3://another-bucket").put("x", b"1")


def test_an_address_that_nobody_answers_is_said_in_one_sentence():
    for check in (cluster.check_kubeflow, cluster.check_endpoint):
        with pytest.raises(UserError, match="does not answer"):
            check("http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("memory", "one", "two"), [(10, ("10Gi", "64Gi"), ("20Gi", "128Gi")), (80, ("80Gi", "80Gi"), ("160Gi", "160Gi"))]
)
def test_a_pod_requests_cpus_and_memory_by_its_gpus(monkeypatch, memory, one, two):
    made, _ = executors(adapt(SUITE, Settings(cpusPerGpu=4.5, memoryPerGpu=memory)))
    resources = made["exec-evaluate"]["container"]["resources"]
    assert resources["resourceCpuRequest"] == "4.5"
    assert (resources["resourceMemoryRequest"], resources["resourceMemoryLimit"]) == one
    for variable in made["exec-preflight"]["container"]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    assert pod_resources(2) == ("2", "9", *two)


class _Answers(BaseHTTPRequestHandler):
    version: str | None = None

    def do_GET(self):
        self._send({"data": [{"id": "base"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send({"usage": {"completion_tokens": 8}})

    def _send(self, body):
        self.send_response(200)
        if self.version:
            self.send_header("X-Feyntune-Release", self.version)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("version", "said"), [("0.2.0", None), ("0.1.0", "feyntune 0.1.0, not 0.2.0"),
                                               (None, "does not name its version")])  # fmt: skip
def test_an_endpoint_of_another_version_is_no_success(monkeypatch, version, said):
    monkeypatch.setenv("FEYNTUNE_EXPECT_VERSION", "0.2.0")
    monkeypatch.setattr(_Answers, "version", version)
    with HTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expected = nullcontext() if said is None else pytest.raises(UserError, match=said)
        with expected:
            cluster.check_endpoint(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_an_unknown_verb_shows_the_known_ones(capsys):
    assert cluster.main(["fly", "x"]) == 2
    assert "check-store" in capsys.readouterr().err
