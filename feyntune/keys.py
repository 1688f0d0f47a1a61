"""The keys under which a recipe's results are kept, from what a pipeline passes between its steps.

No heavy imports: the step that looks for finished results runs in a second.
"""

import os
from typing import Any

from feyntune.artifacts.cache import evaluation_key, training_key
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.retention import source_digest
from feyntune.names import BASE, split_seed
from feyntune.training.config import adapter_metadata, parse_config


def variant_keys(split_digest: str, base: str, recipe: dict[str, Any], name: str) -> tuple[str | None, str]:
    """(training key, evaluation key) of a variant under `recipe`; the base model has no training key.

    A name with a seed (`hep-th/lora-qkv/seed1`) is the variant trained with that seed in place of the recipe's.

    Raises:
        UserError: a retention set cannot be read.
    """
    training = None
    if name != BASE:
        variant, seed = split_seed(name)
        mixture, _, method = variant.rpartition("/")
        train = recipe.get("train", {})
        metadata = adapter_metadata(parse_config(train if seed is None else {**train, "seed": seed}), mixture, method)
        training = training_key(split_digest, base, metadata)
    config = EvaluateConfig.model_validate({**recipe.get("evaluate", {}), "include_base": name == BASE})
    settings = config.model_dump(mode="json")
    if config.retention:  # by their content: a file can change under its name
        settings["retention"] = {n: source_digest(n, source) for n, source in config.retention.items()}
    return training, evaluation_key(split_digest, base, training, settings, name)


def last_attempt(retries: int) -> bool:
    """Whether Kubeflow will not retry this task again; True outside Kubeflow, where nothing retries."""
    return int(os.environ.get("KFP_RETRY_INDEX") or retries) >= retries
