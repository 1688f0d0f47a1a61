import importlib.util
import json
from operator import itemgetter
from pathlib import Path

import pytest
from pydantic import SecretStr

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.deployment.deploy import DeployError, base_digest, deploy, parse_spec, serving_of_run
from feyntune.deployment.render import expected_models, render, secret_annotations, service_account
from feyntune.deployment.spec import LIMITS
from feyntune.deployment.step import deploy_registry
from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.registry.register import register
from feyntune.registry.registry import Registry
from tests.registry.factories import make_adapter, make_comparison
from tests.servers.kube import KubeServer

ROOT = Path(__file__).parents[2]
QKV, ALL, GR = "hep-th/lora-qkv", "hep-ph+gr-qc/lora-all", "gr-qc/lora-qkv"
DELTAS = {QKV: (-2.0, -3.0, -1.0), ALL: (-5.0, -6.0, -4.0), GR: (-0.5, -1.5, 0.5)}


@pytest.fixture
def registry(s3, tmp_path) -> str:
    """A registry of three adapters, with their base beside it at `bases/llama`."""
    with write_artifact(tmp_path / "base", "base") as base:
        (base.path / "config.json").write_text("{}")
    digest = push(open_store(s3), tmp_path / "base", "bases/llama").digest
    adapters = {v: make_adapter(tmp_path / v, v, base=digest) for v in DELTAS}
    register(make_comparison(tmp_path / "c", adapters, DELTAS, base=digest), adapters, f"{s3}/registry")
    return f"{s3}/registry"


def spec(registry="s3://bucket/registry", **fields):
    whole = {
        "namespace": "physics",
        "base": registry.removesuffix("/registry") + "/bases/llama",
        "registry": registry,
        "image": "feyntune/predictor:0.2.0",
        "s3_endpoint": "http://store.example:9000",
        **fields,
    }
    return parse_spec({k: v for k, v in whole.items() if v is not None})


def llm(registry="s3://bucket/registry", **fields):
    return spec(registry, kind="LLMInferenceService", gpus=1, image=None, **fields)


def walk(value):
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


# --- the description


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "Not_A_Name"}, "name: String should match pattern"),
        ({"registry": "runs/registry"}, "registry: .*only in S3"),
        ({"s3_endpoint": "http://user:pw@host"}, "s3_endpoint: .*without a user or password"),
        ({"extra_env": {"HF_TOKEN": "hf_x"}}, "extra_env: .*HF_TOKEN comes from the description's Secrets"),
        ({"s3_endpoint": "host:9000"}, "s3_endpoint: .*must be an http"),
        ({"aws_secret_access_key": "x"}, "aws_secret_access_key: Extra inputs"),
        ({"gpus": 2}, "at most one GPU"),
        ({"max_rank": 7}, "max_rank"),
        ({"kind": "LLMInferenceService", "gpus": 1, "base": "meta-llama/Llama-3.1-8B"}, "vLLM takes it from"),
        ({"kind": "LLMInferenceService"}, "vLLM needs at least one"),
        ({"kind": "LLMInferenceService", "gpus": 1, "max_cpu_adapters": 2}, "at least max_adapters"),
    ],
)
def test_an_impossible_description_names_its_field(fields, says):
    with pytest.raises(UserError, match=says):
        spec(**fields)


# --- what is rendered


def typed(obj, model, monkeypatch):
    """`obj` read into KServe's typed model and written out again: what it does not know is lost."""
    import kserve.models
    import kubernetes.client
    from kserve import ApiClient

    for name in dir(kubernetes.client):  # KServe's models refer to Kubernetes' and do not import them
        if name.startswith("V1"):
            monkeypatch.setattr(kserve.models, name, getattr(kubernetes.client, name), raising=False)
    strategy = kubernetes.client.V1DeploymentStrategy  # under a name of its own there
    monkeypatch.setattr(kserve.models, "K8sIoApiAppsV1DeploymentStrategy", strategy, raising=False)

    class Response:
        data = json.dumps(obj)

    client = ApiClient()
    return client.sanitize_for_serialization(client.deserialize(Response, model))


def test_the_predictor_is_one_of_kserves_typed_models(registry, monkeypatch):
    state = Registry.open(registry).snapshot()
    full = {"keys_secret": "keys", "gpus": 1, "node_selector": {"a": "b"}, "tolerations": [{"key": "nvidia.com/gpu"}]}
    service = render(spec(registry, **full), state)
    assert typed(service, "V1beta1InferenceService", monkeypatch) == service
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    predictor = service["spec"]["predictor"]
    assert "model" not in predictor, "without a storage address KServe takes it for a multi-model server"
    assert predictor["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert predictor["deploymentStrategy"] == {"type": "Recreate"}


def chart_name(name):
    """max_adapters -> maxAdapters"""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def chart_values(spec):
    """The values of the chart that mean what a description means."""
    given = {"requests": {"cpu": spec.cpu, "memory": spec.memory}, "limits": {"memory": spec.memory}}
    return {
        "kind": "InferenceService", "name": spec.name, "base": spec.base, "registry": spec.registry,
        "precision": spec.precision, "gpus": spec.gpus, "image": spec.image, "replicas": spec.replicas,
        "keysSecret": spec.keys_secret or "",
        **{chart_name(name): getattr(spec, name) for name in (*LIMITS, "chat_template", "cors_origins", "vllm_args")},
        "cacheSize": spec.scratch, "writableRoot": spec.writable_root,
        "extraArgs": spec.extra_args, "resources": given,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gpus": 1, "replicas": 2, "keys_secret": "ours", "scratch": "9Gi", "writable_root": True},
        {"engine": "vllm", "gpus": 2, "vllm_args": ["--gpu-memory-utilization=0.8"], "body_bytes": 50_000_000},
        {
            "engine": "vllm",
            "gpus": 1,
            "cache_tokens": 10_000_000,
            "queue": 9,
            "queue_seconds": 7,
            "batch_requests": 300,
        },
        {
            "chat_template": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "cors_origins": ["https://a.example"],
        },
        {"extra_env": {"HTTPS_PROXY": "http://proxy:3128"}, "ca_config_map": "our-ca", "keys_secret": "ours"},
        {"fixed_ids": False},
        {"host": "::", "extra_args": ["--drain-seconds=9"], "precision": "fp32", "max_rank": 64, "memory": "2Gi"},
    ],
)
def test_the_chart_and_deploy_describe_the_same_pod(registry, fields):
    described = spec(registry, **fields)
    rendered = render(described, Registry.open(registry).snapshot())["spec"]["predictor"]
    others = {"listen": described.host, "extraEnv": described.extra_env}
    others["caBundle"] = {"configMap": described.ca_config_map or ""}
    others["podSecurity"] = {"fixedIds": described.fixed_ids}
    chart = charts_predictor().predictor(chart_values(described), **others)["spec"]["predictor"]
    if described.gpus:  # the chart's own pool
        del chart["nodeSelector"], chart["tolerations"]
    for predictor in (rendered, chart):
        container = predictor["containers"][0]
        container["args"].sort()
        assert {e["name"] for e in container["env"]} >= {"S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "HF_TOKEN"}
        # The chart takes endpoint and region from its Secret, a description names them.
        plain = [e for e in container["env"] if "value" in e and e["name"] not in ("S3_ENDPOINT", "AWS_DEFAULT_REGION")]
        container["env"] = sorted((e["name"], e["value"]) for e in plain)
        container["volumeMounts"].sort(key=itemgetter("name"))
        predictor["volumes"].sort(key=itemgetter("name"))
        limits = container["resources"]
        limits["requests"].pop("nvidia.com/gpu", None)  # Kubernetes takes it from the limit
    assert rendered == chart


def test_the_shipped_rendering_of_the_chart_is_fresh():
    made = charts_predictor()
    assert made.document() == made.OUT.read_text(), "run python charts/predictor.py"


def charts_predictor():
    spec = importlib.util.spec_from_file_location("charts_predictor", ROOT / "charts" / "predictor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_adapter_of_another_base_is_refused_before_anything_is_applied(kube, registry, tmp_path):
    foreign = {"math/lora-qkv": make_adapter(tmp_path / "m", "math/lora-qkv", base="f" * 64)}
    deltas = {"math/lora-qkv": (-2.0, -3.0, -1.0)}
    register(make_comparison(tmp_path / "cm", foreign, deltas, base="f" * 64), foreign, registry)
    for make in (spec, llm):
        with pytest.raises(UserError, match=r"math/lora-qkv@\w+ was trained on base ffff"):
            go(kube, make(registry))
    assert deployed(kube) == {}


def test_a_hub_base_is_compared_by_its_commit(registry, tmp_path):
    commit = "c" * 40
    assert base_digest(llm(registry, base=f"hf://org/model@{commit}")) == commit
    state = Registry.open(registry).snapshot()
    with pytest.raises(UserError, match="was trained on base"):
        render(llm(registry, base=f"hf://org/model@{commit}"), state, commit)


def test_vllm_gets_every_adapter_with_rank_and_limits(registry):
    state = Registry.open(registry).snapshot()
    service = render(llm(registry), state)
    assert service["apiVersion"] == "serving.kserve.io/v1alpha2"
    lora = service["spec"]["model"]["lora"]
    assert (lora["maxRank"], lora["maxAdapters"], lora["maxCpuAdapters"]) == (8, 3, 48)
    assert [a["name"] for a in lora["adapters"]] == sorted(slug(v) for v in DELTAS)
    for adapter in lora["adapters"]:
        version = state.resolve(adapter["name"])
        assert adapter["uri"] == f"{registry}/{version.adapter}/"
        stored = set(Registry.open(registry).store.names(f"{version.adapter}/"))
        assert f"{version.adapter}/adapter_model.safetensors" in stored
    assert service["spec"]["template"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_same_registry_renders_the_same_whatever_was_added_first(registry):
    state = Registry.open(registry).snapshot()
    turned = type(state)(dict(reversed(state.versions.items())), state.aliases, state.history, state.revision)
    for described in (spec(registry), llm(registry)):
        assert json.dumps(render(described, state)) == json.dumps(render(described, turned))


def test_vllm_routes_by_path_and_its_initializer_is_admitted(registry):
    """As recorded from KServe 0.20: with routing by name, or without the context, no pod is made."""
    service = render(llm(registry), Registry.open(registry).snapshot())
    assert service["spec"]["annotations"] == {"serving.kserve.io/model-based-routing-enabled": "false"}
    (initializer,) = service["spec"]["template"]["initContainers"]
    assert initializer["name"] == "storage-initializer"
    assert initializer["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize(
    ("base", "uri"),
    [
        ("s3://b/bases/llama", "s3://b/bases/llama/"),
        ("s3://b/bases/llama/@" + "a" * 64, "s3://b/bases/llama/"),
        ("hf://org/model", "hf://org/model"),
        ("hf://org/model@" + "a" * 40, "hf://org/model:" + "a" * 40),
    ],
)
def test_vllm_gets_the_base_as_kserve_reads_addresses(registry, base, uri):
    state = Registry.open(registry).snapshot()
    assert render(llm(registry, base=base), state)["spec"]["model"]["uri"] == uri


def test_vllm_keeps_two_entries_for_each_adapter(registry):
    state = Registry.open(registry).snapshot()
    lora = render(llm(registry, max_adapters=2, max_cpu_adapters=2), state)["spec"]["model"]["lora"]
    assert (lora["maxAdapters"], lora["maxCpuAdapters"]) == (2, 6)


@pytest.mark.parametrize("make", [spec, llm])
def test_every_container_is_restricted(registry, make):
    rendered = render(make(registry), Registry.open(registry).snapshot())
    mappings = [v for v in walk(rendered) if isinstance(v, dict)]
    containers = [c for v in mappings for c in [*v.get("containers", []), *v.get("initContainers", [])]]
    pods = [v for v in mappings if "containers" in v]
    assert containers
    for container in containers:
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        seccomp = context.get("seccompProfile") or pods[0]["securityContext"]["seccompProfile"]
        assert seccomp == {"type": "RuntimeDefault"}
    assert {"name": "tmp", "mountPath": "/tmp"} in pods[0]["containers"][0]["volumeMounts"]


def test_the_pods_may_have_the_hubs_token(registry):
    service = render(spec(registry), Registry.open(registry).snapshot())
    container = service["spec"]["predictor"]["containers"][0]
    (token,) = [e for e in container["env"] if e["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "feyntune-hub", "key": "HF_TOKEN", "optional": True}


def test_keys_are_named_and_never_contained(registry, monkeypatch, s3_server):
    for make in (spec, llm):
        described = make(registry)
        everything = json.dumps([render(described, Registry.open(registry).snapshot()), service_account(described)])
        assert s3_server["AWS_SECRET_ACCESS_KEY"] not in everything
        assert "feyntune-s3" in everything


def test_the_secrets_annotations_say_where_the_store_is():
    plain, tls = secret_annotations(spec()), secret_annotations(spec(s3_endpoint="https://s3.example"))
    assert plain["serving.kserve.io/s3-endpoint"] == "store.example:9000"
    assert plain["serving.kserve.io/s3-usehttps"] == "0"
    assert tls["serving.kserve.io/s3-usehttps"] == tls["serving.kserve.io/s3-verifyssl"] == "1"
    assert service_account(spec())["secrets"] == [{"name": "feyntune-s3"}]


def test_an_adapter_above_the_rank_limit_is_refused_by_name(s3, tmp_path):
    adapters = {QKV: make_adapter(tmp_path / "a", QKV, rank=12)}
    register(make_comparison(tmp_path / "c", adapters, {QKV: DELTAS[QKV]}), adapters, f"{s3}/r")
    with pytest.raises(UserError, match=f"{QKV}@.* has a rank above max_rank 8"):
        render(spec(f"{s3}/r", max_rank=8), Registry.open(f"{s3}/r").snapshot())


def test_vllm_without_an_adapter_is_refused(s3):
    with pytest.raises(UserError, match="has no adapter to serve yet"):
        render(llm(f"{s3}/empty"), Registry.open(f"{s3}/empty").snapshot())


# --- applied to an API server


@pytest.fixture
def kube(registry):
    with KubeServer() as server:
        server.objects[("secrets", "feyntune-s3")] = {
            "metadata": {"name": "feyntune-s3", "resourceVersion": "0"},
            "data": {"AWS_ACCESS_KEY_ID": "aA=="},
        }
        server.models = {"base": "llama", **expected_models(spec(registry), Registry.open(registry).snapshot())}
        yield server


def api_client(kube):
    from kubernetes.client import ApiClient, Configuration

    configuration = Configuration()
    configuration.host = kube.url
    configuration.retries = False
    return ApiClient(configuration)


def go(kube, described, **options):
    return deploy(described, client=api_client(kube), poll=0.01, **{"timeout": 20, **options})


def test_a_deployment_answers_for_every_adapter_and_is_recorded(kube, registry):
    done = go(kube, spec(registry))
    state = Registry.open(registry).snapshot()
    assert {slug(v) for v in DELTAS} | {"base", "champion"} <= set(kube.asked)
    assert done.versions == sorted(v.name for v in state.served)
    assert state.deployments == [done]
    assert done.url == f"{kube.url}/endpoint"
    applied = {key[0] for key in kube.objects} - {"gateways", "deployments"}
    assert applied == {"secrets", "serviceaccounts", "inferenceservices"}
    secret = kube.objects[("secrets", "feyntune-s3")]
    assert secret["metadata"]["annotations"] == secret_annotations(spec(registry))
    assert secret["data"] == {"AWS_ACCESS_KEY_ID": "aA=="}
    assert not any(method == "GET" and "secrets" in path for method, path, _ in kube.requests)


def test_vllm_is_deployed_the_same_way(kube, registry):
    kube.models = {"base": "x", **{slug(v): "path" for v in DELTAS}}
    go(kube, llm(registry))
    assert ("llminferenceservices", "abstracts") in kube.objects
    assert sorted(kube.asked) == sorted(kube.models)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ("serving.kserve.io/v1alpha2", "KServe's LLMInferenceService is not on this cluster"),
        ("gateway.networking.k8s.io/v1", "The Gateway API is not on this cluster"),
        ("inference.networking.k8s.io/v1", "inference extension is not on this cluster"),
        (None, "Gateway kserve/kserve-ingress-gateway does not exist"),
    ],
)
def test_what_vllm_needs_is_checked_before_anything_is_applied(kube, registry, group, says):
    if group is None:
        del kube.objects[("gateways", "kserve-ingress-gateway")]
    else:
        del kube.kinds[group]
    with pytest.raises(UserError, match=f"{says}.*prerequisites.*Nothing was deployed"):
        go(kube, llm(registry))
    assert deployed(kube) == {}


def test_a_gated_hub_base_gets_the_hubs_secret_where_it_exists(kube, registry):
    digest = Registry.open(registry).snapshot().served[0].lineage["base"]
    kube.models = {"base": "x", **{slug(v): "path" for v in DELTAS}}
    base = f"hf://meta-llama/Llama-3.1-8B@{digest}"
    go(kube, llm(registry, base=base))
    assert kube.objects[("serviceaccounts", "feyntune-serving")]["secrets"] == [{"name": "feyntune-s3"}]
    kube.objects[("secrets", "feyntune-hub")] = {"metadata": {"name": "feyntune-hub"}, "data": {"HF_TOKEN": "aA=="}}
    go(kube, llm(registry, base=base))
    assert {"name": "feyntune-hub"} in kube.objects[("serviceaccounts", "feyntune-serving")]["secrets"]


def test_an_image_that_cannot_be_pulled_is_not_deployed(kube, registry, monkeypatch):
    """KServe keeps reporting Ready: the old pod answers."""
    go(kube, spec(registry))
    logged = []
    monkeypatch.setattr("feyntune.deployment.deploy.log.info", lambda text, *args: logged.append(text % args))
    kube.broken_images.add("feyntune/predictor:broken")
    kube.events.append(("Pod", "abstracts-predictor-0", 'Failed to pull image "feyntune/predictor:broken"'))
    with pytest.raises(DeployError, match=r"timed out waiting .*Failed to pull image") as e:
        go(kube, spec(registry, image="feyntune/predictor:broken"), timeout=1)
    assert "Rolled back" in str(e.value)
    assert any("Failed to pull image" in line for line in logged), "said while it waits"
    service = kube.objects[("inferenceservices", "abstracts")]
    assert service["spec"]["predictor"]["containers"][0]["image"] == "feyntune/predictor:0.2.0"


def test_deploying_again_replaces_and_waits_for_the_new_generation(kube, registry):
    go(kube, spec(registry))
    go(kube, spec(registry, replicas=3))
    service = kube.objects[("inferenceservices", "abstracts")]
    assert service["spec"]["predictor"]["minReplicas"] == 3
    assert service["metadata"]["generation"] == 2
    assert kube.objects[("deployments", "abstracts-predictor")]["status"]["updatedReplicas"] == 3
    assert len(Registry.open(registry).snapshot().deployments) == 2


def deployed(kube):
    return {k: v["spec"] for k, v in kube.objects.items() if "spec" in v and k[0] != "deployments"}


FAILURES = {
    "never ready": (lambda k: setattr(k, "ready_after", None), "timed out waiting for InferenceService abstracts"),
    "a missing model": (lambda k: k.models.pop("gr-qc.lora-qkv"), "timed out waiting for the endpoint to list"),
    "a foreign model": (lambda k: k.models.update(other="x"), "timed out waiting for the endpoint to list"),
    "an old version": (lambda k: k.models.update(champion="hep-th/lora-qkv@0"), "timed out waiting for the endpoint"),
    "a broken adapter": (lambda k: k.silent.add("hep-th.lora-qkv"), "hep-th.lora-qkv answered 500: .*adapter broke"),
    "a refused create": (lambda k: k.fail("POST", "inferenceservices", 422), "422 .*ordered by the test"),
    "a forbidden read": (lambda k: k.fail("GET", "/inferenceservices", 403, 99), "403 .*ordered by the test"),
    "a key is asked for": (lambda k: setattr(k, "key", "hush"), "none was given"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_does_not_answer_is_rolled_back(kube, registry, failure):
    order, says = FAILURES[failure]
    order(kube)
    with pytest.raises(UserError, match=says):
        go(kube, spec(registry), timeout=1)
    assert deployed(kube) == {}
    assert Registry.open(registry).snapshot().deployments == []


@pytest.mark.parametrize("failure", ["never ready", "a broken adapter", "a missing model"])
def test_what_was_there_before_is_restored(kube, registry, failure):
    go(kube, spec(registry))
    before = deployed(kube)
    FAILURES[failure][0](kube)
    with pytest.raises(DeployError, match="everything is as it was before"):
        go(kube, spec(registry, replicas=3, image="feyntune/predictor:broken"), timeout=1)
    assert deployed(kube) == before


def test_a_change_by_somebody_else_is_not_overwritten(kube, registry):
    go(kube, spec(registry))
    kube.fail("PUT", "/inferenceservices", 409)
    with pytest.raises(DeployError, match="409"):
        go(kube, spec(registry, replicas=3), timeout=1)
    assert kube.objects[("inferenceservices", "abstracts")]["spec"]["predictor"]["minReplicas"] == 1


def test_errors_of_the_server_while_waiting_are_waited_out(kube, registry):
    kube.ready_after = 4
    kube.models.pop("champion")
    kube.fail("GET", "/endpoint/openai/v1/models", 503, 3)
    kube.models = {"base": "llama", **expected_models(spec(registry), Registry.open(registry).snapshot())}
    assert go(kube, spec(registry)).versions


def test_what_could_not_be_rolled_back_is_said(kube, registry):
    kube.silent.add("champion")
    kube.fail("DELETE", "/inferenceservices", 500, 99)
    with pytest.raises(DeployError, match=r"Could not be rolled back: InferenceService abstracts \(500"):
        go(kube, spec(registry))


def test_without_the_secret_nothing_is_deployed(kube, registry):
    del kube.objects[("secrets", "feyntune-s3")]
    with pytest.raises(UserError, match=r"404 .*secrets feyntune-s3 not found. Nothing was deployed"):
        go(kube, spec(registry))
    assert deployed(kube) == {}


def test_a_cluster_that_is_not_there_is_said_so(registry):
    with KubeServer() as gone:
        pass
    with pytest.raises(UserError, match="Nothing was deployed"):
        go(gone, spec(registry))


def test_an_endpoint_with_keys_is_not_deployed_without_one(kube, registry):
    with pytest.raises(UserError, match="--key-file"):
        go(kube, spec(registry, keys_secret="keys"))
    assert deployed(kube) == {}
    with pytest.raises(UserError, match="keys_secret: a run holds no key"):
        serving_of_run(
            {"namespace": "n", "image": "x", "keys_secret": "keys", "s3_endpoint": "http://s3"}, "s3://b/base", registry
        )


def test_the_endpoints_key_is_sent_and_not_shown(kube, registry):
    kube.key = "hush-hush"
    assert go(kube, spec(registry), key=SecretStr("hush-hush")).versions
    kube.silent.add("champion")
    with pytest.raises(DeployError) as e:
        go(kube, spec(registry), key=SecretStr("hush-hush"))
    assert "hush" not in str(e.value)
    assert not any(b"hush" in body for _, _, body in kube.requests)


def test_an_interrupted_deployment_is_rolled_back(kube, registry, monkeypatch):
    monkeypatch.setattr("feyntune.deployment.deploy._Endpoint", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        go(kube, spec(registry))
    assert deployed(kube) == {}


# --- the last step of a suite


DESCRIPTION = {"namespace": "physics", "image": "feyntune/predictor:0.2.0", "s3_endpoint": "http://store.example:9000"}


def test_a_run_deploys_what_it_registered_with_its_own_base(kube, registry, monkeypatch):
    from feyntune.deployment import deploy as module

    kube.ready_after = 0
    monkeypatch.setattr(module, "connect", lambda: api_client(kube))
    base = f"{spec(registry).base}@{Registry.open(registry).snapshot().served[0].lineage['base']}"
    assert deploy_registry(QKV, base, registry, DESCRIPTION) == f"{kube.url}/endpoint"
    service = kube.objects[("inferenceservices", "abstracts")]
    assert f"--base={base}" in service["spec"]["predictor"]["containers"][0]["args"]
    assert len(Registry.open(registry).snapshot().deployments) == 1


def test_a_run_deploys_nothing_unasked_or_while_nothing_passed(registry):
    assert deploy_registry(QKV, "s3://bucket/base", registry, {}) == ""
    assert deploy_registry("", "s3://bucket/base", registry, DESCRIPTION) == ""
    assert Registry.open(registry).snapshot().deployments == []


def test_a_run_cannot_deploy_another_registry(registry):
    with pytest.raises(UserError, match="registry: leave it out"):
        deploy_registry(QKV, "s3://bucket/base", registry, {**DESCRIPTION, "registry": "s3://bucket/other"})
