"""The pipelines: variants trained, scored, compared and registered.

    preflight -> ingest -> split -> check-cache
              -> train-and-score: for the base, unless it is scored:  evaluate-base
                                  for each unfinished variant:        train -> evaluate
              -> compare -> register -> deploy, fail-if-any-failed

`check-cache` lists what no earlier run finished, and `dsl.ParallelFor` loops over that list, so pods exist only for
the variants that a run selected and still has to train. A variant that fails leaves its failure in the store and its
task ends normally: the others are still compared, and `fail-if-any-failed` then fails the run.

`compare` is an ordinary task, not one with `ignore_upstream_failure`: Kubeflow 2.17 compiles that to an Argo exit hook
on every task it depends on (backend/src/v2/compiler/argocompiler/dag.go), which would run it once for each of them,
and nothing may depend on a hook.
"""

from typing import Any, List  # noqa: UP035 (Kubeflow's type annotations)

from kfp import dsl, kubernetes

from components.deploy.component import deploy
from components.evaluate.component import compare, evaluate, evaluate_base
from components.ingest.component import ingest
from components.register.component import register
from components.split.component import split
from components.train.component import train
from feyntune.constants import (
    CPUS_PER_GPU,
    DEFAULT_BASE,
    DEFAULT_REGISTRY,
    DEFAULT_SOURCE,
    DEFAULT_STORE,
    EVALUATE_RETRIES,
    HUB_SECRET,
    IMAGE_USER,
    MEMORY_LIMIT_PER_GPU,
    MEMORY_PER_GPU,
    S3_SECRET,
    TRAIN_RETRIES,
)
from feyntune.variants import load_variants
from pipelines.glue import check_cache, fail_if_any_failed, preflight

VARIANTS = load_variants().names()
SUITE_GPUS, VARIANT_GPUS = 1, 3  # defaults of `devices`: many variants pack best on one each, a single one uses all
CATEGORIES = ["hep-th", "hep-ph", "gr-qc", "q-bio", "cs"]  # what the ten mixtures draw from
PAPER_CUT_OFF = "2024-08-22"  # the Kaggle snapshot FeynTune was trained on
RETRY_FOR = "1209600s"  # two weeks: Kubeflow's default ends retries one hour after the first attempt began


def _steps(
    papers: dict[str, Any],
    variants: Any,
    variant: Any,
    base: Any,
    recipe: Any,
    devices: Any,
    store: Any,
    registry: Any,
    serving: Any,
) -> None:
    """The tasks of either pipeline. Arguments are pipeline parameters or constants.

    `papers` are the parameters of what is read and how it is split, by name.
    """
    checked = preflight(
        **{name: value for name, value in papers.items() if name != "converted_text"},
        variants=variants,
        variant=variant,
        base=base,
        recipe=recipe,
        devices=devices,
        store=store,
        registry=registry,
        serving=serving,
    )
    _cpu_step(checked, hub=True).set_caching_options(False)
    pinned = checked.outputs

    read = {n: papers[n] for n in ("source", "until", "categories", "max_bad", "converted_text")}
    corpus = ingest(**read, fingerprint=pinned["fingerprint"], store=store)
    _cpu_step(corpus, memory="8Gi").set_retry(3, backoff_duration="60s", backoff_max_duration=RETRY_FOR)
    assigned = split(
        corpus=corpus.outputs["corpus"],
        after=papers["after"],
        mixtures=papers["mixtures"],
        fingerprint=pinned["fingerprint"],
    )
    _cpu_step(assigned, memory="16Gi")
    data = assigned.outputs["data"]

    pending = check_cache(data=data, variants=pinned["variants"], base=pinned["base"], recipe=recipe, store=store)
    _cpu_step(pending).set_caching_options(False)
    scored = train_and_score(
        data=data,
        unscored=pending.outputs["base"],
        unfinished=pending.outputs["variants"],
        base=pinned["base"],
        recipe=recipe,
        devices=devices,
        store=store,
        **{name: pinned[name] for name in ("gpus", "cpus", "memory", "memory_limit")},
    )

    compared = compare(
        corpus=corpus.outputs["corpus"],
        data=data,
        variants=pinned["variants"],
        base=pinned["base"],
        recipe=recipe,
        store=store,
        run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    ).after(scored)
    _cpu_step(compared, memory="8Gi").set_caching_options(False)
    registered = register(comparison=compared.outputs["comparison"], store=store, registry=registry)
    _cpu_step(registered).set_caching_options(False)
    served = deploy(champion=registered.outputs["Output"], base=pinned["base"], registry=registry, serving=serving)
    _cpu_step(served).set_caching_options(False)
    ended = fail_if_any_failed(comparison=compared.outputs["comparison"]).after(registered)
    _cpu_step(ended).set_caching_options(False)


def _cpu_step(task: dsl.PipelineTask, memory: str = "4Gi", hub: bool = False) -> dsl.PipelineTask:
    """Keys from Secrets, a numeric user, and modest resources."""
    kubernetes.use_secret_as_env(
        task,
        S3_SECRET,
        {k: k for k in ("S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")},
    )
    if hub:
        kubernetes.use_secret_as_env(task, HUB_SECRET, {"HF_TOKEN": "HF_TOKEN"}, optional=True)
    kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "feyntune")  # what the chart's policies select
    kubernetes.set_security_context(task, run_as_user=IMAGE_USER, run_as_group=IMAGE_USER, run_as_non_root=True)
    task.set_env_variable("FEYNTUNE_LOG", "json").set_env_variable("HOME", "/tmp")
    return task.set_cpu_request("1").set_memory_request("1Gi").set_memory_limit(memory)


def _gpu_step(task: dsl.PipelineTask, gpus: Any = None) -> dsl.PipelineTask:
    """A step on the A100 pool, with one GPU or a number that the run decides (a text)."""
    _cpu_step(task, memory=f"{MEMORY_LIMIT_PER_GPU}Gi", hub=True)
    task.set_cpu_request(str(CPUS_PER_GPU)).set_memory_request(f"{MEMORY_PER_GPU}Gi")
    kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit="16Gi")
    task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(1 if gpus is None else gpus)
    kubernetes.add_node_selector(task, "cloud.google.com/gke-accelerator", "nvidia-tesla-a100")
    kubernetes.add_toleration(task, key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    return task


@dsl.pipeline(name="train-and-score")
def train_and_score(
    data: dsl.Input[dsl.Dataset],
    unscored: List[str],  # noqa: UP006
    unfinished: List[str],  # noqa: UP006
    base: str,
    recipe: dict,
    devices: int,
    store: str,
    gpus: str,
    cpus: str,
    memory: str,
    memory_limit: str,
):
    """The two loops, which take the resources of a training pod from `preflight`.

    Nested, since the local runner of the SDK (2.17) puts the loop's item in the place of every output of another task
    that a loop takes; here `base` is an input of the pipeline. The resources are texts, since Kubeflow's driver
    resolves no other type in a pod's resources: a number it reads as "", which is a pod without GPUs
    (backend/src/v2/driver, resolvePodSpecInputRuntimeParameter, since Kubeflow Pipelines 2.5).
    """
    with dsl.ParallelFor(unscored, name="score the base") as name:
        scored = evaluate_base(data=data, variant=name, base=base, recipe=recipe, store=store)
        _gpu_step(scored).set_caching_options(False)
        scored.set_retry(EVALUATE_RETRIES, backoff_duration="30s", backoff_max_duration=RETRY_FOR)
    with dsl.ParallelFor(unfinished, name="each variant") as name:
        trained = train(data=data, variant=name, base=base, recipe=recipe, devices=devices, store=store)
        # An interrupted training resumes from its newest checkpoint in the store.
        _gpu_step(trained, gpus).set_caching_options(False)
        trained.set_cpu_request(cpus).set_memory_request(memory).set_memory_limit(memory_limit)
        trained.register_pipeline_channels([gpus, cpus, memory, memory_limit])  # else the loop does not pass them on
        trained.set_retry(TRAIN_RETRIES, backoff_duration="30s", backoff_max_duration=RETRY_FOR)
        adapter = trained.outputs["adapter"]
        measured = evaluate(data=data, adapter=adapter, variant=name, base=base, recipe=recipe, store=store)
        _gpu_step(measured).set_caching_options(False)
        measured.set_retry(EVALUATE_RETRIES, backoff_duration="30s", backoff_max_duration=RETRY_FOR)


@dsl.pipeline(
    name="feyntune-suite",
    description="Train several variants, compare them with the base model, and register the best ones.",
)
def suite(
    source: str = DEFAULT_SOURCE,
    until: str = PAPER_CUT_OFF,
    categories: List[str] = CATEGORIES,  # noqa: UP006
    max_bad: float = 0.001,
    converted_text: bool = False,
    after: str = "",
    mixtures: list = [],  # noqa: B006
    variants: List[str] = VARIANTS,  # noqa: UP006
    base: str = DEFAULT_BASE,
    recipe: dict = {},  # noqa: B006
    devices: int = SUITE_GPUS,
    store: str = DEFAULT_STORE,
    registry: str = DEFAULT_REGISTRY,
    serving: dict = {},  # noqa: B006
):
    papers: dict[str, Any] = {"source": source, "until": until, "categories": categories, "after": after}
    papers |= {"max_bad": max_bad, "converted_text": converted_text, "mixtures": mixtures}
    _steps(papers, variants, "", base, recipe, devices, store, registry, serving)


@dsl.pipeline(
    name="feyntune-variant",
    description="Train one variant, compare it with the base model, and register it.",
)
def variant(
    variant: str = "hep-th+hep-ph+gr-qc/lora-all",
    source: str = DEFAULT_SOURCE,
    until: str = PAPER_CUT_OFF,
    categories: List[str] = CATEGORIES,  # noqa: UP006
    max_bad: float = 0.001,
    converted_text: bool = False,
    after: str = "",
    base: str = DEFAULT_BASE,
    recipe: dict = {},  # noqa: B006
    devices: int = VARIANT_GPUS,
    store: str = DEFAULT_STORE,
    registry: str = DEFAULT_REGISTRY,
    serving: dict = {},  # noqa: B006
):
    papers: dict[str, Any] = {"source": source, "until": until, "categories": categories, "after": after}
    papers |= {"max_bad": max_bad, "converted_text": converted_text, "mixtures": []}
    _steps(papers, [], variant, base, recipe, devices, store, registry, serving)
