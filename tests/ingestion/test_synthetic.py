import hashlib
import json
import statistics
from collections import Counter
from itertools import islice

from feyntune.artifacts.records import normal_form
from feyntune.ingestion.synthetic import everyday_texts, synthetic_records

RECORDS = list(synthetic_records(1000))


def test_the_same_seed_gives_the_same_records_and_a_longer_run_begins_with_a_shorter():
    assert list(synthetic_records(200)) == RECORDS[:200]
    assert list(islice(everyday_texts(50, seed=3), 10)) == list(everyday_texts(10, seed=3))
    assert list(synthetic_records(5, seed=1)) != RECORDS[:5]


def test_the_lexicon_gives_the_texts_it_always_gave():
    records, texts = hashlib.sha256(), hashlib.sha256()
    for record in synthetic_records(600, seed=3):
        records.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    for text in everyday_texts(200, seed=3):
        texts.update(text.encode() + b"\n")
    assert records.hexdigest() == "78bc27fc80c9d437059fd718d2970b1791d43986a942f3a694fe9f6948212107"
    assert texts.hexdigest() == "e56256c86aead5c0200dfbe07d4418d2d7c09b7909e47db152fd830bafdf0676"


def test_records_have_the_keys_of_the_snapshot_and_unique_ids():
    assert len({r["id"] for r in RECORDS}) == 1000
    for record in RECORDS:
        assert len(record) == 14
        assert json.loads(json.dumps(record)) == record


def test_every_mixture_is_possible_from_a_thousand_records():
    n = Counter(r["categories"].split()[0].partition(".")[0] for r in RECORDS)
    assert min(n["hep-ph"], n["gr-qc"]) >= 0.3 * n["hep-th"]
    assert n["hep-ph"] + n["gr-qc"] >= n["hep-th"]
    assert n["q-bio"] + n["cs"] >= n["hep-ph"] + n["gr-qc"]


def test_abstracts_are_as_long_as_real_ones():
    lengths = [len(normal_form(r["abstract"])) for r in RECORDS]
    assert 700 < statistics.mean(lengths) < 820
    assert 300 < statistics.pstdev(lengths) < 400


def test_there_are_withdrawn_papers_duplicates_old_ids_and_papers_after_the_cut_off():
    texts = Counter(normal_form(r["abstract"]) for r in RECORDS if "ithdrawn" not in (r["comments"] or ""))
    assert sum(n - 1 for n in texts.values()) >= 4
    assert sum("ithdrawn" in (r["comments"] or "") for r in RECORDS) == 10
    assert sum("second part of a series" in r["abstract"] for r in RECORDS) >= 9
    assert sum("/" in r["id"] for r in RECORDS) > 100
    assert sum(r["id"] > "2409" and "/" not in r["id"] for r in RECORDS) > 10


def test_the_vocabulary_is_rich_enough_for_a_4096_token_bpe():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trainer.show_progress = False
    tokenizer.train_from_iterator((normal_form(r["abstract"]) for r in RECORDS), trainer)
    assert tokenizer.get_vocab_size() == 4096
