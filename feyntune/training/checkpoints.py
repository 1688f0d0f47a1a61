"""Checkpoints: sealed folders in a store, written in the background, the newest undamaged one found again.

    PREFIX/step-00000120-4f2a91/   state.safetensors   adapter, and AdamW's two moments, in fp32
                                   progress.json       position and curve so far

The ending is drawn anew for each save, so none is ever overwritten, not even a half-uploaded one. There are no
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
class State:
    """Where a training stands after `step` steps.

    Attributes:
        tensors: on the CPU, owned by this object alone.
        progress: plain JSON, a function of the training alone.
        stats: seconds so far and such; kept in the manifest, outside the digest.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]
    stats: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one training under a prefix of a store. One process saves."""

    def __init__(self, store: Store, prefix: str, inputs: dict[str, str], config: dict[str, Any], keep: int = 2):
        self.store, self.prefix, self.inputs, self.config, self.keep = store, prefix, inputs, config, keep
        self.good: list[str] = []  # known to be whole: the one resumed from, then those saved, oldest first
        self.saved_at: float | None = None  # time.monotonic() of the newest
        self._thread: threading.Thread | None = None

    def newest(self) -> State | None:
        """The newest checkpoint whose digest holds; damaged ones are passed over and logged.

        Raises:
            StoreError: the store stopped answering before one could be read.
        """
        away: StoreError | None = None
        for name in reversed(self._sealed()):
            try:
                with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
                    folder = Path(tmp) / "checkpoint"
                    manifest = pull(self.store, f"{self.prefix}/{name}", folder, kind="checkpoint")
                    tensors = load_file(folder / "state.safetensors")
                    progress = json.loads((folder / "progress.json").read_text())
            except (ArtifactError, StoreError) as e:
                log.warning("checkpoint %s is passed over for the one before it: %s", name, e)
                away = e if isinstance(e, StoreError) else away
                continue
            self.good = [name]
            self.saved_at = time.monotonic()
            return State(_step(name), tensors, progress, manifest.stats)
        if away is not None:
            raise away
        return None

    def save(self, state: State) -> None:
        """Start writing `state` in the background. Call it only when not `busy`."""
        assert not self.busy
        self._thread = threading.Thread(target=self._write, args=(state,), daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint known to be whole."""
        return _step(self.good[-1]) if self.good else None

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is being written; False if it takes longer than `seconds`."""
        if self._thread is not None:
            self._thread.join(max(seconds, 0))
        return not self.busy

    def clear(self) -> None:
        """Delete all, once what they led to is safe."""
        for name in list(self.store.names(f"{self.prefix}/")):
            self.store.delete(name)

    def _write(self, state: State) -> None:
        name = f"step-{state.step:08d}-{secrets.token_hex(3)}"
        try:
            with tempfile.TemporaryDirectory(prefix="feyntune-") as tmp:
                folder = Path(tmp) / "checkpoint"
                with write_artifact(folder, "checkpoint", self.inputs, self.config) as unsealed:
                    save_file(state.tensors, unsealed.path / "state.safetensors")
                    (unsealed.path / "progress.json").write_text(json.dumps(state.progress))
                    unsealed.stats |= state.stats
                push(self.store, folder, f"{self.prefix}/{name}")
            self.good.append(name)
            self.saved_at = time.monotonic()
            self._drop_old()
        except (StoreError, ArtifactError, OSError) as e:  # the run goes on; the next one is tried at its time
            log.warning("checkpoint of step %d was not saved: %s", state.step, e)

    def _drop_old(self) -> None:
        self.good = self.good[-self.keep :]
        names = list(self.store.names(f"{self.prefix}/"))
        for name in sorted(names, key=lambda n: not n.endswith(MANIFEST)):  # without a manifest it does not exist
            if name.removeprefix(f"{self.prefix}/").split("/")[0] not in self.good:
                self.store.delete(name)

    def _sealed(self) -> list[str]:
        """Names of the sealed ones, oldest first."""
        names = (n.removeprefix(f"{self.prefix}/") for n in self.store.names(f"{self.prefix}/"))
        found = (n.removesuffix(f"/{MANIFEST}") for n in names if n.endswith(f"/{MANIFEST}"))
        return sorted(n for n in found if _NAME.fullmatch(n))


def _step(name: str) -> int:
    match = _NAME.fullmatch(name)
    assert match is not None
    return int(match[1])
