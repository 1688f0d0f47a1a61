"""Writes feyntune/deployment/predictor.yaml, the chart's InferenceService as `feyntune deploy` applies it.

Three renderings: on CPUs, on GPUs, and with vLLM. A test compares: after a change of templates/serving.yaml run
`python charts/predictor.py`.
"""

from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parent / "feyntune"
OUT = CHART.parents[1] / "feyntune" / "deployment" / "predictor.yaml"
HEAD = "# Made by charts/predictor.py from charts/feyntune/templates/serving.yaml: on CPUs, on GPUs, with vLLM.\n"


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
    renderings = [predictor({"gpus": 0}), predictor({"gpus": 1}), predictor({"gpus": 1, "engine": "vllm"})]
    for rendered in renderings:
        del rendered["metadata"]["labels"]  # the release's
    return HEAD + yaml.safe_dump_all(renderings, sort_keys=False, width=110)


if __name__ == "__main__":
    OUT.write_text(document())
