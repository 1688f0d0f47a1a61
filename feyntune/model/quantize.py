"""A base model quantized to NF4 once, saved beside its original, in place of quantizing at every load."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from feyntune.artifacts.artifact import MANIFEST, Manifest, open_artifact, write_artifact
from feyntune.artifacts.store import push
from feyntune.model.base import QUANTIZED, push_base, quantized_copy, split_pin, stored_at
from feyntune.model.load import loading_shown, nf4


def push_quantized(folder: str | Path, address: str) -> str:
    """`push_base`, and a quantized copy beside it at ADDRESS-nf4, whose manifest names the original's digest.

    Steps that compute in NF4 then load the copy; base and pin stay the original's.
    """
    pinned = push_base(folder, address)
    location, digest = split_pin(pinned)
    if quantized_copy(location, str(digest)) is None:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "quantized"
            quantize_base(folder, copy, str(digest))
            store, name = stored_at(location + QUANTIZED)
            push(store, copy, name)
    return pinned


def quantize_base(folder: str | Path, out: str | Path, source: str) -> Manifest:
    """Write the model in `folder`, quantized, to `out`: kind `base`, with the original's digest as input `source`.

    Linear layers become NF4 with double quantization, as `load_base` quantizes them; the rest keeps its precision.
    Loaded, its weights are those of quantizing the original on load, bit for bit (tested on a CPU).
    """
    folder = Path(folder)
    with loading_shown("nf4"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            device_map={"": torch.device("cpu")},
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=nf4(torch.float32),
        )
    with write_artifact(out, "base", {"source": source}, {"precision": "nf4"}) as writer:
        model.save_pretrained(writer.path)
        for file in folder.iterdir():
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            made = (writer.path / file.name).exists() or file.name == MANIFEST
            if file.suffix in (".json", ".model", ".txt") and not weights and not made:
                shutil.copyfile(file, writer.path / file.name)
    return open_artifact(out, "base")
