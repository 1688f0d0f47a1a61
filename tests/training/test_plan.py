import pytest

from feyntune.errors import UserError
from feyntune.model.load import load_base
from feyntune.training.config import TrainConfig
from feyntune.training.estimate import flops_per_token, paper_variants, plan_variants, totals
from feyntune.training.memory import LLAMA_8B, Shape, adapter_parameters, base_bytes, plan, step_bytes

GB = 1e9


def test_sizes_are_those_of_the_models(tiny_base):
    model = load_base(tiny_base, "fp32", "cpu")
    assert Shape.of(model.config.to_dict()).parameters == model.num_parameters()
    assert LLAMA_8B.parameters == 8_030_261_248  # Llama 3.1's model card


def test_adapter_sizes_are_those_peft_makes(tiny_base):
    from peft import LoraConfig, get_peft_model

    from feyntune.training.config import TARGETS

    for method, targets in TARGETS.items():
        model = get_peft_model(load_base(tiny_base, "fp32", "cpu"), LoraConfig(r=8, target_modules=targets))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapter_parameters(Shape.of(model.config.to_dict()), method, 8) == count


def test_what_autograd_keeps_is_what_the_planner_says(tiny_base):
    import torch

    from feyntune.model.packed import hidden_states, pack
    from feyntune.training.memory import layer_bytes
    from feyntune.training.train import _with_adapter

    config = TrainConfig(precision="fp32", lora_dropout=0)
    model, _ = _with_adapter(load_base(tiny_base, "fp32", "cpu"), "lora-all", config, "tiny")
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def nbytes(tokens):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = hidden_states(model.train(), pack([[5] * tokens]))
        assert hidden.requires_grad
        return sum(kept.values())

    measured = (nbytes(200) - nbytes(100)) / 100
    shape = Shape.of(model.config.to_dict())
    expected = shape.layers * layer_bytes(shape, "lora-all", 0, "fp32")
    assert measured == pytest.approx(expected, rel=0.25)


def test_a_40_gb_card_recomputes_some_layers_and_a_large_one_none():
    small = plan(LLAMA_8B, "lora-all", TrainConfig(micro_batch_tokens=4096), 42.4 * GB)
    assert 0 < small.layers < 32
    assert small.bytes < 42.4 * GB
    assert plan(LLAMA_8B, "lora-all", TrainConfig(micro_batch_tokens=4096), 150 * GB).layers == 0


def test_a_device_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="take a larger device"):
        plan(LLAMA_8B, "lora-all", TrainConfig(), 6 * GB)


def test_each_recomputing_layer_saves_memory_and_costs_work():
    config = TrainConfig()
    needs = [step_bytes(LLAMA_8B, "lora-all", config, 4096, n) for n in range(1, 33)]
    assert needs == sorted(needs, reverse=True)
    assert flops_per_token(LLAMA_8B, 32) == pytest.approx(44e9, rel=0.01)
    assert flops_per_token(LLAMA_8B, 0) == pytest.approx(30e9, rel=0.01)
    assert base_bytes(LLAMA_8B, "nf4") == pytest.approx(5.7 * GB, rel=0.02)


def test_the_twenty_variants_on_three_a100():
    rows = plan_variants(paper_variants(), "a100-40gb", devices=3, price=2.0)
    total = totals(rows)
    assert total["variants"] == 20
    assert total["tokens"] == pytest.approx(1.8e9, rel=0.02)
    assert {r.variant: r.steps for r in rows}["hep-th/lora-all"] == 18_444  # as published
    assert total["money"] == pytest.approx(2 * total["gpu_hours"], abs=1)
    assert total["gpu_hours"] == pytest.approx(3 * total["hours"])
    assert total["published_gpu_hours"] > 5 * total["gpu_hours"]


def test_a_measured_throughput_counts():
    (row,) = plan_variants({"hep-th/lora-qkv": 1000}, "h200", 1, tokens_per_paper=100, tokens_per_second=1000)
    assert row.tokens == 63 * 4 / 63 * 1000 * 100
    assert row.gpu_hours == pytest.approx(400 / 3600)
    with pytest.raises(UserError, match="a100-40gb"):
        plan_variants({}, "abacus")
