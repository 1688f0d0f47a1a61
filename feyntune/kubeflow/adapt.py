"""What a compiled pipeline takes on in one cluster: its images, its GPU pool, its queue, and the form's defaults."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feyntune.constants import CA_FOLDER, HUB_SECRET, MEMORY_LIMIT_PER_GPU, S3_SECRET
from feyntune.errors import UserError

CACHE = "/var/cache/feyntune"
COMPILED = Path(__file__).parents[1] / "compiled"  # suite.yaml and variant.yaml, written by pipelines/compile.py


class Settings(BaseModel):
    """A cluster's own values; whatever is not given stays as compiled. The chart writes them as settings.yaml.

    Attributes:
        images: prefix of the images, such as `registry.example/team`.
        tag: of the images.
        defaults: of the pipelines' parameters, by name; those a pipeline does not have are left out.
        gpus: default of `devices`, the GPUs that a training pod asks for; 0 for a cluster without GPUs. As compiled,
            1 in `suite` and 3 in `variant`.
        cpusPerGpu, memoryPerGpu: what a pod requests for each of its GPUs, in cores and GiB; lower them for nodes that
            have less (as compiled: 6 and 24).
        parallelism: how many variants of a suite run at the same time; all of them when 0.
        nodeSelector, tolerations: of the steps that ask for GPUs, in Kubernetes' own form.
        queue: the Kueue LocalQueue of the steps that ask for GPUs.
        pullSecrets: names of Secrets with a registry's login, for every step.
        env: variables of every step.
        name: first part of the pipelines' names in Kubeflow, so that two releases can share one.
        s3Secret, hubSecret: names of the Secrets that the steps read.
        caConfigMap: a ConfigMap whose `ca.crt` every step gets at /etc/feyntune-ca.
        fixedIds: false leaves out the user and group that steps run as; OpenShift chooses them.
        cpuNodeSelector: of the steps that ask for no GPUs.
        pipelineRoot: where runs keep their artifacts.
        cacheClaim: a PersistentVolumeClaim for base models, which training and evaluation mount at CACHE.
    """

    model_config = ConfigDict(extra="forbid")

    images: str = ""
    tag: str = ""
    defaults: dict[str, Any] = {}
    gpus: int | None = Field(None, ge=0, le=16)
    cpusPerGpu: float | None = Field(None, gt=0)
    memoryPerGpu: int | None = Field(None, ge=1)
    parallelism: int = Field(0, ge=0)
    nodeSelector: dict[str, str] | None = None
    tolerations: list[dict[str, Any]] | None = None
    queue: str = ""
    pullSecrets: list[str] = []
    env: dict[str, str] = {}
    name: str = "feyntune"
    s3Secret: str = S3_SECRET
    hubSecret: str = HUB_SECRET
    caConfigMap: str = ""
    fixedIds: bool = True
    cpuNodeSelector: dict[str, str] = {}
    pipelineRoot: str = ""
    cacheClaim: str = ""


def read_settings(path: str | Path) -> Settings:
    """The settings in a YAML file.

    Raises:
        UserError: the file is not there, or a field of it is unknown or of the wrong kind (named).
    """
    try:
        return Settings.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
    except OSError as e:
        raise UserError(f"Settings file {path} cannot be read ({e.strerror}): check the path.") from e
    except yaml.YAMLError as e:
        raise UserError(f"Settings file {path} is not YAML ({' '.join(str(e).split())}): correct it.") from e
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        if not where:
            raise UserError(f"Settings file {path} has no settings: write them as NAME: VALUE.") from e
        raise UserError(f"Settings file {path}: {where}: {reason}.") from e


def adapt(text: str, settings: Settings) -> str:
    """The compiled YAML `text` with `settings` in it.

    Raises:
        UserError: a default of the wrong kind.
    """
    spec, platform = yaml.safe_load_all(text)
    steps = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in spec["deploymentSpec"]["executors"].items():
        container, step = executor["container"], steps.setdefault(name, {})
        container["image"] = _image(container["image"], settings)
        gpus = "accelerator" in container.get("resources", {})
        env = dict(settings.env)
        if name == "exec-preflight":
            per_gpu = {"FEYNTUNE_CPUS_PER_GPU": settings.cpusPerGpu, "FEYNTUNE_MEMORY_PER_GPU": settings.memoryPerGpu}
            env |= {variable: f"{amount:g}" for variable, amount in per_gpu.items() if amount is not None}
        if gpus and settings.cacheClaim:
            mount = {"constant": settings.cacheClaim, "mountPath": CACHE}
            step["pvcMount"] = [{**mount, "pvcNameParameter": {"runtimeValue": {"constant": settings.cacheClaim}}}]
            env["FEYNTUNE_CACHE"] = CACHE
        if gpus and settings.gpus == 0:
            _without_gpus(container["resources"], step)
            gpus = False
        _fit_cluster(step, settings, gpus)
        if env:
            container["env"] = [
                *[e for e in container.get("env", []) if e["name"] not in env],
                *[{"name": k, "value": v} for k, v in env.items()],
            ]
        if settings.pullSecrets:
            step["imagePullSecret"] = [{"secretName": s} for s in settings.pullSecrets]
        if gpus:
            _pool(step, settings)
            if name != "exec-train":  # whose resources are outputs of preflight
                _request_for_one_gpu(container["resources"], settings)
    if settings.parallelism:
        for component in spec["components"].values():
            for task in component.get("dag", {}).get("tasks", {}).values():
                if "parameterIterator" in task:
                    task["iteratorPolicy"] = {"parallelismLimit": settings.parallelism}
    if settings.pipelineRoot:
        spec["defaultPipelineRoot"] = settings.pipelineRoot
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    devices = {} if settings.gpus is None else {"devices": max(settings.gpus, 1)}
    for name, value in (devices | settings.defaults).items():
        if name not in parameters:
            continue
        check_type(name, value, parameters[name]["parameterType"])
        parameters[name]["defaultValue"] = float(value) if isinstance(value, int) else value
    return yaml.safe_dump_all([spec, platform], sort_keys=True, width=110)


def _fit_cluster(step: dict[str, Any], settings: Settings, gpus: bool) -> None:
    """What a step takes on from its cluster, beside the GPU pool."""
    names = {S3_SECRET: settings.s3Secret, HUB_SECRET: settings.hubSecret}
    for secret in step.get("secretAsEnv", []):
        name = names[secret["secretName"]]
        secret |= {"secretName": name, "secretNameParameter": {"runtimeValue": {"constant": name}}}
    if settings.caConfigMap:
        mount = {"configMapName": settings.caConfigMap, "mountPath": CA_FOLDER, "optional": False}
        name_parameter = {"runtimeValue": {"constant": settings.caConfigMap}}
        step["configMapAsVolume"] = [{**mount, "configMapNameParameter": name_parameter}]
    if not settings.fixedIds:
        for key in ("runAsUser", "runAsGroup"):
            step.get("securityContext", {}).pop(key, None)
    if settings.cpuNodeSelector and not gpus:
        step["nodeSelector"] = {"labels": dict(settings.cpuNodeSelector)}


def _image(image: str, settings: Settings) -> str:
    prefix, _, rest = image.rpartition("/")
    name, _, tag = rest.partition(":")
    return f"{settings.images.rstrip('/') or prefix}/{name}:{settings.tag or tag}"


def _pool(step: dict[str, Any], settings: Settings) -> None:
    if settings.nodeSelector is not None:
        step["nodeSelector"] = {"labels": dict(settings.nodeSelector)}
    if settings.tolerations is not None:
        step["tolerations"] = [dict(t) for t in settings.tolerations]
    if settings.queue:
        labels = step.setdefault("podMetadata", {}).setdefault("labels", {})
        labels["kueue.x-k8s.io/queue-name"] = settings.queue


def _request_for_one_gpu(resources: dict[str, Any], settings: Settings) -> None:
    if settings.cpusPerGpu is not None:
        _set_cpus(resources, settings.cpusPerGpu)
    if settings.memoryPerGpu is not None:
        _set_memory(resources, "Request", settings.memoryPerGpu)
        _set_memory(resources, "Limit", max(settings.memoryPerGpu, MEMORY_LIMIT_PER_GPU))


def _set_cpus(resources: dict[str, Any], cores: float) -> None:
    """Both spellings: a text for Kubernetes, and a number where the compiler wrote one."""
    resources["resourceCpuRequest"] = f"{cores:g}"
    if "cpuRequest" in resources:
        resources["cpuRequest"] = float(cores)


def _set_memory(resources: dict[str, Any], what: Literal["Request", "Limit"], gib: int) -> None:
    resources[f"resourceMemory{what}"] = f"{gib}Gi"
    if f"memory{what}" in resources:
        resources[f"memory{what}"] = gib * 2**30 / 1e9  # gigabytes


def _without_gpus(resources: dict[str, Any], step: dict[str, Any]) -> None:
    """Any node will do, and a tiny model's memory."""
    del resources["accelerator"]
    _set_cpus(resources, 1)
    _set_memory(resources, "Request", 1)
    _set_memory(resources, "Limit", 8)
    for key in ("nodeSelector", "tolerations"):
        step.pop(key, None)


_KINDS: dict[str, Any] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


def check_type(name: str, value: Any, kind: str) -> None:
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise UserError(f"{name} is {value!r}, but the pipeline takes {kind}: correct it.")
