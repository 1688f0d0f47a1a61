import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from feyntune.artifacts.artifact import open_artifact
from feyntune.errors import UserError
from feyntune.model.load import encode, load_base, load_tokenizer
from feyntune.model.packed import ATTENTION, hidden_states, pack
from feyntune.training.batches import read_mixture
from feyntune.training.train import train
from tests.training.processes import curve


def perplexity(model, tokenizer, texts):
    nats, count = 0.0, 0
    for text in texts:
        packed = pack([encode(tokenizer, text)])
        with torch.no_grad():
            logits = model.get_output_embeddings()(hidden_states(model, packed)).float()
        nats += torch.nn.functional.cross_entropy(logits, packed.labels[0], reduction="sum").item()
        count += len(packed.labels[0]) - 1
    return math.exp(nats / count)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4"])
def test_an_adapter_learns_and_reloads_with_the_same_perplexity(job, tiny_base, tiny_split, precision):
    made = job(precision=precision, epochs=4, method="lora-qkv" if precision == "bf16" else "lora-all")
    manifest = train(**made)
    assert open_artifact(made["out"], "adapter") == manifest
    measured = [entry["perplexity"] for entry in curve(made["out"])["validation"]]
    assert [e["epoch"] for e in curve(made["out"])["validation"]] == [0, 1, 2, 3, 4]
    assert measured[-1] < 0.7 * measured[0]

    tokenizer = load_tokenizer(tiny_base)
    texts = [text for _, text in read_mixture(tiny_split, "hep-th", "validation", 6)]
    model = PeftModel.from_pretrained(load_base(tiny_base, precision, "cpu"), made["out"])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert perplexity(model, tokenizer, texts) == pytest.approx(
            measured[-1], rel=0.01 if precision == "bf16" else 1e-3
        )
    assert {w.dtype for w in load_file(made["out"] / "adapter_model.safetensors").values()} == {torch.float16}


def test_the_two_methods_adapt_the_layers_of_the_paper(job):
    for method, count in (("lora-qkv", 3), ("lora-all", 7)):
        made = job(out=method, method=method, max_steps=1)
        train(**made)
        weights = load_file(made["out"] / "adapter_model.safetensors")
        assert len(weights) == 2 * 2 * count  # layers, A and B
        settings = json.loads((made["out"] / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"], len(settings["target_modules"])) == (8, 32, count)


def test_the_test_split_is_never_looked_at(job, monkeypatch):
    asked = []
    from feyntune.training import train as recipe

    monkeypatch.setattr(
        recipe,
        "read_mixture",
        lambda data, mixture, split, most=None: asked.append(split) or read_mixture(data, mixture, split, most),
    )
    train(**job(max_steps=1))
    assert asked == ["train", "validation"]


def test_same_seed_same_bytes_and_nothing_of_the_machine_in_the_files(job, tiny_base):
    first, second, other = (train(**job(out=name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.digest == second.digest
    assert first.files["adapter_model.safetensors"] != other.files["adapter_model.safetensors"]
    for path in job(out="a")["out"].iterdir():
        if path.name in first.files:
            assert str(Path(tiny_base).parent).encode() not in path.read_bytes()


def test_checkpointed_layers_and_small_micro_batches_change_nothing(job):
    train(**job(out="plain"))
    train(**job(out="frugal", activation_checkpointing_layers=1, micro_batch_tokens=100, vocab_chunk_size=7))
    assert curve(job(out="plain")["out"])["loss"] == pytest.approx(curve(job(out="frugal")["out"])["loss"], abs=1e-5)


def test_the_steps_are_those_of_the_paper(job):
    made = job(epochs=3, global_batch_size=20)  # 48 papers: 3 batches an epoch, the last of 8
    train(**made)
    assert len(curve(made["out"])["loss"]) == 9
    rates = curve(made["out"])["learning_rate"]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(0.003)


def test_a_text_longer_than_the_context_is_split_and_counted(job):
    stats = train(**job(max_length=40, max_steps=2)).stats
    assert stats["papers_longer_than_context"] > 0
    assert stats["documents"] > stats["papers"] == 48


def test_a_loss_that_is_no_number_stops_the_run_with_step_papers_and_checkpoint(job, tmp_path, monkeypatch):
    from feyntune.training.runner import MicroBatchRunner

    real, calls = MicroBatchRunner.loss, []

    def poisoned(self, packed):
        calls.append(1)
        loss = real(self, packed)
        return loss * float("nan") if self.model.training and len(calls) > 12 else loss

    monkeypatch.setattr(MicroBatchRunner, "loss", poisoned)
    with pytest.raises(UserError, match=r"diverged at step \d+: loss nan.*hep-th/99.*checkpoint of step \d+ is kept"):
        train(**job(checkpoints=str(tmp_path / "store"), save_every_steps=1, epochs=6))
    assert not job()["out"].exists()


def test_bad_input_is_refused_with_the_reason(job, tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"no training papers.*hep-ph\+gr-qc, hep-th"):
        train(**job(mixture="cs"))
    with pytest.raises(UserError, match="unknown: choose one of lora-qkv, lora-all"):
        train(**job(method="lora"))
    with pytest.raises(UserError, match="max_length is 999"):
        train(**job(max_length=999))
    with pytest.raises(UserError, match="3, but 1 processes were started"):
        train(**job(devices=3))


def test_a_base_that_is_not_causal_is_refused(job, tiny_base, tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=600, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    )
    bert.save_pretrained(tmp_path / "bert")
    load_tokenizer(tiny_base).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"Base model .*bert"):
        train(**{**job(), "base": str(tmp_path / "bert")})


def test_a_base_that_changes_its_logits_is_refused(job, tiny_base, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(UserError, match="changes its logits"):
        train(**job())


def test_nf4_still_learns_after_an_evaluation(tiny_base):
    # bitsandbytes repacks weights for a CPU kernel without gradient when a layer runs in eval mode (common/models.py)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_base(tiny_base, "nf4", "cpu", ATTENTION), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    packed = pack([[5, 6, 7, 8, 9]])
    model.eval()
    with torch.no_grad():
        hidden_states(model, packed)
    model.train()
    hidden_states(model, packed).square().sum().backward()
    lowest = [p for n, p in model.named_parameters() if "layers.0." in n and "lora_B" in n]
    assert lowest
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lowest)
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())


def test_a_quantized_copy_of_the_base_trains_the_same_adapter(job, tiny_base, s3, tmp_path, monkeypatch):
    from feyntune.model.quantize import push_quantized

    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "cache"))
    pinned = push_quantized(tiny_base, f"{s3}/bases/llama")
    first = train(**job(out="original", precision="nf4", max_steps=3))
    second = train(**{**job(out="copy", precision="nf4", max_steps=3), "base": pinned})
    for file in ("curve.json", "adapter_model.safetensors"):
        assert first.files[file] == second.files[file]
    assert first.inputs == second.inputs
