import pytest
import torch

from feyntune.artifacts.artifact import open_artifact
from feyntune.errors import UserError
from feyntune.model.load import check_vocab_size, encode, load_base, load_tokenizer
from feyntune.training.tiny_base import BOS, EOS, PAD, make_tiny_base
from tests.conftest import texts

MINI = {"vocab": 300, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "context": 64, "steps": 4}


def test_the_base_is_sealed_and_loads_with_its_tokenizer(tiny_base):
    assert open_artifact(tiny_base, "base").stats["loss"] < 4.5  # an untrained one has log(512) = 6.2
    tokenizer, model = load_tokenizer(tiny_base), load_base(tiny_base, "fp32", "cpu")
    check_vocab_size(model, tokenizer, tiny_base)
    assert len({tokenizer.convert_tokens_to_ids(t) for t in (BOS, EOS, PAD)}) == 3
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)


def test_any_text_survives_the_tokenizer(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    text = "Let $g_{\\mu\\nu}$ be Schrödinger's metric: 日本 123."
    assert tokenizer.decode(encode(tokenizer, text), skip_special_tokens=True) == text


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    made = [
        make_tiny_base(tmp_path / str(i), texts("kitchen", 40), seed=seed, tokens_per_step=128, **MINI)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert made[0].digest == made[1].digest
    assert made[0].files["model.safetensors"] != made[2].files["model.safetensors"]


def test_the_number_of_threads_is_left_as_it_was(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_tiny_base(tmp_path / "b", texts("kitchen", 10), tokens_per_step=64, **MINI)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs texts"):
        make_tiny_base(tmp_path / "b", ["  "], **MINI)
