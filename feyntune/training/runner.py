"""Forward and backward of micro-batches: the adapter on its base, dropout seeds, recomputation, loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from feyntune.errors import UserError
from feyntune.model.packed import Packed, backbone, group_by_token_budget, head, hidden_states, pack
from feyntune.telemetry import log
from feyntune.training.batches import Document
from feyntune.training.config import TARGETS, TrainConfig
from feyntune.training.dropout import DropoutMasks
from feyntune.training.lora import fuse_lora, fuse_norms
from feyntune.training.loss import CPU_VOCAB_CHUNK, frozen_head_loss
from feyntune.training.memory import GPU_VOCAB_CHUNK, MemoryPlan, plan_memory

MIN_BUDGET = 256  # tokens: below this a smaller micro-batch saves too little memory to try


def add_adapter(model: PreTrainedModel, method: str, config: TrainConfig, base: str) -> tuple[PeftModel, DropoutMasks]:
    """The base with a fresh fp32 adapter. Nothing else is cast: embeddings and head keep their precision."""
    names = model.config.architectures or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        kind = ", ".join(names) or "model without an architecture"
        raise UserError(f"Base model {base} is a {kind}, not a causal language model.")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=TARGETS[method],
        task_type="CAUSAL_LM",
    )
    try:
        peft = get_peft_model(model, lora)
    except ValueError as e:
        raise UserError(
            f"Base model {base} has no layers named {', '.join(TARGETS[method])}: {method} needs them."
        ) from e
    return peft, fuse_lora(peft, config.lora_dropout)


@dataclass
class MicroBatchRunner:
    """Computes micro-batches on one device.

    Attributes:
        plan: tokens at once and layers that recompute; lowered when the GPU runs out of memory.
        vocab_chunk_size: vocabulary entries whose logits exist at once.
        autocast: bf16 products of the fp32 adapters.
    """

    model: PeftModel
    device: torch.device
    masks: DropoutMasks
    plan: MemoryPlan
    vocab_chunk_size: int
    autocast: bool
    layers: list[Any] = field(default_factory=list)  # decoder layers, if any may recompute

    def loss(self, packed: Packed) -> torch.Tensor:
        """Sum of the loss over the predicted tokens, in nats."""
        recomputing = self.plan.layers_for(sum(packed.lengths))
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < recomputing  # read by transformers at every forward
        packed = packed.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = hidden_states(self.model, packed)
        labels = packed.labels[0][packed.predicted]
        return frozen_head_loss(hidden[packed.predicted], head(self.model), labels, self.vocab_chunk_size)

    def backward(
        self, documents: Sequence[Document], seeds: Sequence[int], predicted: int, gradient: torch.Tensor
    ) -> None:
        """Add the gradient of `documents` to the parameters' and their loss / `predicted` to `gradient[-2]`.

        Out of memory lowers the plan and starts this call again: no process waits for another in here.

        Args:
            gradient: the flat buffer of which the parameters' gradients are views, all zero; with two more values.

        Raises:
            UserError: one document does not fit, though every layer recomputes.
        """
        while True:
            tokens, lone = 0, False
            try:
                self.model.train()
                for group in group_by_token_budget([len(d.tokens) for d in documents], self.plan.micro_batch_tokens):
                    tokens, lone = sum(len(documents[i].tokens) for i in group), len(group) == 1
                    micro_batch = [documents[i] for i in group]
                    gradient[-2] += self._backward(micro_batch, [seeds[i] for i in group], predicted)
                return
            except torch.OutOfMemoryError as e:
                more_can_recompute = self.plan.layers_for(tokens) + 1 < len(self.plan.capacity)
                if not more_can_recompute and (lone or tokens // 2 < MIN_BUDGET):
                    raise UserError(
                        f"The GPU ran out of memory with {tokens} tokens at once: set precision to nf4, lower "
                        "max_length, or raise activation_checkpointing_layers."
                    ) from e
            gradient.zero_()
            torch.cuda.empty_cache()
            self.plan = self.plan.lower(tokens)
            log.warning(
                "the GPU ran out of memory with %d tokens at once: now at most %d; layers that recompute: %d",
                tokens, self.plan.micro_batch_tokens, self.plan.layers,
            )  # fmt: skip

    def _backward(self, documents: Sequence[Document], seeds: Sequence[int], predicted: int) -> torch.Tensor:
        """One micro-batch. Nothing outside this call holds its activations, so that another try has their memory."""
        packed = pack([d.tokens for d in documents])
        self.masks.set(packed.lengths, seeds)
        loss = self.loss(packed) / predicted
        loss.backward()
        return loss.detach()

    def probe(self, documents: Sequence[Document], gradient: torch.Tensor) -> None:
        """Compute the largest micro-batch once, so that memory runs out now or never; leaves no gradient behind."""
        if documents:
            self.backward(documents, [0] * len(documents), 1, gradient)
            gradient.zero_()

    def check_loss(self, document: Document) -> None:
        """The loss through backbone and head must be the model's own: some models scale or cap their logits.

        Raises:
            UserError: the two differ by more than 2 %.
        """
        packed = pack([document.tokens[:32]])
        self.model.eval()
        with torch.no_grad():
            own_loss = self._full_model_loss(packed.to(self.device))
            loss = self.loss(packed).item()
        log.info("loss of 31 tokens: %.4f by the model, %.4f through its output head", own_loss, loss)
        if not math.isclose(own_loss, loss, rel_tol=0.02):
            raise UserError(
                f"The base model computes another loss ({own_loss:.4f}) than its hidden states and output head give "
                f"({loss:.4f}): it changes its logits in a way this engine does not support; choose another base."
            )

    def _full_model_loss(self, packed: Packed) -> float:
        causal: Any = self.model.get_base_model()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            out = causal(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                lengths=packed.lengths,
                cu_seqlens=packed.cu_seqlens,
            )
        return torch.nn.functional.cross_entropy(out.logits[0].float(), packed.labels[0], reduction="sum").item()


def make_runner(
    model: PeftModel,
    masks: DropoutMasks,
    method: str,
    config: TrainConfig,
    device: torch.device,
    largest: int | None = None,
) -> MicroBatchRunner:
    """Prepare `model` for micro-batches of at most `largest` tokens, as the memory plan says."""
    cuda = device.type == "cuda"
    plan = plan_memory(model, method, config, device, largest)
    layers: list[Any] = []
    if plan.layers or plan.capacity:
        bare: Any = model.get_base_model()
        bare.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        bare.disable_input_require_grads()  # without reentry the inputs need no gradient
        layers = list(backbone(model).layers)  # type: ignore[arg-type]
    fuse_norms(model)
    return MicroBatchRunner(
        model=model,
        device=device,
        masks=masks,
        plan=plan,
        vocab_chunk_size=config.vocab_chunk_size or (GPU_VOCAB_CHUNK if cuda else CPU_VOCAB_CHUNK),
        autocast=config.precision == "bf16" or (cuda and config.precision == "nf4"),
        layers=layers,
    )
