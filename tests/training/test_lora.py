"""The fused LoRA layer is PEFT's, gradients included; and the fused norm is transformers'."""

import inspect

import pytest
import torch
import torch.nn.attention.varlen
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from feyntune.model import packed
from feyntune.model.load import load_base
from feyntune.model.packed import ATTENTION, hidden_states, pack
from feyntune.training.batches import Document
from feyntune.training.config import TrainConfig
from feyntune.training.lora import fuse_lora, fuse_norms
from feyntune.training.runner import add_adapter, make_runner
from feyntune.training.train import flat_gradient


class Two(torch.nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.a, self.b = torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(40, 16, bias=bias)

    def forward(self, x):
        return self.b(torch.nn.functional.silu(self.a(x)))


def make(bias=False):
    torch.manual_seed(0)
    model = get_peft_model(Two(bias), LoraConfig(r=4, lora_alpha=12, target_modules=["a", "b"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), {**gradients, "x": x.grad}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 24), (5, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_it_computes_what_peft_computes(bias, shape, dtype, tolerance):
    x = torch.randn(shape, dtype=dtype)
    expected, gradients = run(make(bias).to(dtype), x)
    fused = make(bias).to(dtype)
    fuse_lora(fused, 0.0)
    y, fused_gradients = run(fused, x)
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        atol = tolerance * gradient.abs().max().item()
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=0, atol=atol)


def test_dropout_is_on_the_lora_input_alone_and_only_in_training():
    x = torch.randn(1, 6, 24)
    model = make()
    masks = fuse_lora(model, 0.5)
    masks.set([6], [3])
    layer = model.base_model.model.a
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer(x) + 3 * 2 * (x * masks.keep(x, 0)) @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)
    model.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * x @ a.T @ b.T)


def test_the_gradient_with_dropout_is_that_of_the_same_mask():
    model = make().double()
    masks = fuse_lora(model, 0.3)
    masks.set([5], [9])
    x = torch.randn(1, 5, 24, dtype=torch.float64, requires_grad=True)
    layer = model.base_model.model.a
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *weights))


def test_torchs_own_dropout_gives_the_same_sum_and_gradient_as_its_mask():
    """What a GPU runs, seeded: drawn again for a layer that recomputes, it is the same mask."""
    model = make().double()
    masks = fuse_lora(model, 0.3)
    masks.framework = True
    masks.set([5], [9])
    x = torch.randn(1, 5, 24, dtype=torch.float64, requires_grad=True)
    layer = model.base_model.model.a
    a, b = weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    dropped, keep, gain = masks.apply(x, 0)
    assert torch.equal(keep, masks.apply(x, 0)[1])
    assert not torch.equal(keep, masks.apply(x, 1)[1])
    torch.testing.assert_close(dropped, gain * x * keep)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 * (x * keep / 0.7) @ a.T @ b.T)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *weights))


def test_a_disabled_adapter_is_the_base():
    model = make()
    fuse_lora(model, 0.1)
    x = torch.randn(2, 24)
    with model.disable_adapter():
        torch.testing.assert_close(
            model(x),
            model.base_model.model.b.base_layer(torch.nn.functional.silu(model.base_model.model.a.base_layer(x))),
        )


def test_torchs_norm_is_transformers_norm(tiny_base):
    batch = pack([[5, 6, 7, 8]])
    expected = hidden_states(load_base(tiny_base, "fp32", "cpu", ATTENTION), batch)
    model = load_base(tiny_base, "fp32", "cpu", ATTENTION)
    fuse_norms(model)
    torch.testing.assert_close(hidden_states(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_all_layers_share_the_boundaries_of_a_micro_batch_and_no_mask_is_built(tiny_base, monkeypatch):
    model = load_base(tiny_base, "bf16", "cpu", ATTENTION)
    seen = []

    real = inspect.signature(torch.nn.attention.varlen.varlen_attn)

    def varlen(q, k, v, cu_seqlens, *args, **kwargs):
        real.bind(q, k, v, cu_seqlens, *args, **kwargs)  # the kernel itself needs a GPU
        seen.append(cu_seqlens)
        return q

    monkeypatch.setattr(packed, "attention_backend", lambda device, dtype: "torch-varlen")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    searches = []
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *a: searches.append(a))
    batch = pack([[5, 6, 7], [8, 9]])
    hidden_states(model, batch)
    assert len(seen) == 2
    assert all(s is batch.cu_seqlens for s in seen)
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert batch.cu_seqlens.dtype == torch.int32
    assert not searches


def test_the_fused_norm_is_left_out_of_autocast(tiny_base, monkeypatch):
    """CUDA's autocast makes rms_norm compute in fp32 and return fp32, which every layer after it would cast again."""
    model = load_base(tiny_base, "bf16", "cpu", ATTENTION)
    fuse_norms(model)
    seen = []
    real = torch.nn.functional.rms_norm

    def rms_norm(x, *args):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype, real(x, *args).dtype))
        return real(x, *args)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", rms_norm)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states(model, pack([[5, 6, 7, 8]]))
    assert set(seen) == {(False, torch.bfloat16, torch.bfloat16)}


class Waits(TorchDispatchMode):
    """Counts the operations for which a host would wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.count = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"):
            self.count[name] = self.count.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_waits_for_nothing(tiny_base):
    config = TrainConfig(precision="fp32")
    model, masks = add_adapter(load_base(tiny_base, "fp32", "cpu", ATTENTION), "lora-all", config, "tiny")
    masks.framework = True
    fuse_norms(model)
    runner = make_runner(model, masks, "lora-all", config, torch.device("cpu"))
    gradient = flat_gradient([p for p in model.parameters() if p.requires_grad])
    documents = [Document(str(i), [5] * n) for i, n in enumerate((9, 4, 700, 600))]
    with Waits() as waits:
        runner.backward(documents, [1, 2, 3, 4], 1309, gradient)
    assert waits.count == {"nonzero": 2}  # once in pack, on the host, for each of two micro-batches
