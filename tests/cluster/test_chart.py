"""The chart, rendered by real Helm engines over a matrix of values and checked object by object."""

import base64
import importlib.util
import json
import re
import shutil
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from feyntune.deployment.rollout import unfinished
from feyntune.kubeflow.adapt import COMPILED, Settings, adapt, read_settings
from tests.cluster.charts import APIS, CASES, CHART, ROOT, SECRETS, pods, render, render_with_cli, tool

VERSIONS = ["1.31", "1.32", "1.33", "1.34", "1.35", "1.36"]
CUSTOM = ("serving.kserve.io", "monitoring.coreos.com", "kueue.x-k8s.io")
HELM = tool("helm")
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    return {name: render(values) for name, values in CASES.items()}


def named(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    matches = [o for o in objects if o["kind"] == kind and (not name or o["metadata"]["name"] == name)]
    assert len(matches) == 1, f"{len(matches)} objects are {kind} {name}"
    return matches[0]


def kinds(objects: list[dict[str, Any]]) -> set[str]:
    return {o["kind"] for o in objects}


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid_in_kubernetes(rendered, version):
    """Of all cases, objects that differ in more than their values' text are checked once: the schemas are slow."""
    different = {
        _shape(o): o for objects in rendered.values() for o in objects if not o["apiVersion"].startswith(CUSTOM)
    }
    assert len(different) > 30
    for o in different.values():
        kubernetes_validate.validate(o, version, strict=True)


def _shape(value: Any) -> str:
    """The keys of `value` and the kinds of what they hold; a kind's name counts as itself."""

    def shape(v: Any, key: str = "") -> Any:
        if isinstance(v, dict):
            return {k: shape(inner, k) for k, inner in sorted(v.items())}
        if isinstance(v, list):
            return [shape(inner) for inner in v]
        return v if key in ("kind", "apiVersion") else type(v).__name__

    return json.dumps(shape(value))


def test_a_volume_for_bases_is_made_where_runs_happen_and_named_to_the_steps(rendered):
    objects = rendered["with everything"]
    claim = named(objects, "PersistentVolumeClaim", "feyntune-bases")
    assert claim["metadata"]["namespace"] == "kubeflow"
    assert claim["spec"]["storageClassName"] == "shared"
    settings = yaml.safe_load(named(objects, "ConfigMap", "feyntune-pipelines")["data"]["settings.yaml"])
    assert settings["cacheClaim"] == "feyntune-bases"
    own = render({"baseCache": {"enabled": True, "existingClaim": "mine"}})
    assert not [o for o in own if o["metadata"]["name"] == "feyntune-bases"]
    assert "cacheClaim: mine" in named(own, "ConfigMap", "feyntune-pipelines")["data"]["settings.yaml"]
    assert (
        "cacheClaim" not in named(rendered["as it comes"], "ConfigMap", "feyntune-pipelines")["data"]["settings.yaml"]
    )


@every_case
def test_no_two_objects_have_one_name(rendered, case):
    names = [(o["kind"], o["metadata"].get("namespace", "feyntune"), o["metadata"]["name"]) for o in rendered[case]]
    assert len(names) == len(set(names))


@every_case
def test_every_pod_is_restricted(rendered, case):
    specs = pods(rendered[case])
    assert len(specs) >= 3
    for name, pod in specs.items():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True, name
        assert context["runAsUser"] > 0, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}, name
        allowed = {"emptyDir", "configMap", "secret", "projected", "persistentVolumeClaim"}
        assert all(v.keys() - {"name"} <= allowed for v in pod.get("volumes", [])), name
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, name
            assert own["capabilities"] == {"drop": ["ALL"]}, name
            assert own["readOnlyRootFilesystem"] is True, name
            assert not own.keys() & {"privileged", "procMount", "runAsUser"}, name
            assert all("hostPort" not in p for p in container.get("ports", [])), name


@every_case
def test_every_pod_has_limits_a_tag_and_its_ports_protocols(rendered, case):
    for name, pod in pods(rendered[case]).items():
        for container in pod["containers"]:
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in container["resources"]["limits"], name
            assert container["image"].rpartition(":")[2] not in ("", "latest"), name
            assert all(p["protocol"] == "TCP" for p in container.get("ports", [])), name
    for o in rendered[case]:
        if o["kind"] == "Service":
            assert all(p["protocol"] == "TCP" for p in o["spec"]["ports"])


@every_case
def test_secret_values_are_in_secrets_and_nowhere_else(rendered, case):
    hidden = [*SECRETS.values(), *(base64.b64encode(s.encode()).decode() for s in SECRETS.values())]
    for o in rendered[case]:
        text = json.dumps({**o, "data": None} if o["kind"] == "Secret" else o)
        assert not [s for s in hidden if s in text], f"{o['kind']} {o['metadata']['name']}"


def test_a_token_that_was_given_is_in_its_secret(rendered):
    for namespace in ("feyntune", "kubeflow"):
        secrets = [o for o in rendered["on an external S3 server"]
                 if o["kind"] == "Secret" and o["metadata"]["namespace"] == namespace]  # fmt: skip
        data = {k: base64.b64decode(v).decode() for o in secrets for k, v in o["data"].items()}
        assert data == {
            "S3_ENDPOINT": "https://s3.example:9000",
            "AWS_ACCESS_KEY_ID": SECRETS["access"],
            "AWS_SECRET_ACCESS_KEY": SECRETS["secret"],
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_TOKEN": SECRETS["token"],
        }


def test_drawn_keys_are_the_same_in_both_namespaces_and_new_for_each_installation(rendered):
    first, second = ([o["data"] for o in objects if o["kind"] == "Secret"]
                     for objects in (rendered["as it comes"], render({})))  # fmt: skip
    assert first[0] == first[1]
    assert first[0] != second[0]
    assert len(base64.b64decode(first[0]["AWS_SECRET_ACCESS_KEY"])) == 40


def test_secrets_of_ones_own_are_used_and_not_made(rendered):
    objects = rendered["with existing Secrets"]
    assert "Secret" not in kinds(objects)
    job = next(spec for name, spec in pods(objects).items() if "bucket" in name)
    assert job["containers"][0]["env"][1]["valueFrom"]["secretKeyRef"] == {
        "name": "feyntune-s3",
        "key": "AWS_ACCESS_KEY_ID",
    }


# Each right, and who needs it for what. A right that is not in this table is one too many.
RIGHTS = {
    "feyntune-namespace": ({("", "namespaces", "patch")}, "the Job that labels the release's namespace"),
    "feyntune-test": ({("apps", "deployments", "get")}, "the test that the endpoint's new pods run"),
    "feyntune-upload": (
        {
            ("pipelines.kubeflow.org", r, v)
            for r in ("pipelines", "pipelines/versions")
            for v in ("get", "list", "create")
        },
        "the Job that puts the pipelines into a multi-user Kubeflow",
    ),
}


@every_case
def test_rights_are_those_that_somebody_needs(rendered, case):
    objects = rendered[case]
    assert not kinds(objects) & {"ClusterRole", "ClusterRoleBinding"}
    running = {pod.get("serviceAccountName") for pod in pods(objects).values()}
    for role in (o for o in objects if o["kind"] == "Role"):
        name = role["metadata"]["name"]
        given = set()
        for rule in role["rules"]:
            given |= {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
        assert given == RIGHTS[name][0]
        assert name in running, f"nobody runs as {name}"
        binding = named(objects, "RoleBinding", name)
        assert binding["roleRef"]["name"] == name
        assert [s["name"] for s in binding["subjects"]] == [name]
    if case == "as it comes":
        assert named(objects, "Role", "feyntune-namespace")["rules"][0]["resourceNames"] == ["feyntune"]
        assert named(objects, "Role", "feyntune-test")["rules"][0]["resourceNames"] == ["feyntune-predictor"]


WITH_TOKEN = ("Job feyntune-namespace", "Pod feyntune-test-rollout")  # these two ask the Kubernetes API


@every_case
def test_pods_have_an_account_of_the_chart_and_no_token_they_do_not_need(rendered, case):
    objects = rendered[case]
    accounts = {o["metadata"]["name"] for o in objects if o["kind"] == "ServiceAccount"}
    for name, pod in pods(objects).items():
        assert pod["serviceAccountName"] in accounts, name
        assert pod["automountServiceAccountToken"] is (name in WITH_TOKEN), name


@every_case
def test_what_helm_runs_once_is_cleaned_up(rendered, case):
    """`helm uninstall` removes no hooks, so that those which succeeded go by themselves and failed Jobs after a day."""
    hooks = [o for o in rendered[case] if "helm.sh/hook" in o["metadata"].get("annotations", {})]
    assert hooks
    for o in hooks:
        policy = o["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
        assert policy == "before-hook-creation,hook-succeeded"
        assert o["kind"] == "Pod" or o["spec"]["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("values", [{}, {"serving": {"kind": "Deployment", "gpus": 0, "replicas": 2}}])
def test_the_rollouts_test_asks_for_the_pods_that_were_rendered(values):
    """A Deployment of these pods passes; with the image before, or an old pod still there, it does not."""
    objects = render(values)
    expected = json.loads(pods(objects)["Pod feyntune-test-rollout"]["containers"][0]["args"][-1])
    spec = next(s for n, s in pods(objects).items() if n.split()[0] in ("InferenceService", "Deployment"))
    n = expected["replicas"]
    status = {"observedGeneration": 2, "replicas": n, "updatedReplicas": n, "availableReplicas": n}

    def deployment(container, **changed):
        template = {"spec": {"containers": [container]}}
        return {
            "metadata": {"generation": 2},
            "spec": {"replicas": n, "template": template},
            "status": status | changed,
        }

    (container,) = spec["containers"]
    assert unfinished(deployment(container), expected["container"], n) is None
    others = [
        deployment({**container, "image": "before"}),
        deployment({**container, "args": container["args"][:-1]}),
        deployment(container, replicas=n + 1),
        deployment(container, updatedReplicas=0),
        deployment(container, observedGeneration=1),
        None,
    ]
    assert all(unfinished(other, expected["container"], n) for other in others)


# --- clusters of others


def test_on_openshift_no_pod_and_no_step_names_its_user(rendered):
    for objects in (render({"podSecurity": {"fixedIds": False}}), render({}, [*APIS, "security.openshift.io/v1"])):
        for name, pod in pods(objects).items():
            contexts = [pod["securityContext"], *(c["securityContext"] for c in pod["containers"])]
            assert not [c for c in contexts if c.keys() & {"runAsUser", "runAsGroup", "fsGroup"}], name
            assert pod["securityContext"]["runAsNonRoot"] is True
        text = adapt((COMPILED / "suite.yaml").read_text(), settings_of(objects))
        assert "runAsUser" not in text
        assert "runAsNonRoot" in text


def settings_of(objects):
    name = next(o["metadata"]["name"] for o in objects if o["metadata"]["name"].endswith("-pipelines"))
    return Settings.model_validate(yaml.safe_load(named(objects, "ConfigMap", name)["data"]["settings.yaml"]))


def test_two_releases_beside_one_kubeflow_share_nothing():
    releases = {}
    for name in ("feyntune-dev", "feyntune-prod", "a-very-long-release-name-of-fifty-three-characters-xx", "1.2"):
        objects = render(
            {"kueue": {"enabled": True}, "caBundle": {"pem": PEM}}, namespace=name[:20].strip("-"), name=name
        )
        releases[name] = {(o["kind"], o["metadata"].get("namespace", name), o["metadata"]["name"]) for o in objects}
        settings = settings_of(objects)
        steps = adapt((COMPILED / "variant.yaml").read_text(), settings)
        assert f"secretName: {settings.s3Secret}" in steps
        assert "secretName: feyntune-s3\n" not in steps
        assert ("Secret", "kubeflow", settings.s3Secret) in releases[name]
        for kind, _, object_name in releases[name]:
            assert len(object_name) <= 63
            if kind == "Service" and object_name != "feyntune-predictor":
                assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", object_name)
    assert not set.intersection(*releases.values())
    assert not releases["feyntune-dev"] & releases["feyntune-prod"]


PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("values", [{"pem": PEM}, {"configMap": "trust"}])
def test_a_private_ca_and_proxies_reach_every_pod_and_step(values):
    env = {"HTTPS_PROXY": "http://proxy:3128"}
    objects = render({"caBundle": values, "extraEnv": env, "pushgateway": {"enabled": True}})
    name = values.get("configMap", "feyntune-ca")
    for pod_name, pod in pods(objects).items():
        variables = {e["name"]: e.get("value") for c in pod["containers"] for e in c["env"]}
        assert variables.items() >= env.items(), pod_name
        if "store-0" in pod_name or pod_name.split()[1] in ("feyntune-store", "feyntune-pushgateway"):
            continue
        assert variables["SSL_CERT_FILE"] == variables["AWS_CA_BUNDLE"] == variables["REQUESTS_CA_BUNDLE"]
        assert {"name": "ca", "configMap": {"name": name}} in pod["volumes"], pod_name
        mount = next(m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "ca")
        assert variables["SSL_CERT_FILE"] == f"{mount['mountPath']}/ca.crt"
    _, platform = yaml.safe_load_all(adapt((COMPILED / "suite.yaml").read_text(), settings_of(objects)))
    for step in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        assert step["configMapAsVolume"][0]["configMapName"] == name
    if "pem" in values:
        maps = [o for o in objects if o["metadata"]["name"] == "feyntune-ca"]
        assert {o["metadata"]["namespace"] for o in maps} == {"feyntune", "kubeflow"}
        assert all(o["data"]["ca.crt"].strip() == PEM.strip() for o in maps)


def test_cpu_pods_and_steps_stay_on_the_nodes_asked_for():
    amd64 = {"kubernetes.io/arch": "amd64"}
    objects = render({"nodeSelector": amd64})
    for name, pod in pods(objects).items():
        assert (pod["nodeSelector"] == amd64) == (not name.startswith("InferenceService")), name
    spec, platform = yaml.safe_load_all(adapt((COMPILED / "suite.yaml").read_text(), settings_of(objects)))
    steps = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in spec["deploymentSpec"]["executors"].items():
        gpus = "accelerator" in executor["container"].get("resources", {})
        assert (steps[name]["nodeSelector"]["labels"] == amd64) == (not gpus), name


def test_as_a_dependency_the_chart_takes_the_umbrellas_registry_and_pull_secrets():
    shared = {"imageRegistry": "mirror.example:5000", "imagePullSecrets": [{"name": "login"}]}
    objects = render({"enabled": True, "pushgateway": {"enabled": True}, "global": shared})
    for name, pod in pods(objects).items():
        assert pod["imagePullSecrets"] == [{"name": "login"}], name
        image = pod["containers"][0]["image"]
        assert image.startswith("mirror.example:5000/"), name
        assert "docker.io" not in image
    settings = settings_of(objects)
    assert (settings.images, settings.pullSecrets) == ("mirror.example:5000/feyntune", ["login"])


def test_on_ipv6_endpoint_and_store_listen_on_all_addresses():
    objects = pods(render({"listen": "::"}))
    assert "--host=::" in objects["InferenceService feyntune"]["containers"][0]["args"]
    (store,) = objects["StatefulSet feyntune-store"]["containers"]
    assert "-s3.ip.bind=:: " in store["args"][0]


def test_the_bundled_store_opens_s3_alone_and_the_endpoint_only_reads(rendered):
    objects = pods(rendered["as it comes"])
    (store,) = objects["StatefulSet feyntune-store"]["containers"]
    assert "-ip.bind=127.0.0.1" in store["args"][0]
    keys = {e["name"]: e for e in objects["InferenceService feyntune"]["containers"][0]["env"]}
    assert keys["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "feyntune-s3-read"
    job = next(spec for name, spec in objects.items() if "bucket" in name)
    assert "feyntune-s3-read" not in json.dumps(job)


def test_steps_reach_no_metadata_server_unless_asked():
    def egress(values):
        return json.dumps(named(render(values), "NetworkPolicy", "feyntune-steps")["spec"]["egress"])

    assert "169.254" not in egress({})
    assert "169.254.169.254/32" in egress({"networkPolicy": {"metadataServer": True}})


def test_another_cluster_queue_is_another_local_queue():
    def local(values):
        objects = render({"kueue": {"enabled": True, **values}})
        name = named(objects, "LocalQueue")["metadata"]["name"]
        assert settings_of(objects).queue == name
        return name

    assert len({local({}), local({"clusterQueue": "a"}), local({"clusterQueue": "b"})}) == 3, "it is immutable"


@every_case
def test_what_a_pod_mounts_is_a_volume_it_has(rendered, case):
    for name, pod in pods(rendered[case]).items():
        volumes = {v["name"] for v in pod.get("volumes", [])}
        mounts = [m for c in pod["containers"] for m in c.get("volumeMounts", [])]
        assert {m["name"] for m in mounts} == volumes, name
        assert "/tmp" in {m["mountPath"] for m in mounts} or "pushgateway" in name, name


@every_case
def test_selectors_select_the_pods_they_mean(rendered, case):
    labels = {}
    for o in rendered[case]:
        if o["kind"] in ("Deployment", "StatefulSet"):
            labels[o["metadata"]["name"]] = o["spec"]["template"]["metadata"]["labels"]
            assert o["spec"]["selector"]["matchLabels"].items() <= labels[o["metadata"]["name"]].items()
        elif o["kind"] == "InferenceService":  # KServe gives its labels to the pods
            labels[o["metadata"]["name"]] = o["metadata"]["labels"]
    for o in rendered[case]:
        if o["kind"] in ("Service", "PodDisruptionBudget"):
            selector = o["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert sum(selector.items() <= pod.items() for pod in labels.values()) == 1, o["metadata"]["name"]


def test_network_policies_deny_first_and_leave_every_pod_its_doors(rendered):
    objects = rendered["with everything"]
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    deny = policies["feyntune-default"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in deny
    assert deny["egress"] == [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]
    for o in objects:
        if o["kind"] in ("Pod", "InferenceService", "Deployment", "StatefulSet", "Job"):
            template = o["spec"].get("template", o)
            labels = template["metadata"]["labels"]
            assert deny["podSelector"]["matchLabels"].items() <= labels.items(), o["metadata"]["name"]
            component = labels["app.kubernetes.io/component"]
            doors = [n for n, p in policies.items() if component in json.dumps(p["podSelector"])]
            assert doors, f"{o['metadata']['name']} can reach nothing"


def test_network_policies_open_the_port_of_an_external_store(rendered):
    objects = rendered["on an external S3 server"]
    assert named(objects, "NetworkPolicy", "feyntune-to-store")["spec"]["egress"] == [
        {"ports": [{"port": 9000, "protocol": "TCP"}]}
    ]
    plain = render(
        {"objectStore": {"kind": "external", "endpoint": "https://s3.example", "credentials": {"existing": True}}}
    )
    assert named(plain, "NetworkPolicy", "feyntune-to-store")["spec"]["egress"][0]["ports"][0]["port"] == 443


def test_the_steps_policy_and_monitor_choose_our_steps_and_nobody_elses(rendered):
    objects = rendered["with everything"]
    chosen = named(objects, "NetworkPolicy", "feyntune-steps")["spec"]["podSelector"]["matchLabels"]
    assert named(objects, "PodMonitor", "feyntune-training")["spec"]["selector"]["matchLabels"] == chosen
    kubeflows = {"pipelines.kubeflow.org/v2_component": "true"}  # on every step of every pipeline
    assert not chosen.items() <= kubeflows.items()
    for compiled in COMPILED.glob("*.yaml"):
        _, platform = yaml.safe_load_all(compiled.read_text())
        steps = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        assert steps
        assert all(chosen.items() <= {**kubeflows, **step["podMetadata"]["labels"]}.items() for step in steps.values())


def test_no_pod_of_a_profile_gets_a_sidecar_that_the_policies_would_cut_off(rendered):
    for o in rendered["in a Kubeflow profile"]:
        if o["kind"] in ("Deployment", "StatefulSet", "Job", "InferenceService"):
            made = o["spec"].get("template", o)["metadata"]
            assert made.get("annotations", {}).get("sidecar.istio.io/inject") == "false", o["metadata"]["name"]


@pytest.mark.parametrize("flavor", ["gpu", "cpu"])
def test_steps_that_ask_for_gpus_are_told_to_expect_them(flavor):
    objects = render({"kubeflow": {"flavor": flavor}})
    settings = yaml.safe_load(named(objects, "ConfigMap", "feyntune-pipelines")["data"]["settings.yaml"])
    assert ("FEYNTUNE_EXPECT_GPU" in settings["env"]) == (flavor == "gpu")


def test_a_bucket_is_made_anew_on_another_store():
    def job(endpoint):
        store = {"kind": "external", "endpoint": endpoint, "credentials": {"existing": True}}
        (name,) = [n for n in pods(render({"objectStore": store})) if n.startswith("Job feyntune-bucket")]
        return name

    assert job("https://a.example") == job("https://a.example") != job("https://b.example")


def test_standalone_runs_in_kubeflows_namespace_and_a_profile_in_its_own(rendered):
    standalone, profile = rendered["as it comes"], rendered["in a Kubeflow profile"]
    assert {o["metadata"]["namespace"] for o in standalone if o["kind"] == "Secret"} == {"feyntune", "kubeflow"}
    assert {o["metadata"]["namespace"] for o in profile if o["kind"] == "Secret"} == {"feyntune"}
    job = pods(profile)["Job feyntune-upload"]
    assert "--namespace=feyntune" in job["containers"][0]["args"]
    token = next(v for v in job["volumes"] if v["name"] == "token")
    assert token["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    assert not [o for o in profile if o["metadata"]["name"] == "kfp-launcher"], "Kubeflow makes it in every profile"
    settings = named(profile, "ConfigMap", "feyntune-pipelines")["data"]["settings.yaml"]
    assert yaml.safe_load(settings)["pipelineRoot"] == "s3://feyntune/kubeflow"
    assert not [a for a in pods(standalone)["Job feyntune-upload"]["containers"][0]["args"] if "namespace" in a]


def test_the_workbench_is_on_until_it_is_switched_off(rendered):
    for values, disabled in (({}, False), ({"serving": {"kind": "Deployment", "workbench": False}}, True)):
        pod = next(p for name, p in pods(render(values)).items() if "feyntune" in name and "kserve" in str(p))
        assert ("--no-workbench" in pod["containers"][0]["args"]) == disabled


def test_the_upload_reads_settings_that_the_project_reads(rendered, tmp_path):
    config = named(rendered["with everything"], "ConfigMap", "feyntune-pipelines")
    (tmp_path / "settings.yaml").write_text(config["data"]["settings.yaml"])
    settings = read_settings(tmp_path / "settings.yaml")
    assert (settings.images, settings.tag, settings.queue) == ("registry.example/team", "1.2.3", "feyntune")
    assert settings.defaults["registry"] == "s3://feyntune/registry"
    assert settings.pullSecrets == ["login"]


def test_the_uploaded_version_changes_with_the_settings_and_only_then(rendered):
    def version(objects):
        return next(a for a in pods(objects)["Job feyntune-upload"]["containers"][0]["args"] if "--version" in a)

    assert version(rendered["as it comes"]).startswith("--version=0.2.0-")
    assert version(rendered["as it comes"]) == version(render({"serving": {"replicas": 2}}))
    assert version(rendered["as it comes"]) != version(render({"objectStore": {"bucket": "other"}}))


def test_the_bucket_job_changes_its_name_with_what_it_does(rendered):
    def name(objects):
        return next(n for n in pods(objects) if "bucket" in n)

    assert name(rendered["as it comes"]) == name(render({"serving": {"replicas": 2}}))
    assert name(rendered["as it comes"]) != name(render({"images": {"tag": "9"}}))


def test_gpus_come_with_selector_toleration_and_the_cuda_image(rendered):
    with_gpus, without = rendered["on GPUs without KServe"], rendered["without GPUs or KServe"]
    pod = pods(with_gpus)["Deployment feyntune-predictor"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["containers"][0]["image"].endswith("-cuda")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert named(with_gpus, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    pod = pods(without)["Deployment feyntune-predictor"]
    assert not pod.keys() & {"nodeSelector", "tolerations"}
    assert not pod["containers"][0]["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in json.dumps(pod)


def test_several_replicas_are_kept_from_going_at_once(rendered):
    assert "PodDisruptionBudget" not in kinds(rendered["as it comes"])
    budget = named(rendered["without GPUs or KServe"], "PodDisruptionBudget")
    assert budget["apiVersion"] == "policy/v1"


def test_volumes_and_drawn_keys_stay_unless_told_otherwise(rendered):
    keep = {"helm.sh/resource-policy": "keep"}
    claim = named(rendered["as it comes"], "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"].items() >= keep.items()
    assert all(o["metadata"]["annotations"] == keep for o in rendered["as it comes"] if o["kind"] == "Secret")
    given_up = named(rendered["with the least"], "PersistentVolumeClaim")
    assert "annotations" not in given_up["metadata"]
    assert given_up["spec"]["storageClassName"] == "fast"
    assert "PersistentVolumeClaim" not in kinds(rendered["with an existing queue and volume"])


@pytest.mark.parametrize(
    ("missing", "values", "says"),
    [
        ("kubeflow.org/v1beta1", {}, "set kubeflow.enabled=false"),
        ("serving.kserve.io/v1beta1", {}, "set serving.kind=Deployment"),
        ("monitoring.coreos.com/v1", {"monitoring": {"enabled": "always"}}, "leave monitoring.enabled=auto"),
        ("kueue.x-k8s.io/v1beta1", {"kueue": {"enabled": True}}, "set kueue.enabled=false"),
    ],
)
def test_a_missing_prerequisite_is_said_in_one_sentence(missing, values, says):
    with pytest.raises(helm_python.HelmError, match=says):
        render(values, [api for api in APIS if api != missing])


@pytest.mark.parametrize(
    ("values", "apis", "says"),
    [
        ({}, APIS, ["helm test feyntune -n feyntune", "feyntune submit --pipeline variant", "svc/feyntune-predictor"]),
        ({}, APIS[:2], ["Monitoring is disabled: this cluster has no Prometheus operator"]),
        ({"kubeflow": {"enabled": False}, "serving": {"kind": "none"}}, APIS,
         ["Pipelines are disabled", "feyntune run", "feyntune registry ls --registry s3://feyntune/registry"]),
    ],
)  # fmt: skip
def test_the_notes_tell_the_next_commands_and_what_is_off(values, apis, says):
    with helm_python.Chart.load(CHART) as chart:
        made = chart.render({**values, "assumeAPIs": apis}, name="feyntune", namespace="feyntune", is_install=True)
    notes = next(text for name, text in made.items() if name.endswith("NOTES.txt"))
    assert not [words for words in says if words not in notes], notes


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"workflowDefaults": "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: OnError}}}"}, True),
        ({"workflowDefaults": "spec: {templateDefaults: {retryStrategy: {limit: '2', retryPolicy: Always}}}"}, True),
        ({"workflowDefaults": "spec: {ttlStrategy: {secondsAfterCompletion: 1}}"}, True),
        ({}, True),
        ({"workflowDefaults": "spec: {templateDefaults: {retryStrategy: {limit: '0', retryPolicy: Always}}}"}, False),
        (None, False),  # no controller there, or none to ask
    ],
)
def test_the_notes_tell_a_workflow_controller_that_does_not_retry_steps(data, told, tmp_path):
    """Helm looks it up in the cluster; here the answer stands in a copy of the chart."""
    answer = {} if data is None else {"metadata": {"namespace": "kubeflow"}, "data": data}
    copy = shutil.copytree(CHART, tmp_path / "feyntune")
    notes = (copy / "templates" / "NOTES.txt").read_text()
    asked = 'lookup "v1" "ConfigMap" .Values.kubeflow.namespace "workflow-controller-configmap"'
    assert notes.count(asked) == 1
    (copy / "templates" / "NOTES.txt").write_text(notes.replace(asked, f"`{json.dumps(answer)}` | fromJson"))
    with helm_python.Chart.load(copy) as chart:
        made = chart.render({"assumeAPIs": APIS}, name="feyntune", namespace="feyntune", is_install=True)
    text = next(text for name, text in made.items() if name.endswith("NOTES.txt"))
    assert ("kubectl -n kubeflow edit configmap workflow-controller-configmap" in text) == told


def test_without_the_prometheus_operator_monitoring_is_left_out():
    objects = render({}, ["kubeflow.org/v1beta1", "serving.kserve.io/v1beta1"])
    assert not kinds(objects) & {"PrometheusRule", "PodMonitor", "ServiceMonitor"}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"servng": {}}, "servng"),
        ({"serving": {"gpu": 1}}, "gpu"),
        ({"serving": {"kind": "Knative"}}, "kind"),
        ({"serving": {"canaryShare": 2}}, "canaryShare"),
        ({"serving": {"replicas": "three"}}, "replicas"),
        ({"serving": {"base": "llama"}}, "base"),
        ({"serving": {"resources": {"limits": {"memory": "lots"}}}}, "memory"),
        ({"objectStore": {"kind": "gcs"}}, "kind"),
        ({"objectStore": {"endpoint": "s3.example:9000"}}, "endpoint"),
        ({"objectStore": {"bucket": "Feyn_Tune"}}, "bucket"),
        ({"objectStore": {"credentials": {"secretKey": "short"}}}, "secretKey"),
        ({"objectStore": {"persistence": {"size": "big"}}}, "size"),
        ({"kubeflow": {"mode": "multi"}}, "mode"),
        ({"kubeflow": {"devices": -1}}, "devices"),
        ({"images": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"images": {"prefix": "Registry Example"}}, "prefix"),
        ({"accelerator": {"tolerations": [{"operator": "Maybe"}]}}, "operator"),
        ({"networkPolicy": {"servingFrom": [{"podselector": {}}]}}, "podselector"),
        ({"monitoring": {"enabled": True}}, "enabled"),
        ({"pushgateway": {"image": "prom/pushgateway"}}, "image"),
        ({"kueue": {"memory": "much"}}, "memory"),
    ],
)
def test_a_misspelt_or_impossible_value_is_refused_by_name(values, names):
    with pytest.raises(helm_python.HelmValuesError, match=names):
        render(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"objectStore": {"kind": "external", "credentials": {"existing": True}}}, "objectStore.endpoint is empty"),
        ({"objectStore": {"kind": "external", "endpoint": "https://s3.example"}}, "create the Secret feyntune-s3"),
        ({"objectStore": {"kind": "minio"}}, "objectStore.minio.image is empty"),
    ],
)
def test_values_that_do_not_go_together_are_refused_with_the_fix(values, says):
    with pytest.raises(helm_python.HelmError, match=says):
        render(values)


def test_every_object_of_the_schema_refuses_unknown_keys():
    def walk(schema, path):
        if schema.get("type") == "object" and "properties" in schema and path != ["global"]:  # other charts' too
            assert schema["additionalProperties"] is False, path
        for key, inner in schema.get("properties", {}).items():
            walk(inner, [*path, key])

    walk(json.loads((CHART / "values.schema.json").read_text()), [])


def test_the_readme_is_made_from_the_values_comments():
    spec = importlib.util.spec_from_file_location("chart_readme", ROOT / "charts" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    made = readme.document((CHART / "values.yaml").read_text())
    assert (CHART / "README.md").read_text() == made, "run python charts/readme.py"


def test_helm_finds_nothing_to_say():
    report = helm_python.lint(CHART, {"assumeAPIs": APIS}, strict=True)
    assert not report["errors"]
    assert not [m for m in report["messages"] if m["severity"] >= 2]


@pytest.mark.skipif(HELM is None, reason="there is no helm command on PATH")
@every_case
def test_the_helm_command_renders_the_same_objects(rendered, case, tmp_path):
    """Helm 3.6 where CI installs it; objects whose names hash their text are compared without."""
    assert HELM is not None
    made = render_with_cli(HELM, CASES[case], tmp_path)
    assert sorted((o["kind"], o["metadata"]["name"]) for o in made) == sorted(
        (o["kind"], o["metadata"]["name"]) for o in rendered[case]
    )


def test_the_pod_that_makes_a_cache_writable_fits_the_charts_claim_and_the_steps_group() -> None:
    text = (ROOT / "docs/operate.md").read_text().split("<<'EOF'\n", 1)[1].split("EOF\n", 1)[0]
    pod = yaml.safe_load(text)
    claim = next(d for d in render({"baseCache": {"enabled": True}}) if d["kind"] == "PersistentVolumeClaim")
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for path in COMPILED.glob("*.yaml"):
        _, platform = yaml.safe_load_all(path.read_text())
        for step in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            assert step["securityContext"]["runAsGroup"] == str(pod["spec"]["securityContext"]["fsGroup"])
