"""Checkpoints: artifacts in a store, written in the background; the newest undamaged one is loaded.

    PREFIX/step-00000120-4f2a91/   state.safetensors   adapter, and AdamW's two moments, in fp32
                                   progress.json       position and curve so far

The suffix is random, so none is ever overwritten, not even a half-uploaded one. There are no
random states in them: the order of the data and dropout are functions of the seed and the step.
"""

import json
import re
import secrets
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from feyntune.artifacts.artifact import MANIFEST, ArtifactError, write_artifact
from feyntune.artifacts.store import Store, StoreError, pull, push
from feyntune.telemetry import log

_NAME = re.compile(r"step-(\d{8})-[0-9a-f]{6}")


@dataclass
class Checkpoint:
    """The state of a training after `step` steps.

    Attributes:
        tensors: on the CPU, owned by this object alone.
        progress: plain JSON, a function of the training alone.
        stats: seconds so far and such; kept in the manifest, outside the digest.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]
    stats: dict[str, Any] = field(default_factory=dict)


class Checkpointer:
    """The checkpoints of one training under a prefix of a store. One process saves."""

    def __init__(self, store: Store, prefix: str, inputs: dict[str, str], config: dict[str, Any], keep: int = 2):
        self.store, self.prefix, self.inputs, self.config, self.keep = store, prefix, inputs, config, keep
        self.valid: list[str] = []  # known to be undamaged: the one resumed from, then those saved, oldest first
        self.saved_at: float | None = None  # time.monotonic() of the newest
        self._thread: threading.Thread | None = None

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint whose digest holds; damaged ones are skipped and logged.

        Raises:
            StoreError: the store stopped answering before one could be read.
        """
        store_error: StoreError | None = None
        for name in reversed(self._names()):
            try:
                with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
                    folder = Path(tmp) / "checkpoint"
                    manifest = pull(self.store, f"{self.prefix}/{name}", folder, kind="checkpoint")
                    tensors = load_file(folder / "state.safetensors")
                    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            except (ArtifactError, StoreError) as e:
                log.warning("checkpoint %s is skipped for the one before it: %s", name, e)
                store_error = e if isinstance(e, StoreError) else store_error
                continue
            self.valid = [name]
            self.saved_at = time.monotonic()
            return Checkpoint(_step(name), tensors, progress, manifest.stats)
        if store_error is not None:
            raise store_error
        return None

    def save(self, state: Checkpoint) -> None:
        """Start writing `state` in the background. Call it only when not `busy`."""
        assert not self.busy
        self._thread = threading.Thread(target=self._write, args=(state,), daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint known to be undamaged."""
        return _step(self.valid[-1]) if self.valid else None

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is being written; False if it takes longer than `seconds`."""
        if self._thread is not None:
            self._thread.join(max(seconds, 0))
        return not self.busy

    def clear(self) -> None:
        """Delete all of them, once the adapter is in the store."""
        for name in list(self.store.names(f"{self.prefix}/")):
            self.store.delete(name)

    def _write(self, state: Checkpoint) -> None:
        name = f"step-{state.step:08d}-{secrets.token_hex(3)}"
        try:
            with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
                folder = Path(tmp) / "checkpoint"
                with write_artifact(folder, "checkpoint", self.inputs, self.config) as writer:
                    save_file(state.tensors, writer.path / "state.safetensors")
                    (writer.path / "progress.json").write_text(json.dumps(state.progress), encoding="utf-8")
                    writer.stats |= state.stats
                push(self.store, folder, f"{self.prefix}/{name}")
            self.valid.append(name)
            self.saved_at = time.monotonic()
            self._drop_old()
        except (StoreError, ArtifactError, OSError) as e:  # training continues; the next one is tried in time
            log.warning("checkpoint of step %d was not saved: %s", state.step, e)

    def _drop_old(self) -> None:
        self.valid = self.valid[-self.keep :]
        names = list(self.store.names(f"{self.prefix}/"))
        for name in sorted(names, key=lambda n: not n.endswith(MANIFEST)):  # without a manifest it does not exist
            if name.removeprefix(f"{self.prefix}/").split("/")[0] not in self.valid:
                self.store.delete(name)

    def _names(self) -> list[str]:
        """Names of the complete ones, oldest first."""
        names = (n.removeprefix(f"{self.prefix}/") for n in self.store.names(f"{self.prefix}/"))
        complete = (n.removesuffix(f"/{MANIFEST}") for n in names if n.endswith(f"/{MANIFEST}"))
        return sorted(n for n in complete if _NAME.fullmatch(n))


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])
