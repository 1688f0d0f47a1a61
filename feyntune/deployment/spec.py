"""What is to be served and with what: the description that `feyntune deploy` and the pipeline's deploy step read."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from feyntune.constants import HUB_SECRET, S3_SECRET
from feyntune.errors import UserError

# Settings of `feyntune serve` that the chart, a description and the command know by one name.
LIMITS = (
    *("engine", "max_adapters", "max_rank", "batch_requests", "batch_tokens", "cache_tokens"),
    *("queue", "queue_seconds", "request_seconds", "body_bytes"),
)
_PREDICTOR_ONLY = (
    *("engine", "batch_requests", "batch_tokens", "cache_tokens", "queue", "queue_seconds", "request_seconds"),
    *("body_bytes", "chat_template", "cors_origins", "vllm_args", "extra_args", "extra_env", "ca_config_map"),
    *("fixed_ids", "writable_root"),
)
_NAME = r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$"


class ServingSpec(BaseModel):
    """A serving description. Secrets are named, never contained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("abstracts", pattern=_NAME, description="Name of the service.")
    namespace: str = Field(pattern=_NAME, description="Namespace of the service, its Secrets and its ServiceAccount.")
    kind: Literal["InferenceService", "LLMInferenceService"] = Field(
        "InferenceService",
        description="`InferenceService`: our predictor (CPU or one GPU), which follows the registry. "
        "`LLMInferenceService`: KServe's vLLM with a fixed list of adapters; deploy again after a promotion.",
    )
    base: str = Field(description="`s3://` folder or hub ID (`hf://OWNER/MODEL` for vLLM), optionally `@DIGEST`.")
    registry: str = Field(description="`s3://` address of the registry.")
    image: str | None = Field(None, description="Image of the predictor, or of vLLM (KServe's own when left out).")
    gpus: int = Field(0, ge=0, le=8, description="GPUs of one replica; the builtin engine uses at most one.")
    replicas: int = Field(1, ge=1, le=64, description="Number of replicas.")
    cpu: str = Field("2", description="CPUs requested by a replica.")
    memory: str = Field("16Gi", description="Memory requested by a replica, and its limit.")
    scratch: str = Field("40Gi", description="Size of /tmp, which holds the base model and the adapters.")
    precision: Literal["bf16", "fp32", "nf4"] = Field("bf16", description="Precision of the predictor's base model.")
    engine: Literal["builtin", "vllm"] = Field(
        "builtin",
        description="What computes in the predictor: `builtin` (CPUs or one GPU) or `vllm` (a vLLM server in the pod).",
    )
    max_rank: Literal[8, 16, 32, 64, 128] = Field(8, description="Maximum LoRA rank.")
    max_adapters: int = Field(40, ge=1, le=128, description="Adapters in (GPU) memory at once.")
    max_cpu_adapters: int = Field(
        48,
        ge=1,
        description="LLMInferenceService only: adapters in host memory; at least twice the registry's, see render.",
    )
    batch_requests: int = Field(64, ge=1, description="Maximum number of requests computed at once.")
    batch_tokens: int = Field(512, ge=1, description="Maximum number of tokens in one step.")
    cache_tokens: int = Field(
        32768,
        ge=64,
        description="Tokens of the key-value cache, for all requests together; with vLLM, of the longest request.",
    )
    queue: int = Field(256, ge=1, description="Maximum number of waiting requests per key; keys are served in turn.")
    queue_seconds: int = Field(120, ge=1, description="Maximum wait in the queue.")
    request_seconds: int = Field(300, ge=1, description="Maximum time for one request, waiting included.")
    body_bytes: int = Field(1 << 20, ge=1024, description="Largest request body.")
    chat_template: str = Field("", description="Jinja template of conversations, for a base without one.")
    cors_origins: list[str] = Field([], description="Origins whose pages may call the endpoint from a browser.")
    vllm_args: list[str] = Field([], description="Additional options of `vllm serve`, with `engine: vllm`.")
    host: Literal["0.0.0.0", "::"] = Field(
        "0.0.0.0", description="Address the predictor listens on; `::` where pods have IPv6 addresses only."
    )
    writable_root: bool = Field(
        False,
        description="Give the predictor a writable root file system: nvidia-cdi-hook needs it on nodes with CDI.",
    )
    extra_args: list[str] = Field([], description="Additional options of `feyntune serve`; the predictor only.")
    extra_env: dict[str, str] = Field(
        {}, description="Environment variables of the predictor, such as HTTPS_PROXY and NO_PROXY."
    )
    ca_config_map: str | None = Field(
        None,
        pattern=_NAME,
        description="ConfigMap whose entry `ca.crt` holds the certificates to trust, in PEM.",
    )
    fixed_ids: bool = Field(
        True, description="Run as user and group 65532; false on OpenShift, which chooses them from the namespace."
    )
    s3_endpoint: str = Field(description="URL of the S3 server, as pods reach it.")
    s3_region: str = Field("us-east-1", description="Region used to sign requests.")
    s3_secret: str = Field(
        S3_SECRET, pattern=_NAME, description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    )
    hub_secret: str = Field(HUB_SECRET, pattern=_NAME, description="Secret with HF_TOKEN; need not exist.")
    service_account: str = Field("feyntune-serving", pattern=_NAME, description="ServiceAccount of the pods.")
    keys_secret: str | None = Field(
        None, pattern=_NAME, description="Secret whose entry `keys` lists the endpoint's bearer keys; none: no key."
    )
    gateway: str = Field(
        "kserve/kserve-ingress-gateway", description="vLLM only: NAMESPACE/NAME of the Gateway that KServe routes by."
    )
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes the pods may run on.")
    tolerations: list[dict[str, str]] = Field([], description="Taints of nodes that the pods tolerate.")

    @field_validator("registry")
    @classmethod
    def _in_s3(cls, value: str) -> str:
        if not value.startswith("s3://"):
            raise ValueError("pods reach the registry only in S3: give an s3:// address")
        return value.rstrip("/")

    @field_validator("s3_endpoint")
    @classmethod
    def _url_without_keys(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise ValueError("must be an http(s) URL without a user or password")
        return value

    @field_validator("extra_env")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        taken = {"S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "HF_TOKEN"}
        for name in sorted(taken & value.keys()):
            raise ValueError(f"{name} comes from the description's Secrets and settings: leave it out")
        return value

    @model_validator(mode="after")
    def _fits_kind(self) -> "ServingSpec":
        if self.kind == "LLMInferenceService":
            if not self.base.startswith(("s3://", "hf://")):
                raise ValueError("base: vLLM takes it from s3:// or hf://")
            if self.gpus < 1:
                raise ValueError("gpus: vLLM needs at least one")
            if self.max_cpu_adapters < self.max_adapters:
                raise ValueError("max_cpu_adapters: must be at least max_adapters")
            if self.keys_secret is not None:
                raise ValueError("keys_secret: vLLM does not check keys, the gateway in front of it does: leave it out")
            given = [n for n in _PREDICTOR_ONLY if getattr(self, n) != type(self).model_fields[n].default]
            if given:
                raise ValueError(f"{given[0]}: is a setting of the predictor: leave it out")
        elif self.image is None:
            raise ValueError("image: the predictor's must be given")
        elif self.engine == "vllm" and self.gpus < 1:
            raise ValueError("gpus: vLLM needs at least one")
        elif self.engine == "builtin" and (self.gpus > 1 or self.vllm_args):
            raise ValueError("gpus, vllm_args: the builtin engine uses at most one GPU and no vLLM: set engine: vllm")
        return self


def parse_spec(value: Any) -> ServingSpec:
    """A serving description from a file or the command line.

    Raises:
        UserError: it is no mapping, or a field is unknown, missing or impossible (named).
    """
    try:
        return ServingSpec.model_validate(value)
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(str(p) for p in error["loc"]) or "the description"
        raise UserError(f"Serving description: {where}: {error['msg']}.") from e


def serving_of_run(serving: dict[str, Any], base: str, registry: str) -> ServingSpec:
    """The description that a pipeline run was given, with the run's own base and registry.

    Raises:
        UserError: a field is unknown, missing or impossible, names another registry than the run's, or asks for keys,
            which no step of a run holds.
    """
    if serving.get("registry", registry) != registry:
        raise UserError(f"Serving description: registry: leave it out, or give the run's own, {registry}.")
    spec = parse_spec({"base": base, **serving, "registry": registry})
    if spec.keys_secret is not None:
        raise UserError(
            "Serving description: keys_secret: a run holds no key to try the endpoint with: leave it out, and deploy "
            "with `feyntune deploy --key-file`."
        )
    return spec
