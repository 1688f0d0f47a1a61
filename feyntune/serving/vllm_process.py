"""A vLLM server as a child process, reached through a socket in a folder that only this user may enter.

vLLM checks no key on most of its paths and loads whatever folder it is told to: nobody but the engine may reach it.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from feyntune.engine.api import EngineSettings
from feyntune.engine.lora import TARGETS
from feyntune.errors import UserError

BASE = "base"  # vLLM's name of the base
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_PRECISION = {
    "fp32": ["--dtype=float32"],
    "bf16": ["--dtype=bfloat16"],
    "nf4": ["--dtype=bfloat16", "--quantization=bitsandbytes"],
}
_SECRETS = ("AWS_", "S3_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # it reads local files and needs none


class VllmProcess:
    """Started, and started again, by `vllm_engine.VllmEngine`.

    Args:
        command: what runs vLLM's command line, such as ["vllm"].
        base: folder of the base model.
        max_length: most tokens of one request.
        arguments: further options of `vllm serve`; they come last, so they win.
    """

    def __init__(
        self,
        command: Sequence[str],
        base: str,
        precision: str,
        settings: EngineSettings,
        max_length: int,
        arguments: Sequence[str] = (),
    ):
        if shutil.which(command[0]) is None:
            raise UserError(
                f"There is no command {command[0]}: the vllm engine needs vLLM installed. Use the image "
                "predictor-vllm, or name the command with --vllm-command."
            )
        self.folder = Path(tempfile.mkdtemp(prefix="feyntune-vllm-"))  # mode 0700
        self.socket = self.folder / "socket"
        self.adapters = self.folder / "adapters"
        self.command = [
            *(*command, "serve", base, f"--uds={self.socket}", f"--served-model-name={BASE}"),
            *_PRECISION[precision],
            f"--max-model-len={max_length}",
            f"--max-num-seqs={settings.batch_requests}",
            f"--max-num-batched-tokens={max(settings.batch_tokens, settings.batch_requests)}",
            "--enable-lora",
            f"--max-loras={settings.max_adapters}",
            # Never fewer: vLLM ends when it must read an adapter again whose folder has gone.
            f"--max-cpu-loras={settings.max_adapters}",
            f"--max-lora-rank={next((r for r in _RANKS if r >= settings.max_rank), _RANKS[-1])}",
            # Without lm_head, which no adapter here changes: prompt log probabilities beside other requests end vLLM
            # where LoRA is on the head (vllm-project/vllm issues 16668 and 51594).
            *("--lora-target-modules", *TARGETS),
            "--generation-config=vllm",  # defaults of the model's own must not change what a request asks for
            "--disable-uvicorn-access-log",
            *arguments,
        ]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_SECRETS)}
        environment |= {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "HF_HUB_OFFLINE": "1",
        }
        # Its log goes where ours does.
        self._process = subprocess.Popen(self.command, env=environment, start_new_session=True, stdout=2)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self, seconds: float = 20.0) -> None:
        """End it and the processes it started."""
        if self._process is None:
            return
        for sig in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sig)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
