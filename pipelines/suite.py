"""The suite: every variant trained, evaluated, compared and registered.

    preflight -> ingest -> split -> [ todo -> train -> evaluate ] for base and each variant
              -> compare -> register -> deploy, verdict

The branches are unrolled from variants.yaml, not looped over at run time: a cluster does not honour retries inside a
loop. `todo` skips a branch that was not chosen or was finished by an earlier run. A branch that fails hands its
failure on as data, so the tasks end well and the others are still compared; `verdict` then fails the run.
"""

from typing import Any, List, Literal  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl, kubernetes

from components.deploy.component import deploy
from components.evaluate.component import compare, evaluate, evaluate_base
from components.ingest.component import ingest
from components.register.component import register
from components.split.component import split
from components.train.component import train
from feyntune.names import BASE, slug
from feyntune.variants import load_variants
from pipelines.glue import preflight, todo, verdict

VARIANTS = load_variants().names()
GPUS = 3
USER = 65532  # the images' numeric user; restricted namespaces refuse root
S3_SECRET, HUB_SECRET = "feyntune-s3", "feyntune-hub"
DEFAULT_BASE = "meta-llama/Llama-3.1-8B"
DEFAULT_SOURCE = "oai:https://oaipmh.arxiv.org/oai"
DEFAULT_STORE = "s3://feyntune"
DEFAULT_REGISTRY = "s3://feyntune/registry"
CATEGORIES = ["hep-th", "hep-ph", "gr-qc", "q-bio", "cs"]  # what the ten mixtures draw from
PAPER_CUT_OFF = "2024-08-22"  # the Kaggle snapshot FeynTune was trained on


def suite(flavour: Literal["gpu", "cpu"]) -> Any:
    """The pipeline with a branch for every variant of variants.yaml; a run's `variants` chooses among them."""
    branches = {name: _branch(name, flavour) for name in [BASE, *VARIANTS]}

    @dsl.pipeline(name="feyntune-suite", description="Variants trained, compared with the base, and registered.")
    def pipeline(
        source: str = DEFAULT_SOURCE,
        until: str = PAPER_CUT_OFF,
        categories: List[str] = CATEGORIES,  # noqa: UP006
        after: str = "",
        variants: List[str] = VARIANTS,  # noqa: UP006
        base: str = DEFAULT_BASE,
        recipe: dict = {},  # noqa: B006
        devices: int = GPUS if flavour == "gpu" else 1,
        store: str = DEFAULT_STORE,
        registry: str = DEFAULT_REGISTRY,
        serving: dict = {},  # noqa: B006
    ):
        _steps(branches, source, until, categories, after, variants, base, recipe, devices, store, registry, serving)

    return pipeline


def variant(flavour: Literal["gpu", "cpu"]) -> Any:
    """The pipeline with one variant, chosen from a list in the Kubeflow form (see compile.py)."""
    branches = {BASE: _branch(BASE, flavour), "variant": _branch("variant", flavour)}

    @dsl.pipeline(name="feyntune-variant", description="One variant trained, compared with the base, and registered.")
    def pipeline(
        variant: str = "hep-th+hep-ph+gr-qc/lora-all",
        source: str = DEFAULT_SOURCE,
        until: str = PAPER_CUT_OFF,
        categories: List[str] = CATEGORIES,  # noqa: UP006
        after: str = "",
        base: str = DEFAULT_BASE,
        recipe: dict = {},  # noqa: B006
        devices: int = GPUS if flavour == "gpu" else 1,
        store: str = DEFAULT_STORE,
        registry: str = DEFAULT_REGISTRY,
        serving: dict = {},  # noqa: B006
    ):
        _steps(branches, source, until, categories, after, [], base, recipe, devices, store, registry, serving, variant)

    return pipeline


def _steps(
    branches: dict[str, Any],
    source: Any,
    until: Any,
    categories: Any,
    after: Any,
    variants: Any,
    base: Any,
    recipe: Any,
    devices: Any,
    store: Any,
    registry: Any,
    serving: Any,
    variant: Any = "",
) -> None:
    """The tasks of either pipeline; every argument is a pipeline parameter or a constant."""
    pinned = preflight(
        source=source,
        until=until,
        categories=categories,
        after=after,
        variants=variants,
        variant=variant,
        base=base,
        recipe=recipe,
        devices=devices,
        store=store,
        registry=registry,
        serving=serving,
    )
    _cpu_step(pinned, hub=True).set_caching_options(False)
    pin = pinned.outputs

    corpus = ingest(source=source, until=until, categories=categories, fingerprint=pin["fingerprint"], store=store)
    _cpu_step(corpus, memory="8Gi").set_retry(3, backoff_duration="60s")
    papers = split(corpus=corpus.outputs["corpus"], after=after, fingerprint=pin["fingerprint"])
    _cpu_step(papers, memory="16Gi")

    ends = []
    for name, branch in branches.items():
        task = branch(
            data=papers.outputs["data"],
            split=papers.outputs["Output"],
            variants=pin["variants"],
            base=pin["base"],
            recipe=recipe,
            devices=devices,
            code=pin["code"],
            store=store,
            **({"variant": variant} if name == "variant" else {}),
        )
        ends.append(task.set_display_name(name))

    compared = compare(
        corpus=corpus.outputs["corpus"],
        data=papers.outputs["data"],
        variants=pin["variants"],
        base=pin["base"],
        recipe=recipe,
        code=pin["code"],
        store=store,
    ).after(*ends)
    _cpu_step(compared, memory="8Gi").set_caching_options(False)
    registered = register(comparison=compared.outputs["comparison"], store=store, registry=registry)
    _cpu_step(registered).set_caching_options(False)
    served = deploy(champion=registered.outputs["Output"], base=pin["base"], registry=registry, serving=serving)
    _cpu_step(served).set_caching_options(False)
    ended = verdict(comparison=compared.outputs["comparison"]).after(registered)
    _cpu_step(ended).set_caching_options(False)


def _branch(name: str, flavour: str) -> Any:
    """The nested pipeline of one system: the base, a variant, or "variant" for one named at run time."""

    def steps(data: Any, split: Any, variant: Any, variants: Any, base: Any, recipe: Any, devices: Any, code: Any,
              store: Any) -> None:  # fmt: skip
        need = todo(variant=variant, variants=variants, split=split, base=base, recipe=recipe, code=code, store=store)
        _cpu_step(need).set_caching_options(False)
        branch = need.output
        with dsl.If(branch != ""):
            if name == BASE:
                scored = evaluate_base(data=data, base=base, recipe=recipe, store=store, branch=branch)
            else:
                trained = train(
                    data=data,
                    variant=variant,
                    base=base,
                    recipe=recipe,
                    devices=devices,
                    store=store,
                    branch=branch,
                )
                # Exit code 75 means interrupted and saved: the retry goes on from the newest checkpoint.
                _gpu_step(trained, flavour, GPUS).set_caching_options(False).set_retry(5, backoff_duration="30s")
                scored = evaluate(
                    data=data,
                    adapter=trained.outputs["adapter"],
                    variant=variant,
                    base=base,
                    recipe=recipe,
                    store=store,
                    branch=branch,
                )
            _gpu_step(scored, flavour, 1).set_caching_options(False).set_retry(2, backoff_duration="30s")

    if name == "variant":

        @dsl.pipeline(name="branch-variant")
        def branch(
            data: dsl.Input[dsl.Dataset],
            split: str,
            variant: str,
            variants: List[str],  # noqa: UP006
            base: str,
            recipe: dict,
            devices: int,
            code: str,
            store: str,
        ):
            steps(data, split, variant, variants, base, recipe, devices, code, store)

    else:

        @dsl.pipeline(name=f"branch-{_task_name(name)}")
        def branch(
            data: dsl.Input[dsl.Dataset],
            split: str,
            variants: List[str],  # noqa: UP006
            base: str,
            recipe: dict,
            devices: int,
            code: str,
            store: str,
        ):
            steps(data, split, name, variants, base, recipe, devices, code, store)

    return branch


def _task_name(name: str) -> str:
    """A variant's name in the letters Kubeflow allows in a pipeline's name."""
    return slug(name).replace(".", "-").replace("_", "-")


def _cpu_step(task: dsl.PipelineTask, memory: str = "4Gi", hub: bool = False) -> dsl.PipelineTask:
    """Keys from Secrets, a numeric user, and modest resources."""
    kubernetes.use_secret_as_env(
        task,
        S3_SECRET,
        {k: k for k in ("S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")},
    )
    if hub:
        kubernetes.use_secret_as_env(task, HUB_SECRET, {"HF_TOKEN": "HF_TOKEN"}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "feyntune")  # what the chart's policies go by
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    task.set_env_variable("FEYNTUNE_LOG", "json").set_env_variable("HOME", "/tmp")
    return task.set_cpu_request("1").set_memory_request("1Gi").set_memory_limit(memory)


def _gpu_step(task: dsl.PipelineTask, flavour: str, gpus: int) -> dsl.PipelineTask:
    """A step on the A100 pool (or, in the CPU flavour, on any node)."""
    _cpu_step(task, memory="64Gi" if flavour == "gpu" else "8Gi", hub=True)
    kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="16Gi")
    if flavour == "gpu":
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(gpus)
        kubernetes.add_node_selector(task, "cloud.google.com/gke-accelerator", "nvidia-tesla-a100")
        kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    return task
