"""FeynTune: domain-adapted language models from arXiv abstracts.

What a notebook needs, imported when it is first used: `feyntune.train(...)` is `feyntune.training.launch.launch`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feyntune.evaluation.compare import compare
    from feyntune.evaluation.evaluate import evaluate
    from feyntune.ingestion.ingest import ingest
    from feyntune.registry.register import register
    from feyntune.registry.registry import Registry
    from feyntune.serving.serve import serve
    from feyntune.splitting.split import split
    from feyntune.training.launch import launch as train

    __version__: str

__all__ = ["Registry", "__version__", "compare", "evaluate", "ingest", "register", "serve", "split", "train"]

_WHERE = {
    "ingest": ("feyntune.ingestion.ingest", "ingest"),
    "split": ("feyntune.splitting.split", "split"),
    "train": ("feyntune.training.launch", "launch"),
    "evaluate": ("feyntune.evaluation.evaluate", "evaluate"),
    "compare": ("feyntune.evaluation.compare", "compare"),
    "register": ("feyntune.registry.register", "register"),
    "serve": ("feyntune.serving.serve", "serve"),
    "Registry": ("feyntune.registry.registry", "Registry"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("feyntune")
    if name not in _WHERE:
        raise AttributeError(f"module 'feyntune' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
