"""The tiny base model of the demonstration: shipped in base/, made by `feyntune make-base` (make.py)."""

import shutil
from pathlib import Path

from feyntune.artifacts.artifact import is_artifact, open_artifact
from feyntune.errors import UserError

SHIPPED = Path(__file__).with_name("base")
DIGEST = "8cb57021690a7ec8ffed37f9aa6418af9637357a4fb2c7d36e9205f7632a0743"


def copy_demo_base(folder: Path) -> Path:
    """The shipped base model in `folder`, copied there unless a base is there already.

    Raises:
        UserError: `folder` is something else.
        ArtifactError: a shipped file is damaged.
    """
    if not is_artifact(folder):
        if folder.exists():
            raise UserError(f"{folder} is not a base model: move it, or use another --workdir.")
        open_artifact(SHIPPED, "base")
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(SHIPPED, partial)
        partial.rename(folder)
    return folder
