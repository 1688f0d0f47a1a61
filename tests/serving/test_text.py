import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from feyntune.serving.text import Detokenizer, Stopper


@pytest.fixture(scope="module")
def bytewise():
    """A byte-level BPE with merges and with tokens that are parts of characters, as Llama 3's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["größe naïve 日本語 the cat émoji 😀 "] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def pieces(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.add(i) for i in ids] + [detokenizer.end()]


@given(data=st.data())
def test_pieces_put_together_are_the_text_decoded_at_once(bytewise, data):
    text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
    ids = data.draw(
        st.one_of(
            text.map(lambda t: bytewise.encode(t, add_special_tokens=False)),
            st.lists(st.integers(0, len(bytewise) - 1), max_size=20),  # also bytes that are no text
        )
    )
    whole = bytewise.backend_tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(bytewise, ids)) == whole


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(bytewise):
    shown = pieces(bytewise, bytewise.encode("a🦄b", add_special_tokens=False))
    assert len(shown) > 4
    assert [s for s in shown if s] == ["a", "🦄", "b"]


@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_a_text_is_cut_at_the_first_stop_string_however_it_arrives(parts, stop):
    text = "".join(parts)
    ends = [(i + len(s), i) for s in stop if (i := text.find(s)) >= 0]
    expected = text[: min(ends)[1]] if ends else text
    stopper, shown = Stopper(stop), ""
    for part in parts:
        shown += stopper.add(part)
        if stopper.stopped:
            break
    shown += stopper.end()
    assert shown == expected
    assert stopper.stopped == bool(ends)


def test_only_what_could_become_a_stop_string_is_held_back():
    stopper = Stopper(["END"])
    assert stopper.add("some EN") == "some "
    assert stopper.holding
    assert stopper.add("TRY") == "ENTRY"
    assert not stopper.holding


@given(st.lists(st.integers(0, 5), max_size=5), st.lists(st.integers(0, 5), max_size=8))
def test_a_text_goes_on_where_the_prompt_ended_with_decoders_that_drop_a_first_space(prompt, ids):
    vocabulary = {"<s>": 0, "▁We": 1, "▁study": 2, "▁the": 3, "s": 4, "▁": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    llama2 = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    detokenizer = Detokenizer(llama2, prompt)
    made = "".join([*(detokenizer.add(i) for i in ids), detokenizer.end()])
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    if prompt and prompt[-1] in (1, 2, 3, 4):
        assert before + made == tokenizer.decode(prompt + ids, skip_special_tokens=True)
    assert detokenizer.length <= len(made)


def test_a_byte_that_breaks_an_earlier_newline_breaks_no_stream():
    vocabulary = {t: i for i, t in enumerate(["<unk>", "We", "B", *[f"<0x{b:02X}>" for b in range(256)]])}
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))
    tokens = [vocabulary[t] for t in ("We", "<0x0A>", "<0xF0>", "B", "We", "<0xF0>")]
    text = "".join(detokenizer.add(t) for t in tokens) + detokenizer.end()
    assert text == "We\n\ufffdBWe\ufffd"


def test_a_long_stop_string_costs_no_more_than_the_text_held():
    stopper = Stopper(["a" * 400])
    assert "".join(stopper.add("b" + "a" * 10) for _ in range(20)) + stopper.end() == ("b" + "a" * 10) * 20
