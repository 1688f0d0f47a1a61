"""Which extra of the package brings a module that is not installed."""

import importlib.metadata
import re

# Extras in the order in which a person needs them: the pipeline on this machine, then the endpoint.
EXTRAS = ("run", "serve")


def missing_extra(error: ModuleNotFoundError, verb: str) -> str | None:
    """One sentence for a dependency of feyntune that is not installed; None where another module is missing.

    Args:
        verb: the command that was given, such as `serve`.
    """
    module = (error.name or "").partition(".")[0]
    distribution = {"grpc": "grpcio", "multipart": "python-multipart"}.get(module, module).replace("_", "-").lower()
    declared = importlib.metadata.requires("feyntune") or []
    names = {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].replace("_", "-").lower() for line in declared}
    if distribution not in names - {"feyntune"}:
        return None
    extra = {"serve": EXTRAS[1], "tasks": "tasks"}.get(verb, EXTRAS[0])
    return f"{module} is not installed, which this command needs: pip install 'feyntune[{extra}]'."
