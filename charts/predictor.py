"""Writes feyntune/deployment/predictor.yaml, the chart's InferenceService as `feyntune deploy` applies it.

Two renderings, on CPUs and on GPUs. After a change of templates/serving.yaml: `python charts/predictor.py`; a test
compares.
"""

from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parent / "feyntune"
OUT = CHART.parents[1] / "feyntune" / "deployment" / "predictor.yaml"
HEAD = "# Made by charts/predictor.py from charts/feyntune/templates/serving.yaml: on CPUs, then on GPUs. Edit there.\n"


def predictor(serving: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The InferenceService that the chart renders with these values of `serving`, and of the chart's `others`."""
    values = {"serving": {"keysSecret": "keys", **serving}, "assumeAPIs": ["serving.kserve.io/v1beta1"]}
    values |= {"kubeflow": {"enabled": False}, **others}
    with helm_python.Chart.load(CHART) as chart:
        made = chart.render(values, name="feyntune", namespace="feyntune", is_install=True)
    text = next(text for name, text in made.items() if name.endswith("templates/serving.yaml"))
    rendered: dict[str, Any] = next(o for o in yaml.safe_load_all(text) if o["kind"] == "InferenceService")
    return rendered


def document() -> str:
    """The text of predictor.yaml."""
    both = [predictor({"gpus": 0}), predictor({"gpus": 1})]
    for rendered in both:
        del rendered["metadata"]["labels"]  # the release's
    return HEAD + yaml.safe_dump_all(both, sort_keys=False, width=110)


if __name__ == "__main__":
    OUT.write_text(document())
