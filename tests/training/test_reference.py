"""Training is what its parts' own authors would compute: PEFT's layers, one document at a time, plain cross-entropy."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from feyntune.model.load import load_base, load_tokenizer
from feyntune.model.packed import Packed, head, hidden_states, pack
from feyntune.training import train as recipe
from feyntune.training.batches import documents, global_batch, read_mixture
from feyntune.training.config import TARGETS
from feyntune.training.dropout import DropoutMasks
from feyntune.training.lora import fuse_lora
from feyntune.training.train import train
from tests.training.processes import curve

LORA = {"r": 8, "lora_alpha": 32, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("method", ["lora-all", "lora-qkv"])
def test_losses_and_weights_are_those_of_plain_pytorch(job, tiny_base, tiny_split, monkeypatch, method):
    made = job(method=method, lora_dropout=0.0, max_steps=5)
    config = made["config"]
    trained = {}
    write = recipe.write_adapter
    monkeypatch.setattr(
        recipe, "write_adapter", lambda model, *a: (trained.update(model.named_parameters()), write(model, *a))
    )
    train(**made)

    torch.manual_seed(config.seed)
    base = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(target_modules=TARGETS[method], **LORA))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.003, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 1, 5, min_lr_rate=0.01)
    examples, _ = documents(read_mixture(tiny_split, "hep-th", "train"), load_tokenizer(tiny_base), 256)
    losses = []
    for step in range(5):
        batch = global_batch(examples, 16, step, config.seed)
        nats = torch.zeros(())
        for document in batch:
            ids = torch.tensor([document.tokens])
            logits = model(input_ids=ids).logits[0, :-1]
            nats = nats + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss = nats / sum(len(d.tokens) - 1 for d in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    assert curve(made["out"])["loss"] == pytest.approx(losses, abs=2e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(trained[name], p, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("precision", "losses"),
    [
        ("fp32", [9.898607, 9.837188, 9.142029, 8.160759, 7.388152, 6.885081]),
        ("nf4", [9.830389, 9.767506, 9.054417, 8.054928, 7.268600, 6.772405]),
    ],
)
def test_losses_are_those_of_the_first_engine(job, precision, losses):
    """With dropout, as the engine had them before its layers were fused. The tolerance is for other kinds of CPUs."""
    made = job(precision=precision)
    train(**made)
    assert curve(made["out"])["loss"] == pytest.approx(losses, abs=1e-3)


class MaskedInput(torch.nn.Module):
    """Dropout in PEFT's place, by the masks of a document."""

    def __init__(self, masks: DropoutMasks, layer: int) -> None:
        super().__init__()
        self.masks, self.layer = masks, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.masks.keep(x, self.layer) / (1 - self.masks.p)


def loss_and_gradient(base: str, dtype: torch.dtype, fused: bool, batch: Packed) -> tuple[float, torch.Tensor]:
    """Of the bf16 base computing in `dtype`, by fused layers or by PEFT's, under an adapter that is not zero."""
    model = get_peft_model(load_base(base, "bf16", "cpu").to(dtype), LoraConfig(target_modules="all-linear", **LORA))
    generator = torch.Generator().manual_seed(0)
    weights = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    for p in weights:
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    masks = DropoutMasks(0.05)
    if fused:
        masks = fuse_lora(model, 0.05)
    else:
        layers = [m for _, m in sorted(model.named_modules()) if isinstance(m, LoraLayer)]
        for i, layer in enumerate(layers):
            layer.lora_dropout["default"] = MaskedInput(masks, i)
    masks.set(batch.lengths, range(len(batch.lengths)))
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = hidden_states(model, batch)
    logits = head(model)(hidden[batch.predicted]).float()
    loss = torch.nn.functional.cross_entropy(logits, batch.labels[0][batch.predicted])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in weights])  # type: ignore[union-attr]


def test_bf16_rounds_otherwise_than_peft_but_no_more(tiny_base, tiny_split):
    """Fused layers round once where PEFT rounds after each operation: losses differ, neither is nearer to fp32."""
    examples, _ = documents(read_mixture(tiny_split, "hep-th", "train"), load_tokenizer(tiny_base), 256)
    batch = pack([d.tokens for d in examples[:8]])
    loss, exact = loss_and_gradient(tiny_base, torch.float32, True, batch)
    peft_loss, same = loss_and_gradient(tiny_base, torch.float32, False, batch)
    assert loss == pytest.approx(peft_loss, abs=1e-5)
    assert (same - exact).norm() <= 1e-5 * exact.norm()

    errors = {}
    for fused in (True, False):
        rounded, gradient = loss_and_gradient(tiny_base, torch.bfloat16, fused, batch)
        assert rounded == pytest.approx(loss, abs=0.01)
        errors[fused] = ((gradient - exact).norm() / exact.norm()).item()
    assert errors[True] < 0.02
    assert errors[True] < 1.3 * errors[False]
