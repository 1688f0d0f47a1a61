"""The keys under which a recipe's results are kept, from what a pipeline passes between its steps.

No heavy imports: the step that looks for finished results runs in a second.
"""

import os
from typing import Any

from feyntune.artifacts.cache import evaluation_key, training_key
from feyntune.evaluation.config import EvaluateConfig
from feyntune.names import BASE
from feyntune.training.config import adapter_metadata, parse_config


def variant_keys(split_digest: str, base: str, recipe: dict[str, Any], name: str) -> tuple[str | None, str]:
    """(training key, evaluation key) of a variant under `recipe`; the base model has no training key."""
    training = None
    if name != BASE:
        mixture, _, method = name.rpartition("/")
        metadata = adapter_metadata(parse_config(recipe.get("train", {})), mixture, method)
        training = training_key(split_digest, base, metadata)
    config = EvaluateConfig.model_validate({**recipe.get("evaluate", {}), "include_base": name == BASE})
    return training, evaluation_key(split_digest, base, training, config.model_dump(mode="json"), name)


def last_attempt(retries: int) -> bool:
    """Whether Kubeflow will not retry this task again; True outside Kubeflow, where nothing retries."""
    return int(os.environ.get("KFP_RETRY_INDEX") or retries) >= retries
