"""What a step trains on: documents in a seeded order, a global batch, and its division by tokens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from feyntune.errors import UserError
from feyntune.model.load import encode
from feyntune.model.packed import group_by_token_budget


@dataclass
class Document:
    """Token ids of an abstract, or of a part of one that is longer than the context."""

    id: str  # of the paper
    tokens: list[int]


def read_mixture(data: str | Path, mixture: str, split: str, most: int | None = None) -> list[tuple[str, str]]:
    """(id, abstract) of a mixture's papers in one split, in drawing order.

    Raises:
        UserError: the mixture is unknown, could not be drawn, or is empty (its audit's reason is quoted).
    """
    data = Path(data)
    drawn = pq.read_table(data / "mixtures.parquet")
    chosen = drawn.filter(pc.and_(pc.equal(drawn["mixture"], mixture), pc.equal(drawn["split"], split)))
    ids = chosen["id"].to_pylist()[:most]
    if not ids:
        if most == 0 or split != "train":
            return []
        raise UserError(_why_empty(data, mixture, sorted(set(drawn["mixture"].to_pylist()))))
    papers = pq.read_table(data / "papers.parquet", columns=["id", "abstract"])
    abstracts = dict(zip(papers["id"].to_pylist(), papers["abstract"].to_pylist(), strict=True))
    return [(i, abstracts[i]) for i in ids]


def _why_empty(data: Path, mixture: str, known: list[str]) -> str:
    audit = json.loads((data / "audit.json").read_text(encoding="utf-8"))
    reason = audit.get("mixtures", {}).get(mixture, {}).get("reason")
    if reason:
        return f"Mixture {mixture} is not available in this corpus: {reason}"
    return f"Mixture {mixture} has no training papers in {data}: choose one of {', '.join(known) or 'none'}."


def documents(
    papers: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[Document], int]:
    """Each abstract as BOS, text, EOS; and how many were longer than `context` tokens and were split.

    The parts of a split abstract overlap by one token, so that every token is predicted exactly once.
    """
    result, split = [], 0
    for identifier, text in papers:
        tokens = encode(tokenizer, text)
        split += len(tokens) > context
        for start in range(0, len(tokens) - 1, context - 1):
            result.append(Document(identifier, tokens[start : start + context]))
    return result, split


def global_batch(documents: Sequence[Document], batch: int, step: int, seed: int) -> list[Document]:
    """The documents of `step` (from 0). Every epoch is another permutation, seeded by (seed, epoch)."""
    per_epoch = -(-len(documents) // batch)
    epoch, position = divmod(step, per_epoch)
    order = _order(len(documents), seed, epoch)
    return [documents[i] for i in order[position * batch : (position + 1) * batch]]


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def divide(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of documents in `parts` groups of nearly equal tokens; some are empty if there are too few.

    Longest first, each to the group that has the fewest tokens: at most 4/3 of the best division (Graham 1969).
    """
    groups: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = tokens.index(min(tokens))
        groups[lightest].append(i)
        tokens[lightest] += lengths[i]
    return groups


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from what it stands for."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def predicted(documents: Sequence[Document]) -> int:
    """How many tokens are predicted in `documents`: all but the first of each."""
    return sum(len(d.tokens) - 1 for d in documents)


def largest_micro_batch(
    examples: Sequence[Document], batch_size: int, steps: int, seed: int, parts: int, budget: int
) -> list[Document]:
    """The micro-batch with the most tokens that any of `parts` devices will compute in the first `steps` steps.

    The whole schedule is known before step 0, so memory can be planned for it and tried once.
    """
    largest: list[Document] = []
    most = 0
    for step in range(steps):
        batch = global_batch(examples, batch_size, step, seed)
        lengths = [len(d.tokens) for d in batch]
        if sum(lengths) <= most:
            continue
        for part in divide(lengths, parts):
            for group in group_by_token_budget([lengths[i] for i in part], budget):
                tokens = sum(lengths[part[i]] for i in group)
                if tokens > most:
                    most, largest = tokens, [batch[part[i]] for i in group]
    return largest
