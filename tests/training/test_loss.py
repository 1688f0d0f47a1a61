import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.loss import peak_bytes
from feyntune.model.packed import IGNORE, hidden_states, pack
from feyntune.training.loss import frozen_head_loss


def make(tokens, width, words, dtype=torch.float32, bias=False, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    head = torch.nn.Linear(width, words, bias=bias, dtype=dtype).requires_grad_(False)
    return hidden, head, torch.randint(0, words, (tokens,))


def plain(hidden, head, labels):
    loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss, gradient


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 600), st.booleans(), st.integers(0, 99))
def test_the_loss_and_its_gradient_are_exact(tokens, words, bias, seed):
    hidden, head, labels = make(tokens, 32, 500, bias=bias, seed=seed)
    loss = frozen_head_loss(hidden, head, labels, words)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected, right = plain(hidden, head, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - right).norm() <= 1e-6 * right.norm()
    with torch.no_grad():
        assert frozen_head_loss(hidden, head, labels, words).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_gradient_is_scaled_with_what_comes_after():
    hidden, head, labels = make(9, 8, 50)
    (gradient,) = torch.autograd.grad(frozen_head_loss(hidden, head, labels, 4) / 7, hidden)
    assert torch.allclose(gradient, plain(hidden, head, labels)[1] / 7, atol=1e-7)


def test_in_bf16_the_sums_are_taken_in_fp32():
    hidden, head, labels = make(64, 32, 4000, torch.bfloat16)
    loss = frozen_head_loss(hidden, head, labels, 16)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected, right = plain(hidden, head, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - right).float().norm() <= 0.01 * right.float().norm()


def test_a_head_that_learns_is_refused():
    hidden, head, labels = make(4, 8, 10)
    with pytest.raises(ValueError, match="freeze it"):
        frozen_head_loss(hidden, head.requires_grad_(True), labels)
    with pytest.raises(ValueError, match="plain linear"):
        frozen_head_loss(hidden, torch.nn.Sequential(head), labels)


def test_logits_of_any_size_are_summed_without_overflow():
    """A running maximum, wherever in the vocabulary it rises, and labels on both sides of it."""
    hidden, head, labels = make(12, 8, 40)
    with torch.no_grad():
        head.weight[17] *= 1e4
    loss = frozen_head_loss(hidden, head, labels, 5)
    (gradient,) = torch.autograd.grad(loss, hidden)
    expected, right = plain(hidden, head, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - right).norm() <= 1e-6 * right.norm()


def test_a_twentieth_of_the_plain_memory_is_enough():
    """Llama-3's 128,256 words, with the shipped setting."""
    assert peak_bytes("plain", 1024, 64, 128_256) > 20 * peak_bytes("walk", 1024, 64, 128_256)


def test_packed_documents_give_the_loss_and_gradient_of_a_padded_batch(tiny_base):
    from transformers import AutoModelForCausalLM

    from feyntune.model.load import load_base

    r = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 300, (n,), generator=r).tolist() for n in (5, 17, 2, 30, 11)]
    count = sum(len(d) - 1 for d in documents)

    padded = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="sdpa")
    longest = max(map(len, documents))
    ids = torch.tensor([d + [2] * (longest - len(d)) for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in documents])
    labels = torch.where(mask > 0, ids, IGNORE)
    expected = padded(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
    expected.backward()

    model = load_base(tiny_base, "fp32", "cpu")
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    packed = pack(documents)
    real = packed.labels[0] != IGNORE
    loss = frozen_head_loss(hidden_states(model, packed)[real], model.lm_head, packed.labels[0][real], 16) / count
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(weight.grad, padded.model.layers[0].self_attn.q_proj.weight.grad, atol=1e-6)
