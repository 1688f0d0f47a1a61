"""A tiny Llama and its tokenizer, made on the spot: the base model of tests, demonstrations and benchmarks.

It is trained from scratch on text outside physics, so that adapting it to physics means something. Same
texts and seed, same bytes: it trains on one thread.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from feyntune.artifacts.artifact import Manifest, open_artifact, sha256_json, write_artifact
from feyntune.errors import UserError
from feyntune.model.load import encode
from feyntune.model.packed import ATTENTION, IGNORE, head, hidden_states, pack
from feyntune.telemetry import log, progress

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"  # Llama 3's names


def make_tiny_base(
    out: str | Path,
    texts: Iterable[str],
    *,
    seed: int = 0,
    vocab: int = 4096,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 8,
    kv_heads: int = 2,
    context: int = 1024,
    steps: int = 120,
    tokens_per_step: int = 768,
    learning_rate: float = 6e-3,
    dtype: torch.dtype = torch.float32,
) -> Manifest:
    """Train a byte-level BPE and a Llama on `texts` and seal them in `out` (kind `base`).

    Args:
        vocab: the most tokens the BPE may have; poor text gives fewer.
        context: most tokens of a text; a longer one is cut.
        steps, tokens_per_step: length of the training; texts are repeated if they do not suffice.
        dtype: of the weights that are written; training is in fp32.

    Raises:
        UserError: `texts` is empty.
        ArtifactError: `out` is taken.
    """
    texts = [t for t in texts if t.strip()]
    if not texts:
        raise UserError("A tiny base model needs texts to learn from: none were given.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = _tokenizer(texts, vocab, context)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, hidden, layers, heads, kv_heads, context))
        loss = _train(model, tokenizer, texts, steps, tokens_per_step, learning_rate, context, seed)
    finally:
        torch.set_num_threads(threads)

    config: dict[str, Any] = {"seed": seed, "vocab": vocab, "hidden": hidden, "layers": layers, "heads": heads}
    config |= {"kv_heads": kv_heads, "context": context, "steps": steps, "tokens_per_step": tokens_per_step}
    config |= {"learning_rate": learning_rate}
    transformers_logging.disable_progress_bar()
    with write_artifact(out, "base", inputs={"texts": sha256_json(texts)}, config=config) as folder:
        torch.nn.Module.to(model, dtype)
        model.save_pretrained(folder.path)
        tokenizer.save_pretrained(folder.path)
        folder.stats |= {"loss": loss, "parameters": model.num_parameters(), "tokens": len(tokenizer)}
    return open_artifact(out, "base")


def _tokenizer(texts: Sequence[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # A prompt begins with BOS for every program that reads the folder, as with Llama 3's tokenizer.
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context
    )


def _config(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, kv_heads: int, context: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        initializer_range=1 / math.sqrt(2 * hidden),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": max(context // 4, 1),
        },
        attn_implementation=ATTENTION,  # type: ignore[call-arg]
    )


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    steps: int,
    tokens_per_step: int,
    learning_rate: float,
    context: int,
    seed: int,
) -> float:
    """Returns the mean loss of the last tenth of the steps, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps / 20), steps)
    losses = []
    with progress("tiny base", steps, "steps") as ticker:
        for _, batch in zip(range(steps), _batches(tokenizer, texts, tokens_per_step, context, seed), strict=False):
            packed = pack(batch)
            logits = head(model)(hidden_states(model, packed)).float()
            loss = F.cross_entropy(logits, packed.labels[0], ignore_index=IGNORE)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            ticker.advance(loss=losses[-1])
    last = losses[-max(1, steps // 10) :]
    log.info("tiny base: %d tokens, loss %.3f -> %.3f", len(tokenizer), losses[0], sum(last) / len(last))
    return sum(last) / len(last)


def _batches(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], budget: int, context: int, seed: int
) -> Iterator[list[list[int]]]:
    """Batches of about `budget` tokens without end; every pass in another order. Texts are encoded when needed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batch: list[list[int]] = []
        for i in torch.randperm(len(texts), generator=generator).tolist():
            document = encode(tokenizer, texts[i])[:context]
            if batch and sum(map(len, batch)) + len(document) > budget:
                yield batch
                batch = []
            batch.append(document)
        yield batch
