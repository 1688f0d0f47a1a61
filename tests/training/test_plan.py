import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.errors import UserError
from feyntune.model.load import load_base
from feyntune.model.packed import group_by_token_budget
from feyntune.training.batches import Document, divide, global_batch, largest_micro_batch
from feyntune.training.config import TARGETS, TrainConfig
from feyntune.training.estimate import flops_per_token, paper_variants, plan_variants, totals
from feyntune.training.memory import (
    LLAMA_8B,
    MemoryPlan,
    Shape,
    adapter_parameters,
    base_bytes,
    layer_bytes,
    plan,
    step_bytes,
)
from feyntune.training.roofline import plan_layouts
from feyntune.training.runner import add_adapter, make_runner
from feyntune.training.train import flat_gradient

GB = 1e9


def test_sizes_are_those_of_the_models(tiny_base):
    model = load_base(tiny_base, "fp32", "cpu")
    assert Shape.of(model.config.to_dict()).parameters == model.num_parameters()
    assert LLAMA_8B.parameters == 8_030_261_248  # Llama 3.1's model card


def test_adapter_sizes_are_those_peft_makes(tiny_base):
    from peft import LoraConfig, get_peft_model

    for method, targets in TARGETS.items():
        model = get_peft_model(load_base(tiny_base, "fp32", "cpu"), LoraConfig(r=8, target_modules=targets))
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapter_parameters(Shape.of(model.config.to_dict()), method, 8) == count


def kept_bytes_per_token(base, method, dropout, precision, framework):
    """What autograd keeps of a packed batch per token, over all layers; in one storage, counted once."""
    from feyntune.model.packed import hidden_states, pack

    config = TrainConfig(precision=precision, lora_dropout=dropout)
    model, masks = add_adapter(load_base(base, precision, "cpu"), method, config, "tiny")
    masks.framework = framework
    fuse_norms_without_copies(model)
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def nbytes(tokens):
        saved.clear()
        masks.set([tokens], [1])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(precision):
            hidden = hidden_states(model.train(), pack([[5] * tokens]))
        assert hidden.requires_grad
        return sum(saved.values())

    return (nbytes(200) - nbytes(100)) / 100, Shape.of(model.config.to_dict())


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def fuse_norms_without_copies(model):
    """What the fused norm of a GPU keeps: its input and one value a token. A CPU's keeps copies."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            ctx.save_for_backward(x, x.float().square().mean(-1))
            return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: Norm.apply(x, m.weight, m.variance_epsilon)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("dropout", "framework"), [(0, False), (0.05, False), (0.05, True)])
@pytest.mark.parametrize("method", ["lora-all", "lora-qkv"])
def test_what_autograd_keeps_is_what_the_planner_says(tiny_base, method, dropout, framework, precision):
    measured, shape = kept_bytes_per_token(tiny_base, method, dropout, precision, framework)
    value = 4 if precision == "fp32" else 2
    # What a CPU's attention keeps beyond a GPU's: keys and values repeated for their heads, documents concatenated.
    extra = 2 * (shape.hidden - shape.kv) + (shape.hidden if method == "lora-all" else 0)
    extra += 8 * len(TARGETS[method]) + 2 * shape.hidden // shape.heads // shape.layers  # rank values; cos and sin
    expected = shape.layers * (layer_bytes(shape, method, dropout, precision) + extra * value)
    assert measured == pytest.approx(expected, rel=0.1)


def test_documents_of_one_abstract_in_three_never_recompute_on_a_40_gb_card():
    papers = [Document(str(i), [0] * 571) for i in range(16)]
    largest = sum(len(d.tokens) for d in largest_micro_batch(papers, 16, 4, 0, 3, 8192))
    assert largest == 6 * 571
    assert plan(LLAMA_8B, "lora-qkv", TrainConfig(), 42.4 * GB, largest).layers == 0
    average = [Document(str(i), [0] * 185) for i in range(16)]
    tokens = sum(len(d.tokens) for d in largest_micro_batch(average, 16, 4, 0, 3, 8192))
    assert plan(LLAMA_8B, "lora-all", TrainConfig(), 42.4 * GB, tokens).layers == 0


def test_a_micro_batch_recomputes_only_what_its_own_tokens_need():
    made = plan(LLAMA_8B, "lora-all", TrainConfig(), 42.4 * GB)
    layers = [made.layers_for(n) for n in (1000, 3000, 5000, 8192)]
    assert layers == sorted(layers)
    assert layers[0] == 0
    assert layers[-1] == made.layers > 0
    fixed = plan(LLAMA_8B, "lora-all", TrainConfig(activation_checkpointing_layers=3), 150 * GB)
    assert fixed.layers_for(10) == fixed.layers_for(8000) == 3


class Card:
    """A runner on a card with room for `room` tokens of a layer that recomputes nothing, less than the plan thinks."""

    def __init__(self, base, room):
        torch.manual_seed(0)
        config = TrainConfig(precision="fp32", lora_dropout=0)
        model, masks = add_adapter(load_base(base, "fp32", "cpu"), "lora-all", config, "tiny")
        self.gradient = flat_gradient([p for p in model.parameters() if p.requires_grad])
        self.runner = make_runner(model, masks, "lora-all", config, torch.device("cpu"))
        self.runner.plan = MemoryPlan(4096, 0, 1.0, (4096.0, 8192.0, 16384.0))
        self.tried = []
        real = self.runner.loss

        def loss(packed):
            tokens = sum(packed.lengths)
            layers = self.runner.plan.layers_for(tokens)
            self.tried.append((tokens, layers))
            if tokens > room * 2**layers:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(packed)

        self.runner.loss = loss

    def backward(self, documents):
        self.runner.backward(documents, [0] * len(documents), 100, self.gradient)
        return self.gradient.clone()


def test_out_of_memory_lowers_the_plan_and_the_gradient_is_the_same(tiny_base):
    documents = [Document(str(i), [5 + i] * 200) for i in range(4)]
    expected = Card(tiny_base, 4096).backward(documents)
    recomputing = Card(tiny_base, 500)
    torch.testing.assert_close(recomputing.backward(documents), expected)
    assert recomputing.tried[0] == (800, 0)
    assert recomputing.tried[-1] == (800, 1)  # whole, with one layer recomputing
    assert recomputing.runner.plan.layers == 1
    split = Card(tiny_base, 110)  # not even with all layers recomputing
    torch.testing.assert_close(split.backward(documents), expected)
    assert max(tokens for tokens, _ in split.tried[-2:]) == 400
    assert split.runner.plan.layers == 2


def test_what_ran_out_of_memory_in_its_backward_pass_is_freed_before_the_next_try(tiny_base):
    card = Card(tiny_base, 4096)
    real, made = card.runner.loss, []

    def loss(packed):
        assert all(made_before() is None for made_before in made)
        activations = torch.ones(())  # which the graph holds
        value = real(packed) * activations
        if not made:
            value.register_hook(fail)
        made.append(weakref.ref(activations))
        return value

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    card.runner.loss = loss
    card.backward([Document(str(i), [5 + i] * 200) for i in range(4)])
    assert len(made) == 2


def test_the_probe_lowers_the_plan_before_the_first_step_and_leaves_no_gradient(tiny_base):
    card = Card(tiny_base, 500)
    card.runner.probe([Document(str(i), [5] * 200) for i in range(4)], card.gradient)
    assert card.runner.plan.layers == 1
    assert not card.gradient.any()
    card.tried.clear()
    card.backward([Document("0", [5] * 780)])
    assert card.tried == [(780, 1)]


def test_one_document_that_does_not_fit_is_an_error(tiny_base):
    with pytest.raises(UserError, match="out of memory with 600 tokens at once"):
        Card(tiny_base, 20).backward([Document("0", [5] * 600), Document("1", [5] * 600)])


def test_a_fixed_number_of_layers_stays_and_the_tokens_are_halved(tiny_base):
    card = Card(tiny_base, 500)
    card.runner.plan = MemoryPlan(4096, 0)
    card.backward([Document(str(i), [5] * 200) for i in range(4)])
    assert (card.runner.plan.micro_batch_tokens, card.runner.plan.layers) == (400, 0)


@given(st.lists(st.integers(2, 500), min_size=1, max_size=40), st.integers(1, 3), st.integers(100, 2000))
@settings(max_examples=30, deadline=None)
def test_the_largest_micro_batch_is_that_of_the_schedule(lengths, parts, budget):
    papers = [Document(str(i), [0] * n) for i, n in enumerate(lengths)]
    steps = 2 * -(-len(papers) // 16)
    sizes = []
    for step in range(steps):
        batch = [len(d.tokens) for d in global_batch(papers, 16, step, 0)]
        for part in divide(batch, parts):
            groups = group_by_token_budget([batch[i] for i in part], budget)
            sizes += [sum(batch[part[i]] for i in g) for g in groups]
    assert sum(len(d.tokens) for d in largest_micro_batch(papers, 16, steps, 0, parts, budget)) == max(sizes)


def test_a_40_gb_card_recomputes_some_layers_and_a_large_one_none():
    small = plan(LLAMA_8B, "lora-all", TrainConfig(micro_batch_tokens=8192), 42.4 * GB)
    assert 0 < small.layers < 32
    assert small.bytes < 42.4 * GB
    assert plan(LLAMA_8B, "lora-all", TrainConfig(micro_batch_tokens=8192), 150 * GB).layers == 0


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
    assert total["tokens"] == pytest.approx(1.96e9, rel=0.01)
    assert {r.variant: r.steps for r in rows}["hep-th/lora-all"] == 18_444  # as published
    assert total["money"] == pytest.approx(2 * total["gpu_hours"], abs=1)
    assert total["gpu_hours"] == pytest.approx(3 * total["hours"])
    assert total["published_gpu_hours"] > 5 * total["gpu_hours"]


@pytest.mark.parametrize("rate", [None, 4000.0])
def test_the_table_and_the_layouts_count_the_same_tokens_and_hours(rate):
    total = totals(plan_variants(paper_variants(), "a100-40gb", devices=3, tokens_per_second=rate))
    layouts = {x.name: x for x in plan_layouts(paper_variants(), "a100-40gb", 3, tokens_per_second=rate)}
    together, alone = layouts["all 3 GPUs a variant"], layouts["one GPU a variant"]
    assert total["hours"] == pytest.approx(together.hours, rel=1e-3)
    assert total["gpu_hours"] == pytest.approx(together.gpu_hours, rel=1e-3)
    for layout in (together, alone):
        assert layout.gpu_hours * 3600 * layout.tokens_per_second == pytest.approx(total["tokens"], rel=1e-3)
    single = totals(plan_variants(paper_variants(), "a100-40gb", devices=1, tokens_per_second=rate))
    assert single["gpu_hours"] == pytest.approx(alone.gpu_hours, rel=1e-3)


def test_a_measured_throughput_counts():
    (row,) = plan_variants({"hep-th/lora-qkv": 1000}, "h200", 1, tokens_per_second=1000)
    assert row.tokens == 4 * 1000 * 185
    assert row.gpu_hours == pytest.approx(740 / 3600)
    with pytest.raises(UserError, match="a100-40gb"):
        plan_variants({}, "abacus")
