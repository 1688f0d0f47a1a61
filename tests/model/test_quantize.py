"""A quantized copy in the store is what quantizing the original on load gives, and is loaded in its place."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from feyntune.artifacts.artifact import read_manifest
from feyntune.artifacts.store import open_store, stored_manifest
from feyntune.errors import UserError
from feyntune.model import base as bases
from feyntune.model.base import fetch_base, pin_base, push_base, split_pin
from feyntune.model.load import load_base, load_tokenizer
from feyntune.model.packed import ATTENTION, hidden_states, pack
from feyntune.model.quantize import push_quantized


@pytest.fixture(params=["float32", "bfloat16"])
def original(request, tiny_base, tmp_path):
    """A model folder whose weights have 32 or, as Llama's, 16 bits."""
    if request.param == "float32":
        return tiny_base
    folder = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(tiny_base).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(model):
    """Everything that a forward pass reads, quantization states unfolded."""
    result = {}
    for name, parameter in model.named_parameters():
        result[name] = parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            result |= {
                f"{name}.absmax": state.absmax,
                f"{name}.nested": state.state2.absmax,
                f"{name}.code": state.code,
            }
            result[f"{name}.offset"] = state.offset
            assert (state.dtype, state.blocksize, state.quant_type) == (torch.float32, 64, "nf4")
    return result


def test_a_quantized_copy_has_the_bits_of_quantizing_on_load(original, s3, cache):
    pinned = push_quantized(original, f"{s3}/bases/llama")
    assert pinned == pin_base(f"{s3}/bases/llama")  # base and pin stay the original's
    copy = fetch_base(pinned, "nf4")
    assert read_manifest(copy).inputs == {"source": split_pin(pinned)[1]}
    assert read_manifest(copy).config == {"precision": "nf4"}

    loaded, quantized = load_base(pinned, "nf4", "cpu", ATTENTION), load_base(original, "nf4", "cpu", ATTENTION)
    expected = tensors(quantized)
    assert sum(name.endswith(".absmax") for name in expected) == 14
    assert tensors(loaded).keys() == expected.keys()
    for name, value in tensors(loaded).items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    batch = pack([[5, 6, 7, 8, 9]])
    assert torch.equal(hidden_states(loaded, batch), hidden_states(quantized, batch))


def test_only_the_copy_is_fetched_for_nf4_and_only_the_original_otherwise(tiny_base, s3, cache, monkeypatch):
    pinned = push_quantized(tiny_base, f"{s3}/bases/llama")
    fetched = []
    real = bases.pull

    def pull(store, name, folder, *args, **options):
        fetched.append((name, "only" in options))
        return real(store, name, folder, *args, **options)

    monkeypatch.setattr(bases, "pull", pull)
    load_tokenizer(pinned)
    load_base(pinned, "nf4", "cpu")
    assert fetched == [("llama", True), ("llama-nf4", False)]
    tokenizers = [p for p in cache.iterdir() if p.is_dir() and not list(p.glob("*.safetensors"))]
    assert len(tokenizers) == 1
    load_base(pinned, "fp32", "cpu")
    load_base(pinned, "nf4", "cpu")
    load_tokenizer(pinned)
    assert fetched[2:] == [("llama", False)]  # everything else is in the cache


def test_nothing_is_quantized_twice(tiny_base, s3, monkeypatch):
    push_base(tiny_base, f"{s3}/bases/llama")
    pinned = push_quantized(tiny_base, f"{s3}/bases/llama")
    monkeypatch.setattr("feyntune.model.quantize.quantize_base", lambda *args: pytest.fail("quantized again"))
    assert push_quantized(tiny_base, f"{s3}/bases/llama") == pinned


def test_a_copy_of_another_model_is_not_used(tiny_base, original, s3, monkeypatch, caplog):
    pinned = push_quantized(tiny_base, f"{s3}/bases/llama")
    monkeypatch.setattr(bases.log, "propagate", True)
    store = open_store(f"{s3}/bases")
    manifest = stored_manifest(store, "llama-nf4")
    assert manifest is not None
    assert bases.quantized_copy(f"{s3}/bases/llama", "0" * 64) is None
    assert "is not a copy of" in caplog.text
    assert bases.quantized_copy(f"{s3}/bases/llama", split_pin(pinned)[1]) == manifest


def test_a_quantized_folder_is_refused_in_another_precision(tiny_base, s3):
    pinned = push_quantized(tiny_base, f"{s3}/bases/llama")
    copy = fetch_base(pinned, "nf4")
    assert load_base(copy, "nf4", "cpu").num_parameters() > 0  # named directly it works too
    with pytest.raises(UserError, match="is quantized: set precision to nf4"):
        load_base(copy, "fp32", "cpu")


def test_a_cache_that_cannot_be_written_is_left_for_the_temporary_folder(tiny_base, s3, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(bases.log, "propagate", True)
    folder = fetch_base(push_base(tiny_base, f"{s3}/bases/llama"))
    assert folder.startswith(str(tmp_path / "feyntune-cache"))
    assert "cannot be written" in caplog.text
