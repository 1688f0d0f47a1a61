"""Compile the pipelines to YAML: `compiled/suite.yaml`, `compiled/variant.yaml`, and a CPU flavour of each.

feyntune compile            write compiled/*.yaml anew (a test fails when they are stale)
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from kfp import compiler

from pipelines import suite

COMPILED = Path(__file__).parent / "compiled"


def compile_all(folder: Path = COMPILED) -> Iterator[Path]:
    """Write the YAML of both pipelines in both flavours to `folder`, and give each file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for build in (suite.suite, suite.variant):
        for flavour in ("gpu", "cpu"):
            path = folder / f"{build.__name__}{'' if flavour == 'gpu' else '-cpu'}.yaml"
            with tempfile.TemporaryDirectory() as tmp:
                compiler.Compiler().compile(build(flavour), str(Path(tmp) / "pipeline.yaml"))
                spec, platform = yaml.load_all((Path(tmp) / "pipeline.yaml").read_text(), Loader=yaml.CSafeLoader)
            # The form's drop-down. The SDK that resolves with our other packages (2.17.0) cannot write it from a
            # `Literal` yet; the pipeline spec and servers from 2.17 on know the field.
            parameters = spec["root"]["inputDefinitions"]["parameters"]
            if "variant" in parameters:
                parameters["variant"]["literals"] = suite.VARIANTS
            path.write_text(
                "# Made by `feyntune compile`; edit pipelines/suite.py instead.\n"
                + yaml.safe_dump_all([spec, platform], sort_keys=True, width=110)
            )
            yield path
