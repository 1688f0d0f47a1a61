import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.errors import UserError
from feyntune.training.batches import Document, divide, documents, global_batch, predicted, read_mixture

LENGTHS = st.lists(st.integers(2, 500), min_size=1, max_size=40)


class Letters:
    """A tokenizer of single letters."""

    bos_token_id, eos_token_id = 0, 1

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]


@given(LENGTHS, st.integers(1, 7))
def test_a_batch_is_divided_whole_and_evenly(lengths, parts):
    groups = divide(lengths, parts)
    assert len(groups) == parts
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    tokens = [sum(lengths[i] for i in g) for g in groups]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(st.lists(st.text("abc", min_size=0, max_size=60), min_size=1, max_size=5), st.integers(8, 20))
def test_every_token_of_a_split_text_is_predicted_once(texts, context):
    pieces, cut = documents([(str(i), t) for i, t in enumerate(texts)], Letters(), context)
    assert all(2 <= len(d.tokens) <= context for d in pieces)
    assert predicted(pieces) == sum(len(t) + 1 for t in texts)
    assert cut == sum(len(t) + 2 > context for t in texts)
    for i, text in enumerate(texts):
        parts = [d.tokens for d in pieces if d.id == str(i)]
        joined = parts[0] + [token for part in parts[1:] for token in part[1:]]
        assert joined == [0, *map(ord, text), 1]


@given(st.integers(1, 50), st.integers(1, 16), st.integers(0, 3))
def test_an_epoch_is_every_document_once_in_an_order_of_its_own(count, batch, seed):
    papers = [Document(str(i), [0, 1]) for i in range(count)]
    per_epoch = -(-count // batch)
    epochs = [
        [d.id for s in range(per_epoch) for d in global_batch(papers, batch, e * per_epoch + s, seed)] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(d.id for d in papers)
    if count > 20:
        assert epochs[0] != epochs[1] != [d.id for d in papers]


def test_papers_come_in_drawing_order_and_from_the_split_asked_for(tiny_split):
    papers = read_mixture(tiny_split, "hep-th", "validation")
    assert [i for i, _ in papers] == [f"hep-th/{9901001 + i}" for i in range(48, 60)]
    assert read_mixture(tiny_split, "hep-th", "validation", 3) == papers[:3]


def test_the_audits_reason_is_quoted(tiny_split, tmp_path):
    import shutil

    folder = tmp_path / "split"
    shutil.copytree(tiny_split, folder)
    (folder / "audit.json").write_text(
        json.dumps({"mixtures": {"cs": {"available": False, "reason": "only 3 papers"}}})
    )
    with pytest.raises(UserError, match="cs is not available in this corpus: only 3 papers"):
        read_mixture(folder, "cs", "train")
