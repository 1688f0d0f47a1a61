"""Losses and entropies of whole abstracts from packed batches, without ever holding vocabulary x batch."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from feyntune.model.packed import IGNORE, group_by_token_budget, head, hidden_states, pack


class Scores(NamedTuple):
    """One entry a document, [documents] each; losses and entropies in nats."""

    n_tokens: np.ndarray  # predicted tokens of the text, neither BOS nor EOS
    nll_text: np.ndarray  # summed over those
    nll_eos: np.ndarray
    entropy_sum: np.ndarray  # of the predictive distributions of those


@torch.inference_mode()
def score(model: Any, documents: Sequence[Sequence[int]], tokens_per_batch: int, tokens_per_head: int) -> Scores:
    """Score token ids of documents, each `[BOS, text, EOS]`; faster when sorted by length.

    The negative log-likelihood of a token is the logarithm of the softmax's sum minus its own logit; the entropy of
    a predictive distribution is that logarithm minus the mean logit under it. Both are computed in fp32.
    """
    groups = _predictions(model, documents, tokens_per_batch, tokens_per_head)
    result = [_by_document(nll, entropy, lengths) for nll, entropy, _, lengths in groups]
    return Scores(*(np.concatenate([f[i] for f in result]) for i in range(4)))


@torch.inference_mode()
def score_tokens(
    model: Any, documents: Sequence[Sequence[int]], tokens_per_batch: int, tokens_per_head: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each document, of every token after its first: the loss in nats, and whether it is a most likely one.

    Equally likely tokens all count as the most likely one: bf16 makes ties that fp32 would not, and which of them a
    greedy decoder takes is chance.
    """
    result: list[tuple[np.ndarray, np.ndarray]] = []
    for nll, _, greedy, lengths in _predictions(model, documents, tokens_per_batch, tokens_per_head):
        ends = np.cumsum(np.array(lengths) - 1)[:-1]
        result += zip(np.split(nll.cpu().numpy(), ends), np.split(greedy.cpu().numpy(), ends), strict=True)
    return result


def _predictions(
    model: Any, documents: Sequence[Sequence[int]], tokens_per_batch: int, tokens_per_head: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]]:
    """For each group of documents: loss, entropy and "is a most likely token" of every predicted token, [predicted]
    each, and the documents' lengths."""
    device = next(model.parameters()).device
    for group in group_by_token_budget([len(d) for d in documents], tokens_per_batch):
        batch = pack([documents[i] for i in group]).to(device)
        predicts = batch.labels[0] != IGNORE
        hidden, labels = hidden_states(model, batch)[predicts], batch.labels[0][predicts]
        nll = torch.empty(len(labels), device=device)
        entropy = torch.empty(len(labels), device=device)
        greedy = torch.empty(len(labels), dtype=torch.bool, device=device)
        for part in torch.arange(len(labels), device=device).split(tokens_per_head):
            logits = head(model)(hidden[part]).float()
            own = logits.gather(1, labels[part, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            greedy[part] = own == top[:, 0]
            logits -= top
            weights = logits.exp()
            total = weights.sum(1)
            log_total = total.log()
            nll[part] = log_total + top[:, 0] - own
            entropy[part] = log_total - torch.einsum("tv,tv->t", weights, logits) / total
        yield nll, entropy, greedy, batch.lengths


def _by_document(nll: torch.Tensor, entropy: torch.Tensor, lengths: list[int]) -> Scores:
    """Sums a document of values a predicted token; the last predicted token of each is its EOS."""
    predicted = np.array(lengths) - 1
    ends = predicted.cumsum()
    starts = ends - predicted
    nlls, entropies = nll.double().cpu().numpy(), entropy.double().cpu().numpy()
    eos = nlls[ends - 1]
    return Scores(
        n_tokens=predicted - 1,
        nll_text=np.add.reduceat(nlls, starts) - eos,
        nll_eos=eos,
        entropy_sum=np.add.reduceat(entropies, starts) - entropies[ends - 1],
    )
