"""The base model of the demonstration: small, whole, and what its command makes."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from feyntune.artifacts.artifact import ArtifactError, open_artifact, sha256_json
from feyntune.demo import DIGEST, SHIPPED, copy_demo_base
from feyntune.demo.make import STEPS, compare_with_shipped, demo_texts
from feyntune.errors import UserError
from feyntune.model.load import encode, load_base, prompt
from feyntune.training.tiny_base import make_tiny_base


def test_it_is_whole_and_small() -> None:
    manifest = open_artifact(SHIPPED, "base")
    assert manifest.digest == DIGEST
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 5e6
    assert (SHIPPED / "model.safetensors").stat().st_size < 4e6


def test_its_command_would_train_on_the_same_texts() -> None:
    manifest = open_artifact(SHIPPED, "base")
    assert manifest.inputs["texts"] == sha256_json([t for t in demo_texts() if t.strip()])
    assert manifest.config["steps"] == STEPS


def test_its_command_makes_the_same_tokenizer_and_configuration(tmp_path: Path) -> None:
    make_tiny_base(tmp_path / "base", demo_texts(), heads=4, kv_heads=2, steps=1, dtype=torch.bfloat16)
    for file in SHIPPED.iterdir():
        if file.name not in ("model.safetensors", "manifest.json"):
            assert (tmp_path / "base" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_base_made_again_is_told_from_another_one() -> None:
    shipped = open_artifact(SHIPPED, "base")
    assert compare_with_shipped(shipped) == "the same bytes as the shipped one"
    weights = {**shipped.files, "model.safetensors": shipped.files["config.json"]}
    near = shipped.model_copy(update={"digest": "0" * 64, "files": weights, "stats": {"loss": 1.534}})
    assert "rounding of this CPU (loss 1.5340" in compare_with_shipped(near)
    with pytest.raises(UserError, match=r"its loss is 2\.0000"):
        compare_with_shipped(near.model_copy(update={"stats": {"loss": 2.0}}))
    other = {**weights, "tokenizer.json": shipped.files["config.json"]}
    with pytest.raises(UserError, match=r"model\.safetensors, tokenizer\.json differ"):
        compare_with_shipped(near.model_copy(update={"files": other}))


def test_vllm_can_serve_it() -> None:
    model = load_base(str(SHIPPED), "bf16", "cpu")
    assert model.config.head_dim == 32
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert tokenizer("We study")["input_ids"] == prompt(tokenizer, "We study")
    assert encode(tokenizer, "We study")[:-1] == prompt(tokenizer, "We study")


def test_it_is_copied_once(tmp_path: Path) -> None:
    folder = copy_demo_base(tmp_path / "runs" / "base")
    assert open_artifact(folder, "base").digest == DIGEST
    marker = folder / "manifest.json"
    before = marker.stat().st_mtime_ns
    assert copy_demo_base(folder) == folder
    assert marker.stat().st_mtime_ns == before


def test_another_folder_in_its_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").touch()
    with pytest.raises(UserError, match="is not a base model"):
        copy_demo_base(tmp_path / "base")
    assert (tmp_path / "base" / "mine").exists()


def test_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "shipped"
    shutil.copytree(SHIPPED, damaged)
    (damaged / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr("feyntune.demo.SHIPPED", damaged)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        copy_demo_base(tmp_path / "base")
    assert not (tmp_path / "base").exists()
