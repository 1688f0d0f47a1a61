"""The custom objects of a serving description.

The InferenceService has one renderer, the Helm chart: it needs nothing but Helm, and what `helm upgrade` changes and
what `feyntune deploy` changes cannot drift. `predictor.yaml` is a rendering of the chart that ships in the wheel
(charts/predictor.py writes it, a test keeps it fresh); here only the description's fields are put into it.
The LLMInferenceService depends on the registry's list of adapters, which no chart can read, and is written here.
"""

from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import yaml

from feyntune.constants import CA_FOLDER, IMAGE_USER
from feyntune.deployment.spec import LIMITS, ServingSpec
from feyntune.errors import UserError
from feyntune.model.base import split_pin
from feyntune.names import BASE, slug
from feyntune.registry.models import State

GROUP = "serving.kserve.io"
KEYS_FILE = "/etc/feyntune/keys/keys"
CA_VARIABLES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")  # as the chart's feyntune.commonEnv
_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "runAsNonRoot": True,
    "runAsUser": IMAGE_USER,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
_RESTRICTED_POD = {k: _RESTRICTED[k] for k in ("runAsNonRoot", "runAsUser", "seccompProfile")} | {"fsGroup": IMAGE_USER}

Object = dict[str, Any]


def render(spec: ServingSpec, state: State, base_digest: str | None = None) -> Object:
    """The custom object to apply. The same description and registry give the same object.

    Args:
        base_digest: of the description's base (a stored base's content, a hub model's commit); None: unknown, and
            adapters are not compared with it.

    Raises:
        UserError: an adapter exceeds the description's limits or was trained on another base, or there is none for
            vLLM to serve.
    """
    for version in state.served:
        if version.rank > spec.max_rank:
            raise UserError(
                f"{version.name} has a rank above max_rank {spec.max_rank}: raise it, or archive the version."
            )
        trained_on = version.lineage.get("base", "")
        if base_digest and trained_on != base_digest:
            raise UserError(
                f"{version.name} was trained on base {trained_on[:16] or 'unknown'}, and {spec.base} has digest "
                f"{base_digest[:16]}: archive the version, or deploy with its base."
            )
    if spec.kind == "LLMInferenceService":
        return _llm_inference_service(spec, state, base_digest)
    return _inference_service(spec)


def secret_annotations(spec: ServingSpec) -> dict[str, str]:
    """What KServe's storage initializer reads beside the keys, to be put on the Secret `s3_secret`."""
    url = urlsplit(spec.s3_endpoint)
    return {
        f"{GROUP}/s3-endpoint": url.netloc,
        f"{GROUP}/s3-usehttps": "1" if url.scheme == "https" else "0",
        f"{GROUP}/s3-region": spec.s3_region,
        f"{GROUP}/s3-verifyssl": "1" if url.scheme == "https" else "0",
    }


def service_account(spec: ServingSpec, hub: bool = False) -> Object:
    """The pods' ServiceAccount with the Secrets that KServe's storage initializer takes credentials from.

    Args:
        hub: the hub's Secret exists and is wanted; KServe fails on one that is listed and does not exist.
    """
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": spec.service_account, "namespace": spec.namespace, "labels": _labels(spec)},
        "secrets": [{"name": spec.s3_secret}, *([{"name": spec.hub_secret}] if hub else [])],
        "automountServiceAccountToken": False,
    }


def expected_models(spec: ServingSpec, state: State) -> dict[str, str]:
    """Model name to version name, as the endpoint must list them (the base apart)."""
    names = {slug(v.variant): state.resolve(v.variant).name for v in state.served}
    if spec.kind == "InferenceService":
        names |= {slug(alias): name for alias, name in state.aliases.items()}
    return names


def _inference_service(spec: ServingSpec) -> Object:
    on_cpus, on_gpus, vllm = yaml.safe_load_all(
        files("feyntune.deployment").joinpath("predictor.yaml").read_text(encoding="utf-8")
    )
    rendered: Object = vllm if spec.engine == "vllm" else on_gpus if spec.gpus else on_cpus
    rendered["metadata"] |= _metadata(spec)
    predictor = rendered["spec"]["predictor"]
    predictor |= {
        "minReplicas": spec.replicas,
        "maxReplicas": spec.replicas,
        "serviceAccountName": spec.service_account,
    }
    for key in ("nodeSelector", "tolerations"):  # the chart's own GPU pool is not the description's
        predictor.pop(key, None)
    predictor |= _placement(spec)
    container = predictor["containers"][0]
    container |= {"image": spec.image, "resources": _resources(spec)}
    container["args"] = _with_options(
        container["args"],
        {
            "base": spec.base,
            "registry": spec.registry,
            "host": spec.host,
            "precision": spec.precision,
            **{name.replace("_", "-"): getattr(spec, name) for name in LIMITS},
        },
    )
    parallel = [f"--tensor-parallel-size={spec.gpus}"] if spec.engine == "vllm" and spec.gpus > 1 else []
    optional = {
        "vllm-args": " ".join([*parallel, *spec.vllm_args]),
        "chat-template": spec.chat_template,
        "cors-origins": ",".join(spec.cors_origins),
    }
    container["args"] += [f"--{name}={value}" for name, value in optional.items() if value]
    container["args"] += spec.extra_args
    container["securityContext"]["readOnlyRootFilesystem"] = not spec.writable_root
    container["env"] = [_variable(e, spec) for e in container["env"]]
    variables = dict.fromkeys(CA_VARIABLES, f"{CA_FOLDER}/ca.crt") if spec.ca_config_map else {}
    container["env"] += [{"name": n, "value": v} for n, v in sorted({**variables, **spec.extra_env}.items())]
    if spec.ca_config_map:
        container["volumeMounts"].append({"name": "ca", "mountPath": CA_FOLDER, "readOnly": True})
        predictor["volumes"].append({"name": "ca", "configMap": {"name": spec.ca_config_map}})
    if not spec.fixed_ids:
        for field in ("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"):
            predictor["securityContext"].pop(field)
    for volume in predictor["volumes"]:
        if volume["name"] == "tmp":
            volume["emptyDir"] = {"sizeLimit": spec.scratch}
        elif volume["name"] == "keys" and spec.keys_secret:
            volume["secret"] = {"secretName": spec.keys_secret}
    if not spec.keys_secret:
        container["args"].remove(f"--keys-file={KEYS_FILE}")
        for where, field in ((predictor, "volumes"), (container, "volumeMounts")):
            where[field] = [v for v in where[field] if v["name"] != "keys"]
    return rendered


def _with_options(arguments: list[str], values: dict[str, Any]) -> list[str]:
    """`arguments` with the options of `values` set; each must be among them."""
    options = {argument.partition("=")[0]: argument for argument in arguments}
    missing = [name for name in values if f"--{name}" not in options]
    if missing:  # the rendering is ours: a fault of this code, not of the user
        raise AssertionError(f"predictor.yaml has no option --{missing[0]}")
    options |= {f"--{name}": f"--{name}={value}" for name, value in values.items()}
    return list(options.values())


def _variable(variable: Object, spec: ServingSpec) -> Object:
    name = variable["name"]
    if name in ("S3_ENDPOINT", "AWS_DEFAULT_REGION"):
        return {"name": name, "value": spec.s3_endpoint if name == "S3_ENDPOINT" else spec.s3_region}
    secret = spec.hub_secret if name == "HF_TOKEN" else spec.s3_secret
    return {"name": name, "valueFrom": {"secretKeyRef": {**variable["valueFrom"]["secretKeyRef"], "name": secret}}}


def _llm_inference_service(spec: ServingSpec, state: State, base_digest: str | None) -> Object:
    versions = {slug(v.variant): state.resolve(v.variant) for v in state.served}
    if not versions:
        raise UserError(f"{spec.registry} has no adapter to serve yet: register one first.")
    # With the slash: KServe lists by prefix, and `bases/llama` would fetch `bases/llama-3.1/...` as well.
    adapters = [{"name": n, "uri": f"{spec.registry}/{versions[n].adapter}/"} for n in sorted(versions)]
    container = {
        "name": "main",
        **({"image": spec.image} if spec.image else {}),
        "resources": _resources(spec),
        # The root stays writable, as in KServe's own template: nvidia-cdi-hook fails on a read-only one.
        "securityContext": _RESTRICTED,
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "HF_HUB_OFFLINE", "value": "1"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    # KServe merges its own image and arguments into this; without the context Pod Security "restricted" refuses it.
    initializer = {"name": "storage-initializer", "securityContext": _RESTRICTED}
    return {
        "apiVersion": f"{GROUP}/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": _metadata(spec),
        "spec": {
            # Routing by the model's name takes 8 matches for each model, and a rule may have 64: no more than seven
            # adapters. Clients call the path's route, which is not limited.
            "annotations": {f"{GROUP}/model-based-routing-enabled": "false"},
            "model": {
                "uri": _base_uri(spec.base, base_digest),
                "name": BASE,
                "lora": {
                    "maxRank": spec.max_rank,
                    "maxAdapters": min(spec.max_adapters, len(adapters)),
                    # KServe registers each adapter under two names, and vLLM counts each.
                    "maxCpuAdapters": max(spec.max_cpu_adapters, 2 * len(adapters)),
                    "adapters": adapters,
                },
            },
            "replicas": spec.replicas,
            "router": {"gateway": {}, "route": {}, "scheduler": {}},
            "template": {
                "serviceAccountName": spec.service_account,
                "automountServiceAccountToken": False,
                "securityContext": _RESTRICTED_POD,
                **_placement(spec),
                "initContainers": [initializer],
                "containers": [container],
                "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": spec.scratch}}],
            },
        },
    }


def _base_uri(base: str, base_digest: str | None) -> str:
    """The base's address as KServe reads it: a hub model's revision after a colon."""
    location, pinned = split_pin(base)
    if location.startswith("s3://"):
        return location.rstrip("/") + "/"
    revision = pinned or base_digest
    return f"{location}:{revision}" if revision else location


def _metadata(spec: ServingSpec) -> Object:
    return {"name": spec.name, "namespace": spec.namespace, "labels": _labels(spec)}


def _labels(spec: ServingSpec) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "feyntune",
        "app.kubernetes.io/component": "serving",
        "app.kubernetes.io/instance": spec.name,
        "app.kubernetes.io/managed-by": "feyntune",
    }


def _placement(spec: ServingSpec) -> Object:
    placement: Object = {}
    if spec.node_selector:
        placement["nodeSelector"] = dict(sorted(spec.node_selector.items()))
    if spec.tolerations:
        placement["tolerations"] = spec.tolerations
    return placement


def _resources(spec: ServingSpec) -> Object:
    gpus = {"nvidia.com/gpu": str(spec.gpus)} if spec.gpus else {}
    return {"requests": {"cpu": spec.cpu, "memory": spec.memory, **gpus}, "limits": {"memory": spec.memory, **gpus}}
