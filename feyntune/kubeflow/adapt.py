"""What a compiled pipeline takes on in one cluster: its images, its GPU pool, its queue, and the form's defaults."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from feyntune.errors import UserError

COMPILED = Path(__file__).parents[1] / "compiled"  # suite.yaml and variant.yaml, written by pipelines/compile.py


class Settings(BaseModel):
    """A cluster's own values; whatever is not given stays as compiled. The chart writes them as settings.yaml.

    Attributes:
        images: prefix of the images, such as `registry.example/team`.
        tag: of the images.
        defaults: of the pipelines' parameters, by name; those a pipeline does not have are left out. `devices` is
            also the number of GPUs that a training's pod asks for.
        nodeSelector, tolerations: of the steps that ask for GPUs, in Kubernetes' own form.
        queue: the Kueue LocalQueue of the steps that ask for GPUs.
        pullSecrets: names of Secrets with a registry's login, for every step.
        env: variables of every step.
    """

    model_config = ConfigDict(extra="forbid")

    images: str = ""
    tag: str = ""
    defaults: dict[str, Any] = {}
    nodeSelector: dict[str, str] | None = None
    tolerations: list[dict[str, Any]] | None = None
    queue: str = ""
    pullSecrets: list[str] = []
    env: dict[str, str] = {}


def read_settings(path: str | Path) -> Settings:
    """The settings in a YAML file.

    Raises:
        UserError: the file is not there, or a field of it is unknown or of the wrong kind (named).
    """
    try:
        return Settings.model_validate(yaml.safe_load(Path(path).read_text()) or {})
    except OSError as e:
        raise UserError(f"Settings file {path} cannot be read ({e.strerror}): check the path.") from e
    except (ValidationError, yaml.YAMLError) as e:
        raise UserError(f"Settings file {path}: {'; '.join(str(e).splitlines()[1:3]).strip()}.") from e


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
        if settings.env:
            container["env"] = [
                *[e for e in container.get("env", []) if e["name"] not in settings.env],
                *[{"name": k, "value": v} for k, v in settings.env.items()],
            ]
        if settings.pullSecrets:
            step["imagePullSecret"] = [{"secretName": s} for s in settings.pullSecrets]
        if "accelerator" in container.get("resources", {}):
            _pool(step, settings)
            if name.startswith("exec-train") and "devices" in settings.defaults:
                count = str(settings.defaults["devices"])
                container["resources"]["accelerator"] |= {"count": count, "resourceCount": count}
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for name, value in settings.defaults.items():
        if name not in parameters:
            continue
        _check_default(name, value, parameters[name]["parameterType"])
        parameters[name]["defaultValue"] = float(value) if isinstance(value, int) else value
    return yaml.safe_dump_all([spec, platform], sort_keys=True, width=110)


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


_KINDS: dict[str, Any] = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


def _check_default(name: str, value: Any, kind: str) -> None:
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        raise UserError(f"Default of {name} is {value!r}, but the pipeline takes {kind} there: correct it.")
